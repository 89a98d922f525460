"""Guesses of what an answer will say next, for speculative decoding. Guesses cost time when they are wrong,
never correctness: the decoder verifies every one.

Robot actions are smooth, so a timestep's integers are close to those of the timestep before. A model trained
with masked actions hardly looks at its own numbers, so what it predicts *behind* a wrong guess is mostly what
it will predict once the guess is corrected (Jacobi refinement).
"""

from collections import deque
from collections.abc import Collection

from .grammar import IntegerGrammar, Text

# A candidate's starting penalty, before this chunk has shown which one fits (the model's own, previous chunk,
# copy, linear).
PRIOR = {"own": 0.0, "previous": 0.3, "copy": 0.5, "linear": 0.7}
OWN = 0.7  # the model's own are better than their record: it grows while drafts are wrong
LOOK_BACK = 3  # timesteps over which candidates are compared


class Drafter:
    """Drafts one row's answers; remembers its last one.

    Args:
        grammar: of the answers; `count` = timesteps × dim integers.
        dim: integers per timestep (D).
        length: most symbols of a draft. With `adaptive`, shorter while drafts are not being accepted.
    """

    def __init__(self, grammar: IntegerGrammar, dim: int, length: int, adaptive: bool = True) -> None:
        self.grammar, self.dim, self.length, self.adaptive = grammar, dim, length, adaptive
        self.reset()

    def reset(self) -> None:
        """Forgets the last answer. Call when the next one will have nothing to do with it."""
        self.previous: list[int] = []  # what the last answer said of the timesteps that are now asked for
        self.history: list[int] = []  # the last timesteps before those, at most two
        self.start()

    def start(self) -> None:
        """Call before each answer."""
        self.revised: dict[int, int] = {}  # the model's own predictions of coming integers
        self.behind: dict[int, int] = {}  # those of them that it made behind a wrong guess, until known
        self.certain = -1  # the integer whose first digits are sure, by the last pass
        self.own_errors: deque[float] = deque(maxlen=LOOK_BACK * self.dim)
        self.current, self.bad_passes = self.length, 0

    def remember(self, integers: list[int], executed: int) -> None:
        """Keeps an answer of which `executed` timesteps will have been acted on when the next is asked
        for."""
        past = (self.history + integers[: executed * self.dim])[-2 * self.dim :]
        self.history, self.previous = past, integers[executed * self.dim :]

    def draft(self, text: Text, needed: int) -> list[int]:
        """Symbols that may follow, at most `current` and no further than `needed` integers; those that the
        grammar forces are always among them."""
        for slot in [slot for slot in self.behind if slot < len(text.integers)]:
            self.own_errors.append(_error(self.behind.pop(slot), text.integers[slot]))
        text, symbols = text.copy(), []
        while len(symbols) < self.current and len(text.integers) < needed:
            guess = self._guess(text.integers)
            if guess is None:
                break
            more = self.grammar.spell(self.grammar.nearest(guess, text.value), text)
            for symbol in more:
                self.grammar.write(text, symbol)
            symbols += more
        return symbols[: self.current]

    def learn(self, text: Text, draft: list[int], predicted: list[int], accepted: int) -> None:
        """Takes over the model's own predictions.

        Args:
            text: what was written before the draft.
            draft: symbols that were verified.
            predicted: the model's symbol at the place of each of them.
            accepted: how many of them were right.
        """
        if self.adaptive and draft:
            # One bad pass is normal: what was learnt from it makes the next one good.
            self.bad_passes = self.bad_passes + 1 if 4 * accepted < len(draft) else 0
            if accepted == len(draft):
                self.current = min(self.length, 2 * self.current)
            elif self.bad_passes > 1:
                self.current = max(1, self.current // 2)
        text, own, self.certain = text.copy(), None, -1
        for symbol, its in zip(draft, predicted, strict=True):
            if own is None and its != symbol:
                own = text.copy()
                if self.certain < 0:
                    self.certain = len(text.integers)
                self.grammar.write(own, its)
            self.grammar.write(text, symbol)
            if text.value >= 0:
                continue
            # An integer is complete. What would the model's own be, as far as its first other digit tells?
            drafted = text.integers[-1]
            if own is not None and own.value < 0:
                drafted = own.integers[-1]
            elif own is not None:
                drafted = self.grammar.nearest(drafted, own.value)
            slot = len(text.integers) - 1
            self.revised[slot] = drafted
            if 0 <= self.certain < slot:
                self.behind[slot] = drafted
            own = None

    def _guess(self, integers: list[int]) -> int | None:
        """The next integer, from those before it."""
        slot = len(integers)
        if slot == self.certain and slot in self.revised:
            return self.revised[slot]
        candidates = self._candidates(slot, integers)
        penalty = {}
        if slot in self.revised:
            candidates["own"] = self.revised[slot]
            penalty["own"] = OWN * _mean(self.own_errors, PRIOR["own"])
        errors: dict[str, list[float]] = {name: [] for name in candidates if name not in penalty}
        for earlier in range(slot - self.dim, max(-1, slot - LOOK_BACK * self.dim - 1), -self.dim):
            for name, value in self._candidates(earlier, integers).items():
                if name in errors:
                    errors[name].append(_error(value, integers[earlier]))
        penalty |= {name: _mean(e, PRIOR[name]) for name, e in errors.items()}
        return (
            candidates[min(candidates, key=lambda name: (penalty[name], PRIOR[name]))] if candidates else None
        )

    def _candidates(self, slot: int, integers: list[int]) -> dict[str, int]:
        known, place = self.history + integers, slot + len(self.history)
        result = {}
        if slot < len(self.previous):
            result["previous"] = self.previous[slot]
        if place >= self.dim:
            result["copy"] = last = known[place - self.dim]
            if place >= 2 * self.dim:
                result["linear"] = min(max(2 * last - known[place - 2 * self.dim], 0), self.grammar.maximum)
        return result


def _error(guess: int, true: int) -> float:
    """Wrong is wrong; being near may save a digit or two."""
    return 0.0 if guess == true else 1.0 + min(1.0, abs(guess - true) / 50)


def _mean(errors: Collection[float], default: float) -> float:
    return sum(errors) / len(errors) if errors else default
