"""Temporal ensembling: the action for a moment is averaged over all chunks that say something about it
(Zhao et al., ACT, 2023; VLA-0's weights are in its published code)."""

import torch
from torch import Tensor


class TemporalEnsembler:
    """Averages overlapping chunks, separately for each row (environment) of a batch.

    The newest chunk counts 1. In VLA-0's first version every older one counts `weight` (0.5), in its second
    `weight` ** age. A weight of 1 is the plain mean.

    Args:
        size: chunks that are averaged at most, the newest included; at least 2.
        weight: of older chunks, in (0, 1].
        exponential: let the weight shrink with a chunk's age.
    """

    def __init__(self, size: int, weight: float = 0.5, exponential: bool = False) -> None:
        self.size, self.weight, self.exponential = size, weight, exponential
        self.reset()

    def reset(self, rows: list[int] | None = None) -> None:
        """Forgets all chunks, or those of some rows, whose episodes have ended."""
        if rows is None:
            self._chunks: list[Tensor] = []  # newest first, NaN where a row has no such chunk
            return
        for chunk in self._chunks:
            chunk[rows] = torch.nan

    def add(self, chunk: Tensor, executed: int) -> Tensor:
        """A new chunk (B, H, D), `executed` timesteps after the one before → its average with the older ones,
        (B, H, D). A batch of another size starts afresh."""
        if self._chunks and self._chunks[0].shape != chunk.shape:
            self.reset()
        gone = torch.full_like(chunk[:, :executed], torch.nan)
        # What older chunks say of the timesteps that the new one begins with; nothing of the last ones.
        older = [torch.cat([old[:, executed:], gone], dim=1) for old in self._chunks]
        self._chunks = [chunk.clone(), *older][: self.size]
        stacked = torch.stack(self._chunks)  # (chunks, B, H, D)
        ages = torch.arange(len(stacked), device=chunk.device)
        weights = self.weight ** (ages if self.exponential else ages.clamp(max=1))
        weights = torch.where(stacked.isnan(), 0.0, weights.view(-1, 1, 1, 1).to(chunk))
        return (weights * stacked.nan_to_num()).sum(0) / weights.sum(0)
