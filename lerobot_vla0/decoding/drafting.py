"""Drafts for speculative decoding: guesses of an answer's next symbols. The decoder verifies every one, so a
wrong guess costs time, never correctness.

Robot actions are smooth: a timestep's integers are close to those of the timestep before. And a pass that
rejects a symbol still yields what the model predicts *after* it. A model trained with masked actions depends
little on its own numbers, so that it mostly predicts the same once the symbol is corrected: its predictions
make a good next draft (Jacobi decoding, Santilli et al., 2023), and even a wrong draft is worth making.
"""

from dataclasses import dataclass

from .grammar import IntegerGrammar, PartialAnswer

# Probability that a guess is right, assumed before there is evidence, by its source: the last answer for the
# same timestep, the timestep before, the last two timesteps extrapolated, and the middle of the range, where
# nothing is known.
PRIOR = {"previous": 0.7, "copy": 0.5, "linear": 0.3, "middle": 0.02}
LOOK_BACK = 3  # timesteps on which sources are compared
DECAY = 0.9  # of the weight of an acceptance rate's older evidence, with each new prediction
# From this acceptance rate on, a draft is worth making for the predictions after it, even if it is rejected.
RELIABLE = 0.25


@dataclass
class AcceptanceRate:
    """Running mean of how good the model's predictions after a rejected symbol turn out to be. It depends on
    how the model was trained, so all rows and episodes share one."""

    accepted: float = 1.0
    total: float = 2.0

    def update(self, score: float) -> None:
        """Counts one prediction, with a score in [0, 1] from `_score`."""
        self.accepted, self.total = DECAY * self.accepted + score, DECAY * self.total + 1

    @property
    def value(self) -> float:
        return self.accepted / self.total


