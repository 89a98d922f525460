"""Drafts for speculative decoding: guesses of an answer's next symbols. The engine verifies every one, so a
wrong guess costs time, never correctness.

Robot actions are smooth: a timestep's integers are close to those of the timestep before. And a pass that
rejects a symbol still yields what the model predicts *after* it. A model trained with masked actions depends
little on its own numbers, and mostly predicts the same once the symbol is corrected: its predictions make a
good next draft (Jacobi decoding, Santilli et al., 2023), so that even a rejected draft pays.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..action_text import IntegerGrammar, PartialAnswer

# Where guesses come from: what the model predicted after a rejected symbol, the last answer for the same
# timestep, the timestep before, the last two timesteps extrapolated. {source: (probability that a guess is
# right, assumed before there is evidence; how many guesses that assumption counts for; decay of older
# evidence with each new guess)}. Predictions are much better in some situations than in others; the other
# sources mostly differ between policies.
SOURCES = {
    "predicted": (0.5, 2, 0.97), "previous": (0.5, 10, 0.995), "copy": (0.4, 10, 0.995),
    "linear": (0.2, 10, 0.995),
}  # fmt: skip
NO_EVIDENCE = 0.02  # probability that the middle of the range is right, the guess where no source has data
LOOK_BACK = 3  # timesteps of the answer on which sources are compared, besides all earlier evidence
# From this acceptance rate on, a draft pays through the predictions after it, even if it is rejected.
RELIABLE = 0.25


@dataclass
class AcceptanceRate:
    """Running means of how good the guesses of one source turn out to be. That depends on the policy and on
    how often it replans, so all rows and episodes share them."""

    score: float  # mean score, in 0..1, see `_score`
    right: float  # share of guesses that were right
    total: float  # guesses counted, older ones less
    decay: float

    def update(self, guess: int, true: int) -> None:
        old = self.decay * self.total
        self.total = old + 1
        self.score = (old * self.score + _score(guess, true)) / self.total
        self.right = (old * self.right + (guess == true)) / self.total


def initial_rates() -> dict[str, AcceptanceRate]:
    """The rates of all sources, before there is evidence."""
    return {source: AcceptanceRate(prior, prior, *more) for source, (prior, *more) in SOURCES.items()}


class Drafter:
    """Drafts one row's answer.

    Args:
        grammar: of the answers; its `count` is timesteps × dim.
        dim: integers per timestep (D).
        length: most symbols of a draft.
        token_cost: in 0..1, cost of one more symbol in a pass, relative to what an accepted one saves. An
            integer is drafted only if all before it are right with at least this estimated probability.
        rates: of `initial_rates`, shared with other rows; None makes new ones.
        previous: the last answer's integers, from this answer's first timestep on.
        history: at most two timesteps before those.
    """

    def __init__(
        self,
        grammar: IntegerGrammar,
        dim: int,
        length: int,
        token_cost: float = 0.0,
        rates: dict[str, AcceptanceRate] | None = None,
        previous: Sequence[int] = (),
        history: Sequence[int] = (),
    ) -> None:
        self.grammar, self.dim, self.length, self.token_cost = grammar, dim, length, token_cost
        self.rates = initial_rates() if rates is None else rates
        self.previous, self.history = list(previous), list(history)
        self.counted = 0  # integers of the answer that the sources have been compared with
        # The model's predictions of integers, by index in the answer.
        self.predictions: dict[int, int] = {}
        # Those made after a rejected symbol, until the integer is known and they can be scored.
        self.unverified: dict[int, int] = {}
        # Index and value of the integer with the last rejected symbol: that symbol replaced by the model's,
        # the digits after it as close to the draft as possible.
        self.corrected: tuple[int, int] | None = None

    def draft(self, answer: PartialAnswer, needed: int) -> list[int]:
        """Symbols that may follow the answer: at most `length`, and not beyond `needed` integers."""
        self._count(answer.integers)
        reliable = self.rates["predicted"].score >= max(RELIABLE, self.token_cost)
        answer, symbols, reached = answer.copy(), [], 1.0
        while len(symbols) < self.length and len(answer.integers) < needed:
            guess, probability = self._guess(answer.integers)
            if not reliable and (reached < self.token_cost or probability <= NO_EVIDENCE):
                break
            spelled = self.grammar.spell(self.grammar.nearest(guess, answer.value), answer)
            self.grammar.append(answer, *spelled)
            symbols += spelled
            reached *= probability
        return symbols[: self.length]

    def _count(self, integers: list[int]) -> None:
        """Updates the rates with the sources' guesses of the answer's new integers."""
        for index in range(self.counted, len(integers)):
            guesses = self._sources(index, integers)
            if index in self.unverified:
                guesses["predicted"] = self.unverified.pop(index)
            for source, guess in guesses.items():
                self.rates[source].update(guess, integers[index])
        self.counted = len(integers)

    def learn(self, answer: PartialAnswer, draft: list[int], predicted: list[int]) -> None:
        """Stores the model's predictions of the integers in a verified draft.

        Args:
            answer: before the draft.
            draft: the drafted symbols.
            predicted: the model's symbol where each of them was drafted; further ones are ignored.
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
        predicted = self.rates["predicted"].score
        if self.corrected and index == self.corrected[0]:
            # The model has read all digits before the rejected one.
            if predicted < RELIABLE:
                return self.corrected[1], self.rates["linear"].right
            return self.predictions[index], predicted
        best = (0.0, NO_EVIDENCE, self.grammar.maximum // 2)  # mean score, share that was right, integer
        for source, guess in self._sources(index, integers).items():
            # How good this source was so far, counted as one guess, and for the last timesteps of the same
            # dimension.
            score, right, count = self.rates[source].score, self.rates[source].right, 1
            for earlier in range(index - self.dim, max(-1, index - LOOK_BACK * self.dim - 1), -self.dim):
                past = self._sources(earlier, integers).get(source)
                if past is not None:
                    score += _score(past, integers[earlier])
                    right, count = right + (past == integers[earlier]), count + 1
            best = max(best, (score / count, right / count, guess))
        if index in self.predictions and predicted >= best[0]:
            return self.predictions[index], predicted
        return best[2], best[1]

    def _sources(self, index: int, integers: list[int]) -> dict[str, int]:
        """The guesses of the integer at `index` of all sources that have data, without the model's
        predictions."""
        known, position = self.history + integers, index + len(self.history)
        guesses = {}
        if index < len(self.previous):
            guesses["previous"] = self.previous[index]
        if position >= self.dim:
            guesses["copy"] = last = known[position - self.dim]
            if position >= 2 * self.dim:
                guesses["linear"] = min(
                    max(2 * last - known[position - 2 * self.dim], 0), self.grammar.maximum
                )
        return guesses


def _score(guess: int, true: int) -> float:
    """1 for a right guess; up to 0.5 for a near one, whose first digits may be accepted."""
    return 1.0 if guess == true else max(0.0, 0.5 - abs(guess - true) / 100)
