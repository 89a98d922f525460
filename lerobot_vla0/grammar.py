"""The language of VLA-0's answers: exactly n integers in 0..B, single spaces, no leading zeros, then end of
turn.

The automaton works on whole batches of rows with tensor arithmetic: a row's state is how many integers are
finished and the value of the one being written. Knows tokens; knows nothing of models or robots.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class GrammarState(NamedTuple):
    """Where each of R rows stands."""

    index: Tensor  # (R,) int64, how many integers are finished; equal to `count` once the row has ended
    value: Tensor  # (R,) int64, the integer being written, -1 before its first digit
    integers: Tensor  # (R, count) int64, the finished integers; -1 where there is none yet


class IntegerGrammar:
    """Token automaton for "`count` integers in 0..`maximum`".

    A *symbol* is an index into `token_ids`, the 12 tokens that can occur, in ascending order of token id, so
    that the first maximum over symbols is also the lowest token id among ties.

    Args:
        count: how many integers a text has (H·D).
        maximum: the largest integer (B).
        digit_ids: token ids of "0".."9", in this order.
        space_id: token id of " ".
        end_id: token id that ends the turn.
    """

    def __init__(self, count: int, maximum: int, digit_ids: list[int], space_id: int, end_id: int) -> None:
        ids = [*digit_ids, space_id, end_id]
        if len(digit_ids) != 10 or len(set(ids)) != 12:
            raise ValueError(f"a grammar needs 12 different tokens (10 digits, space, end), got {ids}.")
        if count < 1 or maximum < 1:
            raise ValueError(f"count and maximum must be at least 1, got {count} and {maximum}.")
        self.count, self.maximum = count, maximum
        order = sorted(range(12), key=lambda i: ids[i])
        self.token_ids = torch.tensor([ids[i] for i in order])
        # digit of each symbol, -1 for the two separators
        self.digits = torch.tensor([i if i < 10 else -1 for i in order])
        self.space, self.end = order.index(10), order.index(11)

    def to(self, device: torch.device | str) -> "IntegerGrammar":
        """Moves the two lookup tables (in place, as `nn.Module.to` does)."""
        self.token_ids, self.digits = self.token_ids.to(device), self.digits.to(device)
        return self

    def start(self, rows: int) -> GrammarState:
        device = self.digits.device
        zero = torch.zeros(rows, dtype=torch.int64, device=device)
        return GrammarState(
            zero, zero - 1, torch.full((rows, self.count), -1, dtype=torch.int64, device=device)
        )

    def allowed(self, state: GrammarState) -> Tensor:
        """Which symbols may follow, (R, 12) bool. At least one always may; a finished row allows only the
        end."""
        value, digits = state.value[:, None], self.digits[None, :]
        started = value >= 0
        # A further digit d is allowed while 10·value + d stays in range; after a leading "0" nothing may
        # follow.
        extended = torch.where(started, 10 * value, 0) + digits
        digit_ok = (
            (digits >= 0) & (extended <= self.maximum) & (value != 0) & self._unfinished(state)[:, None]
        )
        last = (state.index >= self.count - 1)[:, None]
        symbols = torch.arange(12, device=self.digits.device)[None, :]
        space_ok = (symbols == self.space) & started & ~last
        end_ok = (symbols == self.end) & last & (started | ~self._unfinished(state)[:, None])
        return digit_ok | space_ok | end_ok

    def advance(self, state: GrammarState, symbol: Tensor) -> GrammarState:
        """State after each row wrote `symbol` (R,), which must be allowed. Finished rows stay as they are."""
        digit = self.digits[symbol]
        is_digit, unfinished = digit >= 0, self._unfinished(state)
        completed = ~is_digit & unfinished
        slot = state.index.clamp(max=self.count - 1)[:, None]
        kept = state.integers.gather(1, slot)
        integers = state.integers.scatter(
            1, slot, torch.where(completed[:, None], state.value[:, None], kept)
        )
        value = torch.where(is_digit, state.value.clamp(min=0) * 10 + digit, -1)
        return GrammarState(state.index + completed, value, integers)

    def _unfinished(self, state: GrammarState) -> Tensor:
        return state.index < self.count
