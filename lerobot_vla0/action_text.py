"""Normalised actions ↔ integer bins ↔ text, without tokens, robots or LeRobot.

VLA-0 (arXiv 2510.13054, section 3) writes an action `a` as the integer `round((a - min) / (max - min) * B)`
in 0..B. LeRobot's normaliser maps [min, max] to [-1, 1]; this module maps [-1, 1] to 0..B.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
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
            name: of the numbers, for the error if one is NaN or infinite.
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
        Any other text is refused: no integer is filled in or cut off."""
        words = text.split()
        expected = torch.Size(shape).numel()
        if len(words) != expected:
            raise ValueError(f"expected {expected} integers, got {len(words)}: {text[:80]!r}")
        bad = [w for w in words if not (w.isascii() and w.isdigit()) or int(w) > self.num_bins]
        if bad:
            raise ValueError(f"expected integers in 0..{self.num_bins}, got {bad[0]!r} in {text[:80]!r}")
        return torch.tensor([int(w) for w in words]).reshape(tuple(shape))


@dataclass
class PartialAnswer:
    """The state of the automaton: the beginning of an answer."""

    integers: list[int] = field(default_factory=list)  # complete integers (their separator is written)
    value: int = -1  # value of the digits of the next integer, -1 before its first digit

    def copy(self) -> "PartialAnswer":
        return PartialAnswer(self.integers.copy(), self.value)


class IntegerGrammar:
    """Automaton over tokens that accepts `count` integers in 0..`maximum`.

    Only 12 tokens can occur in an answer: ten digits, the space, and the end of turn. A *symbol* is the index
    of one of them in `token_ids`, which is sorted by token id: an argmax over symbols therefore resolves ties
    to the lowest token id.

    Args:
        count: integers in an answer (H·D).
        maximum: the largest integer (B).
        digit_ids: token ids of "0".."9", in this order.
        space_id: token id of " ".
        end_id: token id that ends the turn.
    """

    def __init__(self, count: int, maximum: int, digit_ids: list[int], space_id: int, end_id: int) -> None:
        ids = [*digit_ids, space_id, end_id]
        if len(digit_ids) != 10 or len(set(ids)) != 12:
            raise ValueError(f"a grammar needs 12 different tokens (10 digits, space, end), got {ids}.")
        self.count, self.maximum = count, maximum
        self.token_ids = sorted(ids)
        *self.digit_symbols, self.space, self.end = (self.token_ids.index(token) for token in ids)
        self._digit_of = {symbol: digit for digit, symbol in enumerate(self.digit_symbols)}
        # Allowed symbols by [is this the last integer?, value of its digits so far + 1].
        self._allowed = np.zeros((2, maximum + 2, 12), dtype=bool)
        for value in range(-1, maximum + 1):
            # A further digit must keep the integer in range; after a leading "0" no digit may follow.
            for digit in range(10):
                longer = 10 * max(value, 0) + digit
                self._allowed[:, value + 1, self.digit_symbols[digit]] = value != 0 and longer <= maximum
            self._allowed[0, value + 1, self.space] = self._allowed[1, value + 1, self.end] = value >= 0

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest answer: each integer with all its digits and a space or the end of turn."""
        return self.count * (len(str(self.maximum)) + 1)

    def regex(self, prefix: Sequence[int] = ()) -> str:
        """The same language, without the end of turn, as a regular expression for structured output.

        Args:
            prefix: integers that the answer begins with, at most `count`.
        """
        number, free = integer_regex(self.maximum), self.count - len(prefix)
        if prefix:
            return " ".join(map(str, prefix)) + (f"( ({number})){{{free}}}" if free else "")
        return f"({number})( ({number})){{{free - 1}}}"

    def allowed(self, answer: PartialAnswer) -> np.ndarray:
        """Which symbols may follow an unfinished answer, (12,) bool, at least one of them True."""
        return self._allowed[int(len(answer.integers) == self.count - 1), answer.value + 1]

    def forced(self, answer: PartialAnswer) -> int | None:
        """The symbol that must follow an unfinished answer, or None if several may."""
        allowed = self.allowed(answer)
        return int(allowed.argmax()) if allowed.sum() == 1 else None

    def append(self, answer: PartialAnswer, *symbols: int) -> None:
        """Appends allowed symbols to the answer, in place."""
        for symbol in symbols:
            if symbol in self._digit_of:
                answer.value = 10 * max(answer.value, 0) + self._digit_of[symbol]
            else:
                answer.integers.append(answer.value)
                answer.value = -1

    def finished(self, answer: PartialAnswer) -> bool:
        return len(answer.integers) == self.count

    def spell(self, integer: int, answer: PartialAnswer) -> list[int]:
        """Symbols that complete the answer's next integer as `integer`, its space or end of turn included.
        `integer` must begin with the digits in `answer.value`."""
        rest = str(integer)[len(str(answer.value)) if answer.value >= 0 else 0 :]
        separator = self.end if len(answer.integers) == self.count - 1 else self.space
        return [*(self.digit_symbols[int(digit)] for digit in rest), separator]

    def nearest(self, integer: int, value: int) -> int:
        """The integer in 0..maximum nearest to `integer` whose digits begin with those of `value` (-1: no
        digit is fixed)."""
        if value <= 0:
            return 0 if value == 0 else min(max(integer, 0), self.maximum)
        candidates, lowest, highest = [], value, value
        while lowest <= self.maximum:  # with no, one, two, ... further digits
            candidates.append(min(max(integer, lowest), highest, self.maximum))
            lowest, highest = 10 * lowest, 10 * highest + 9
        return min(candidates, key=lambda candidate: abs(candidate - integer))


def integer_regex(maximum: int) -> str:
    """Regular expression of the integers 0..maximum without leading zeros, alternatives separated by "|":
    "0|[1-9][0-9]{0,2}|1000" for 1000."""
    digits = str(maximum)
    parts = ["0"]
    if len(digits) > 1:
        parts.append(f"[1-9][0-9]{{0,{len(digits) - 2}}}")
    for place, digit in enumerate(digits):
        # Same digits as `maximum` before this place, a smaller digit here, any digits after it.
        lowest, highest, rest = int(place == 0), int(digit) - 1, len(digits) - place - 1
        if highest >= lowest:
            after = f"[0-9]{{{rest}}}" if rest else ""
            parts.append(f"{digits[:place]}[{lowest}-{highest}]{after}")
    return "|".join([*parts, digits])
