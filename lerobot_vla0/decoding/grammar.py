"""The language of VLA-0's answers: exactly n integers in 0..B, single spaces, no leading zeros, then end of
turn. Knows tokens; knows nothing of models or robots."""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Text:
    """How far one row's answer is written."""

    integers: list[int] = field(default_factory=list)  # the finished ones
    value: int = -1  # the one being written, -1 before its first digit

    def copy(self) -> "Text":
        return Text(self.integers.copy(), self.value)


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
        self.token_ids = [ids[i] for i in order]
        self.digit_symbols = [order.index(d) for d in range(10)]
        self.space, self.end = order.index(10), order.index(11)
        # digit of each symbol, -1 for the two separators
        self._digits = [i if i < 10 else -1 for i in order]
        # Which symbols may follow, by the value being written + 1; one table for the text's last integer.
        self._allowed = np.zeros((2, maximum + 2, 12), dtype=bool)
        for value in range(-1, maximum + 1):
            # A further digit must keep the integer in range; after a leading "0" nothing may follow.
            for digit in range(10):
                grown = 10 * max(value, 0) + digit
                self._allowed[:, value + 1, self.digit_symbols[digit]] = value != 0 and grown <= maximum
            self._allowed[0, value + 1, self.space] = self._allowed[1, value + 1, self.end] = value >= 0

    @property
    def regex(self) -> str:
        """The same language, without the end of turn, as a regular expression for structured output."""
        number = integer_regex(self.maximum)
        return f"({number})( ({number})){{{self.count - 1}}}"

    def allowed(self, text: Text) -> np.ndarray:
        """Which symbols may follow an unfinished text, (12,) bool. At least one always may."""
        return self._allowed[int(len(text.integers) == self.count - 1), text.value + 1]

    def forced(self, text: Text) -> int | None:
        """The only symbol that may follow, or None if there is a choice."""
        allowed = self.allowed(text)
        return int(allowed.argmax()) if allowed.sum() == 1 else None

    def write(self, text: Text, symbol: int) -> None:
        """Appends an allowed symbol to the text, in place."""
        digit = self._digits[symbol]
        if digit >= 0:
            text.value = 10 * max(text.value, 0) + digit
        else:
            text.integers.append(text.value)
            text.value = -1

    def finished(self, text: Text) -> bool:
        return len(text.integers) == self.count

    def spell(self, integer: int, text: Text) -> list[int]:
        """Symbols that complete the text's next integer as `integer`, which begins with what is written of
        it, up to and including the separator."""
        rest = str(integer)[len(str(text.value)) if text.value >= 0 else 0 :]
        separator = self.end if len(text.integers) == self.count - 1 else self.space
        return [*(self.digit_symbols[int(digit)] for digit in rest), separator]

    def nearest(self, integer: int, value: int) -> int:
        """The integer nearest to `integer`, in 0..maximum, that begins with the digits of `value` (-1:
        none)."""
        integer = min(max(integer, 0), self.maximum)
        if value <= 0:
            return integer if value < 0 else 0
        best, scale = value, 1
        while value * scale <= self.maximum:
            candidate = min(max(integer, value * scale), value * scale + scale - 1, self.maximum)
            if abs(candidate - integer) < abs(best - integer):
                best = candidate
            scale *= 10
        return best


def integer_regex(maximum: int) -> str:
    """Alternatives for the integers 0..maximum without leading zeros: "0|[1-9][0-9]{0,2}|1000" for 1000."""
    digits = str(maximum)
    parts = ["0"]
    if len(digits) > 1:
        parts.append(f"[1-9][0-9]{{0,{len(digits) - 2}}}")
    for place, digit in enumerate(digits):
        # The digits before as in `maximum`, a smaller one here, and any behind.
        lowest, highest, rest = int(place == 0), int(digit) - 1, len(digits) - place - 1
        if highest >= lowest:
            behind = f"[0-9]{{{rest}}}" if rest else ""
            parts.append(f"{digits[:place]}[{lowest}-{highest}]{behind}")
    return "|".join([*parts, digits])
