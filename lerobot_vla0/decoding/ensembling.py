"""Temporal ensembling: the action for a moment is averaged over all chunks that say something about it
(Zhao et al., ACT, 2023; VLA-0's weights are in its published code)."""

import torch
from torch import Tensor


class TemporalEnsembler:
    """Averages the overlapping chunks of one environment.

    The newest chunk counts 1. In VLA-0's first version every older one counts `weight` (0.5), in its second
    `weight` ** age. A weight of 1 is the plain mean.

    Args:
        size: chunks that are averaged at most, the newest included.
        weight: of older chunks, in (0, 1].
        exponential: let the weight shrink with a chunk's age.
    """

    def __init__(self, size: int, weight: float = 0.5, exponential: bool = False) -> None:
        self.size, self.weight, self.exponential = size, weight, exponential
        self.chunks: list[Tensor] = []  # newest first; what each says of the coming timesteps

    def add(self, chunk: Tensor, executed: int) -> Tensor:
        """A new chunk (H, D), `executed` timesteps after the one before → its average with the older ones,
        (H, D)."""
        self.chunks = [chunk, *(older[executed:] for older in self.chunks)][: self.size]
        total, weights = torch.zeros_like(chunk), torch.zeros_like(chunk)
        for age, said in enumerate(self.chunks):
            weight = self.weight ** (age if self.exponential else min(age, 1))
            total[: len(said)] += weight * said
            weights[: len(said)] += weight
        return total / weights