class Drafter:
    """Drafts the answers of one row, one answer after the other.

    Args:
        grammar: of the answers; its `count` is timesteps × dim.
        dim: integers per timestep (D).
        length: most symbols of a draft.
        worth: in 0..1; an integer is drafted only if all drafted before it are right with at least this
            estimated probability. Set it to the cost of one more symbol in a pass, relative to what an
            accepted one saves.
        acceptance: rate shared with other rows; None makes a new one.
    """

    def __init__(
        self,
        grammar: IntegerGrammar,
        dim: int,
        length: int,
        worth: float = 0.0,
        acceptance: AcceptanceRate | None = None,
    ) -> None:
        self.grammar, self.dim, self.length, self.worth = grammar, dim, length, worth
        self.acceptance = AcceptanceRate() if acceptance is None else acceptance
        self.reset()

    def reset(self) -> None:
        """Forgets the last answer. Call when the next one is unrelated to it (a new episode)."""
        self.previous: list[int] = []  # the last answer's integers, from the next answer's first timestep on
        self.history: list[int] = []  # at most two timesteps before those
        self.start()

    def start(self) -> None:
        """Call before each answer."""
        # The model's predictions of integers, by index in the answer.
        self.predictions: dict[int, int] = {}
        # Those made after a rejected symbol, until the integer is known and they can be scored.
        self.unverified: dict[int, int] = {}
        # Index and value of the integer with the last rejected symbol: that symbol replaced by the model's,
        # the digits after it as close to the draft as possible.
        self.corrected: tuple[int, int] | None = None

    def remember(self, integers: list[int], executed: int) -> None:
        """Keeps an answer as a source for the next one, which begins `executed` timesteps later."""
        past = (self.history + integers[: executed * self.dim])[-2 * self.dim :]
        self.history, self.previous = past, integers[executed * self.dim :]

    def expect(self, integers: list[int]) -> None:
        """Takes these for the last answer, from the next answer's first timestep on."""
        self.history, self.previous = [], integers

    def draft(self, answer: PartialAnswer, needed: int) -> list[int]:
        """Symbols that may follow the answer: at most `length`, and not beyond `needed` integers."""
        for index in [index for index in self.unverified if index < len(answer.integers)]:
            self.acceptance.update(_score(self.unverified.pop(index), answer.integers[index]))
        reliable = self.acceptance.value >= max(RELIABLE, self.worth)
        answer, symbols, reached = answer.copy(), [], 1.0
        while len(symbols) < self.length and len(answer.integers) < needed:
            guess, probability = self._guess(answer.integers)
            if not reliable and (reached < self.worth or probability <= PRIOR["middle"]):
                break
            spelled = self.grammar.spell(self.grammar.nearest(guess, answer.value), answer)
            self.grammar.append(answer, *spelled)
            symbols += spelled
            reached *= probability
        return symbols[: self.length]

    def learn(self, answer: PartialAnswer, draft: list[int], predicted: list[int]) -> None:
        """Keeps the model's predictions of the integers in a verified draft.

        Args:
            answer: before the draft.
            draft: the drafted symbols.
            predicted: the model's symbol in place of each of them; what comes after is ignored.
        """
        self.corrected, answer, begin = None, answer.copy(), 0
        accepted = next((i for i in range(len(draft)) if predicted[i] != draft[i]), len(draft))
        for end, symbol in enumerate(draft, 1):
            if symbol not in (self.grammar.space, self.grammar.end):
                continue
            # draft[begin:end] completes an integer.
            before = answer.copy()
            self.grammar.append(answer, *draft[begin:end])
            index, drafted = len(answer.integers) - 1, answer.integers[-1]
            self.predictions[index] = self._read_integer(before, predicted[begin:end], drafted)
            if accepted < begin:
                self.unverified[index] = self.predictions[index]
            elif accepted < end:
                self.corrected = index, self._read_integer(before, predicted[begin : accepted + 1], drafted)
            begin = end

    def _read_integer(self, answer: PartialAnswer, symbols: list[int], drafted: int) -> int:
        """The answer's next integer as predicted symbols spell it. After a rejected symbol they may break the
        grammar: such symbols are skipped. Missing digits are chosen as close to `drafted` as possible."""
        index, answer = len(answer.integers), answer.copy()
        for symbol in symbols:
            if len(answer.integers) == index and self.grammar.allowed(answer)[symbol]:
                self.grammar.append(answer, symbol)
        complete = len(answer.integers) > index
        return answer.integers[index] if complete else self.grammar.nearest(drafted, answer.value)

    def _guess(self, integers: list[int]) -> tuple[int, float]:
        """The integer that follows `integers`, and the probability that this is right."""
        index = len(integers)
        # Where predictions after a rejected symbol are unreliable, only the replaced symbol itself counts.
        if self.corrected and index == self.corrected[0] and self.acceptance.value < RELIABLE:
            return self.corrected[1], PRIOR["linear"]
        best = (0.0, PRIOR["middle"], self.grammar.maximum // 2)  # mean score, share that was right, integer
        for source, guess in self._sources(index, integers).items():
            # How good this source was for the last timesteps of the same dimension.
            score, right, count = PRIOR[source], PRIOR[source], 1
            for earlier in range(index - self.dim, max(-1, index - LOOK_BACK * self.dim - 1), -self.dim):
                past = self._sources(earlier, integers).get(source)
                if past is not None:
                    score += _score(past, integers[earlier])
                    right, count = right + (past == integers[earlier]), count + 1
            best = max(best, (score / count, right / count, guess))
        if index in self.predictions and self.acceptance.value >= best[0]:
            return self.predictions[index], self.acceptance.value
        return best[2], best[1]

    def _sources(self, index: int, integers: list[int]) -> dict[str, int]:
        """What the sources in `PRIOR` say of the integer at `index`, as far as each has data."""
        known, place = self.history + integers, index + len(self.history)
        guesses = {}
        if index < len(self.previous):
            guesses["previous"] = self.previous[index]
        if place >= self.dim:
            guesses["copy"] = last = known[place - self.dim]
            if place >= 2 * self.dim:
                guesses["linear"] = min(max(2 * last - known[place - 2 * self.dim], 0), self.grammar.maximum)
        return guesses


def _score(guess: int, true: int) -> float:
    """1 for a right guess; up to 0.5 for a near one, whose first digits may be accepted."""
    return 1.0 if guess == true else max(0.0, 0.5 - abs(guess - true) / 100)
