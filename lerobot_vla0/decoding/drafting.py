"""Guesses of what an answer will say next, for speculative decoding. Guesses cost time when they are wrong,
never correctness: the decoder verifies every one.

Robot actions are smooth, so a timestep's integers are close to those of the timestep before. A model trained
with masked actions hardly looks at its own numbers, so what it predicts *behind* a wrong guess is mostly what
it will predict once the guess is corrected (Jacobi refinement): for such a model any guess is worth making.
"""

from dataclasses import dataclass

from .grammar import IntegerGrammar, Text

# A source's chance to be right, before it has a record: what the last answer said of the same timestep, the
# timestep before once more, the last two extrapolated, and the middle of the range where nothing is known.
PRIOR = {"previous": 0.7, "copy": 0.5, "linear": 0.3, "middle": 0.02}
LOOK_BACK = 3  # timesteps of the same dimension over which sources are compared
FADE = 0.9  # of what trust remembers, with each new prediction
# Above this trust, a draft is worth making for what the model says behind it, even if it is wrong itself.
TRUSTED = 0.25


@dataclass
class Trust:
    """How good the model's own predictions behind wrong guesses are. That lies in how it was trained, so one
    record serves all rows and outlives episodes."""

    right: float = 1.0
    judged: float = 2.0

    def judge(self, closeness: float) -> None:
        """Of one prediction, once the integer is known."""
        self.right, self.judged = FADE * self.right + closeness, FADE * self.judged + 1

    @property
    def share(self) -> float:
        """In [0, 1]; compares with the mean closeness of other guesses."""
        return self.right / self.judged


class Drafter:
    """Drafts one row's answers; remembers its last one.

    Args:
        grammar: of the answers; `count` = timesteps × dim integers.
        dim: integers per timestep (D).
        length: most symbols of a draft.
        worth: a symbol is drafted only if all before it are right with at least this chance: what one more
            symbol costs in a pass, in passes that a right one saves. 0 always drafts `length`.
        trust: shared with other rows; None starts one of its own.
    """

    def __init__(
        self,
        grammar: IntegerGrammar,
        dim: int,
        length: int,
        worth: float = 0.0,
        trust: Trust | None = None,
    ) -> None:
        self.grammar, self.dim, self.length, self.worth = grammar, dim, length, worth
        self.trust = Trust() if trust is None else trust
        self.reset()

    def reset(self) -> None:
        """Forgets the last answer. Call when the next one will have nothing to do with it."""
        self.previous: list[int] = []  # what the last answer said of the timesteps that are now asked for
        self.history: list[int] = []  # the last timesteps before those, at most two
        self.start()

    def start(self) -> None:
        """Call before each answer."""
        self.own: dict[int, int] = {}  # the model's own predictions of coming integers
        self.behind: dict[int, int] = {}  # those that it made behind a wrong guess, until they are known
        # An integer whose first digits the last pass has settled, completed as close to its draft as can be.
        self.settled: tuple[int, int] | None = None

    def remember(self, integers: list[int], executed: int) -> None:
        """Keeps an answer of which `executed` timesteps will have been acted on when the next is asked
        for."""
        past = (self.history + integers[: executed * self.dim])[-2 * self.dim :]
        self.history, self.previous = past, integers[executed * self.dim :]

    def draft(self, text: Text, needed: int) -> list[int]:
        """Symbols that may follow, at most `length` and no further than `needed` integers."""
        for slot in [slot for slot in self.behind if slot < len(text.integers)]:
            self.trust.judge(_closeness(self.behind.pop(slot), text.integers[slot]))
        trusted = self.trust.share >= max(TRUSTED, self.worth)
        text, symbols, chance = text.copy(), [], 1.0
        while len(symbols) < self.length and len(text.integers) < needed:
            guess, right = self._guess(text.integers)
            if not trusted and (chance < self.worth or right <= PRIOR["middle"]):
                break
            more = self.grammar.spell(self.grammar.nearest(guess, text.value), text)
            for symbol in more:
                self.grammar.write(text, symbol)
            symbols += more
            chance *= right
        return symbols[: self.length]

    def learn(self, text: Text, draft: list[int], predicted: list[int]) -> None:
        """Takes over the model's own predictions.

        Args:
            text: what was written before the draft.
            draft: symbols that were verified.
            predicted: the model's symbol at the place of each of them.
        """
        text, self.settled, wrong = text.copy(), None, False
        own: Text | None = None  # the current integer as the model would have it, from its first other symbol
        near = Text()  # the same up to that symbol
        for symbol, its in zip(draft, predicted, strict=True):
            if own is None and its != symbol:
                own = text.copy()
                self.grammar.write(own, its)
                near = own.copy()
            elif own is not None and own.value >= 0 and self.grammar.allowed(own)[its]:
                self.grammar.write(own, its)
            self.grammar.write(text, symbol)
            if text.value >= 0:
                continue
            # An integer is complete.
            slot, drafted = len(text.integers) - 1, text.integers[-1]
            if own is None:
                self.own[slot] = drafted
            else:
                # What the model has not finished at the draft's separator is completed as the draft has it.
                self.own[slot] = self._complete(own, slot, drafted)
                if not wrong:
                    self.settled = slot, self._complete(near, slot, drafted)
            if wrong:
                self.behind[slot] = self.own[slot]
            wrong, own = wrong or own is not None, None

    def _complete(self, text: Text, slot: int, drafted: int) -> int:
        return text.integers[slot] if slot < len(text.integers) else self.grammar.nearest(drafted, text.value)

    def _guess(self, integers: list[int]) -> tuple[int, float]:
        """The next integer, from those before it, and its chance to be right."""
        slot = len(integers)
        if self.settled is not None and slot == self.settled[0] and self.trust.share < TRUSTED:
            return self.settled[1], PRIOR["linear"]
        best = (0.0, PRIOR["middle"], self.grammar.maximum // 2)
        for name, value in self._sources(slot, integers).items():
            # Its record in this dimension.
            score, right, count = PRIOR[name], PRIOR[name], 1
            for earlier in range(slot - self.dim, max(-1, slot - LOOK_BACK * self.dim - 1), -self.dim):
                before = self._sources(earlier, integers).get(name)
                if before is not None:
                    score += _closeness(before, integers[earlier])
                    right, count = right + (before == integers[earlier]), count + 1
            best = max(best, (score / count, right / count, value))
        if slot in self.own and self.trust.share >= best[0]:
            return self.own[slot], self.trust.share
        return best[2], best[1]

    def _sources(self, slot: int, integers: list[int]) -> dict[str, int]:
        known, place = self.history + integers, slot + len(self.history)
        result = {}
        if slot < len(self.previous):
            result["previous"] = self.previous[slot]
        if place >= self.dim:
            result["copy"] = last = known[place - self.dim]
            if place >= 2 * self.dim:
                result["linear"] = min(max(2 * last - known[place - 2 * self.dim], 0), self.grammar.maximum)
        return result


def _closeness(guess: int, true: int) -> float:
    """Wrong is wrong; being near may save a digit or two."""
    return 1.0 if guess == true else max(0.0, 0.5 - abs(guess - true) / 100)
