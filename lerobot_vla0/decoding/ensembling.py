"""Temporal ensembling: the action for a timestep is the weighted mean of all recent chunks that contain it
(Zhao et al., ACT, 2023; the weights are those of VLA-0's published code)."""

import torch
from torch import Tensor


class TemporalEnsembler:
    """Averages the overlapping chunks of one environment.

    The newest chunk has weight 1, older ones have `weight` (0.5 in VLA-0's first version) or `weight` ** age
    (in its second). A weight of 1 gives the plain mean.

    Args:
        size: number of chunks averaged at most, including the newest.
        weight: of older chunks, in (0, 1].
        exponential: let the weight decay with a chunk's age.
    """

    def __init__(self, size: int, weight: float = 0.5, exponential: bool = False) -> None:
        self.size, self.weight, self.exponential = size, weight, exponential
        self.chunks: list[Tensor] = []  # newest first, each from the newest chunk's first timestep on

    def add(self, chunk: Tensor, executed: int) -> Tensor:
        """Adds a chunk (H, D) that begins `executed` timesteps after the last one. Returns the weighted mean
        for its timesteps, (H, D)."""
        self.chunks = [chunk, *(older[executed:] for older in self.chunks)][: self.size]
        total, weights = torch.zeros_like(chunk), torch.zeros_like(chunk)
        for age, actions in enumerate(self.chunks):
            weight = self.weight ** (age if self.exponential else min(age, 1))
            total[: len(actions)] += weight * actions
            weights[: len(actions)] += weight
        return total / weights
