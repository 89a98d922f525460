"""The grammar of VLA-0's answers: exactly `count` integers in 0..`maximum` without leading zeros, a space
between two of them, then the end-of-turn token. Deals with tokens only, not with models or robots."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class PartialAnswer:
    """The state of the automaton: what has been written of one answer so far."""

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

    Raises:
        ValueError: the token ids are not 12 different ones, or `count` or `maximum` is below 1.
    """

    def __init__(self, count: int, maximum: int, digit_ids: list[int], space_id: int, end_id: int) -> None:
        ids = [*digit_ids, space_id, end_id]
        if len(digit_ids) != 10 or len(set(ids)) != 12:
            raise ValueError(f"a grammar needs 12 different tokens (10 digits, space, end), got {ids}.")
        if count < 1 or maximum < 1:
            raise ValueError(f"count and maximum must be at least 1, got {count} and {maximum}.")
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
        `integer` must begin with the digits that are already written."""
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
