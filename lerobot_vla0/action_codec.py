"""Normalised actions ↔ integer bins ↔ text, without tokens, robots or LeRobot.

VLA-0 (arXiv 2510.13054, section 3) writes an action `a` as the integer `round((a - min) / (max - min) * B)`
in 0..B. LeRobot's normaliser maps [min, max] to [-1, 1]; this module maps [-1, 1] to 0..B.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class ActionCodec:
    """Maps actions in [-1, 1] to the integers 0..num_bins and back.

    Args:
        num_bins: B, the largest integer (1000 in the paper). The grid has B + 1 points; at least 2.
    """

    def __init__(self, num_bins: int = 1000) -> None:
        if num_bins < 2:
            raise ValueError(f"num_bins must be at least 2, got {num_bins}.")
        self.num_bins = num_bins

    def encode(self, actions: Tensor, name: str = "action") -> tuple[Tensor, Tensor]:
        """Actions (any shape, normalised to [-1, 1]) → (bins, clipped), both of the same shape.

        `bins` is int64 in 0..num_bins; `clipped` is True where the action lay outside the grid and was moved
        to its edge (values within half a bin of the edge are rounding, not clipping).

        Args:
            name: what the numbers are, for the error.

        Raises:
            ValueError: a number is NaN or infinite.
        """
        if not torch.isfinite(actions).all():
            bad = (~torch.isfinite(actions)).nonzero()[0].tolist()
            raise ValueError(
                f"{name} contains NaN or inf (first at index {bad} of shape {tuple(actions.shape)}): "
                "it cannot be written as an integer. Remove or repair these frames in the data set."
            )
        grid = ((actions.float() + 1) / 2 * self.num_bins).round()
        bins = grid.clamp(0, self.num_bins)
        return bins.long(), bins != grid

    def decode(self, bins: Tensor) -> Tensor:
        """Bins 0..num_bins (integers, or fractions from averaging several chunks) → float32 actions in [-1,
        1]."""
        return bins.float() / self.num_bins * 2 - 1

    def to_text(self, bins: Tensor) -> str:
        """Bins (H, D), or any shape, in reading order → "474 479 460 ..."."""
        return " ".join(map(str, bins.flatten().tolist()))

    def from_text(self, text: str, shape: Sequence[int]) -> Tensor:
        """The inverse of `to_text`: exactly prod(shape) integers in 0..num_bins → int64 tensor of `shape`.

        Raises:
            ValueError: another number of integers, a word that is no integer, or one out of range. Nothing is
                filled in for what is missing, and nothing is cut off.
        """
        words = text.split()
        expected = torch.Size(shape).numel()
        if len(words) != expected:
            raise ValueError(f"expected {expected} integers, got {len(words)}: {text[:80]!r}")
        bad = [w for w in words if not (w.isascii() and w.isdigit()) or int(w) > self.num_bins]
        if bad:
            raise ValueError(f"expected integers in 0..{self.num_bins}, got {bad[0]!r} in {text[:80]!r}")
        return torch.tensor([int(w) for w in words]).reshape(tuple(shape))
