"""Constrained greedy decoding with speculative drafts: a causal LM writes answers of a grammar with
several tokens per pass. Deals with tokens and logits only, not with images or robots.

The output is, at each step, the argmax of the model's logits over the tokens that the grammar allows (ties:
lowest token id), without repetition penalty or sampling, whatever the model's `generation_config` says. A
draft guesses the next tokens. One forward pass yields the logits after each drafted token; the longest prefix
of the draft that equals the model's own choices is accepted, and the model's choice after it is a further
token (Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023; here drafts come
from heuristics, not from a draft model). Drafts change the number of passes, never the tokens.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ..action_text import IntegerGrammar, PartialAnswer
from .drafting import Drafter


class Model(Protocol):
    """A causal LM with a KV cache for R prompts. Both methods feed tokens and return logits of the grammar's
    symbols, (R, at least 1 + longest draft, 12): before a row's first drafted token, then after each of them.
    Logits beyond a row's own draft are not read."""

    def start(self, drafts: list[list[int]]) -> np.ndarray:
        """Feeds the prompts, each followed by its drafted tokens."""

    def extend(self, accepted: list[int], tokens: list[list[int]]) -> np.ndarray:
        """Drops from the cache all but the first `accepted[r]` of the tokens last fed to row r, and feeds
        `tokens[r]`: the model's choice after them, which is not in the cache yet, and a draft. A row without
        tokens is finished; its logits are not read."""


@dataclass
class Decoded:
    rows: list["Row"]
    passes: int = 0  # forward passes of the model, including the one over the prompt

    @property
    def integers(self) -> list[list[int]]:
        """The complete integers of each of the R rows."""
        return [row.answer.integers for row in self.rows]


@torch.inference_mode()
def decode(
    model: Model,
    grammar: IntegerGrammar,
    rows: int,
    *,
    count: int | None = None,
    drafters: list[Drafter] | None = None,
    prefixes: list[list[int]] | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Decoded:
    """Decodes R answers.

    Args:
        model: the LM with R prompts.
        grammar: of the answers.
        rows: R, number of prompts.
        count: integers to decode per row; None decodes whole answers. The last pass may give a row more.
        drafters: one per row; None feeds one token per pass, even where the grammar leaves no choice.
        prefixes: integers that each row's answer begins with, at most `count`; the model continues them. They
            are fed with the prompt and take no pass of their own.
        temperature: 0 takes the argmax; above 0 samples from softmax(logits / temperature) over the allowed
            symbols.
        generator: CPU random generator for sampling; None uses PyTorch's default one.
    """
    needed = grammar.count if count is None else count
    drafters, prefixes = drafters or [None] * rows, prefixes or [[]] * rows
    result = Decoded([Row(grammar, needed, *row) for row in zip(drafters, prefixes, strict=True)])
    if all(row.done for row in result.rows):
        return result
    logits = model.start([row.tokens for row in result.rows])
    logits = [logits[i, len(row.symbols) :] for i, row in enumerate(result.rows)]  # behind each prefix
    while True:
        result.passes += 1
        accepted = [row.verify(logits[i], temperature, generator) for i, row in enumerate(result.rows)]
        if all(row.done for row in result.rows):
            return result
        logits = model.extend(accepted, [row.tokens for row in result.rows])


class Row:
    """One prompt's answer, its symbols so far, and the draft that the next pass verifies."""

    def __init__(
        self, grammar: IntegerGrammar, needed: int, drafter: Drafter | None, prefix: list[int]
    ) -> None:
        self.grammar, self.needed, self.drafter = grammar, needed, drafter
        self.answer, self.symbols = PartialAnswer(), []
        for integer in prefix:
            self._extend_answer(grammar.spell(integer, self.answer))
        # How many symbols of the answer are not in the KV cache yet: the prefix; later, the model's own
        # choice after the last draft.
        self.pending = len(self.symbols)
        self.draft = [] if self.done else self._next_draft()

    @property
    def done(self) -> bool:
        return len(self.answer.integers) >= self.needed

    @property
    def tokens(self) -> list[int]:
        """Token ids for the next pass: symbols that are not in the KV cache yet, and the draft."""
        pending = self.symbols[len(self.symbols) - self.pending :]
        return [] if self.done else [self.grammar.token_ids[s] for s in pending + self.draft]

    def verify(self, logits: np.ndarray, temperature: float, generator: torch.Generator | None) -> int:
        """Verifies the draft, extends the answer and makes the next draft.

        Args:
            logits: (at least 1 + length of the draft, 12), before the first drafted symbol and after each.

        Returns:
            how many of the tokens of the last pass are part of the answer.
        """
        if self.done:
            return 0
        accepted, predicted, answer = 0, [], self.answer.copy()
        for i, drafted in enumerate([*self.draft, None]):
            if self.grammar.finished(answer):
                break
            scores = np.where(self.grammar.allowed(answer), logits[i], -np.inf)
            symbol = int(scores.argmax())  # of the first NaN, if there is one
            # Predictions after a rejected symbol only serve the next draft.
            verifying = accepted == i
            if verifying and not math.isfinite(scores[symbol]):
                raise ValueError(
                    f"the model's logits are {logits[i].tolist()}: no token can be chosen. Its weights or "
                    "its inputs hold NaN or inf, or dtype=float16 overflows (set dtype=bfloat16)."
                )
            if verifying and temperature > 0:
                symbol = _sample(scores, drafted, temperature, generator)
            predicted.append(symbol)
            if drafted is not None:
                accepted += verifying and symbol == drafted
                self.grammar.append(answer, drafted)
        if self.drafter is not None:
            self.drafter.learn(self.answer, self.draft, predicted)
        num_cached, self.pending = self.pending + accepted, 1
        self._extend_answer(predicted[: accepted + 1])
        if self.drafter is not None and not self.done:
            # If the grammar forces all of the rest, no further pass is needed.
            rest, answer = self._forced(self.answer)
            if len(answer.integers) >= self.needed:
                self._extend_answer(rest)
        if not self.done:
            self.draft = self._next_draft()
        return num_cached

    def _extend_answer(self, symbols: list[int]) -> None:
        self.grammar.append(self.answer, *symbols)
        self.symbols += symbols

    def _next_draft(self) -> list[int]:
        """The drafter's symbols, and those that the grammar forces after them."""
        if self.drafter is None:
            return []
        draft, answer = self.drafter.draft(self.answer, self.needed), self.answer.copy()
        self.grammar.append(answer, *draft)
        return draft + self._forced(answer)[0]

    def _forced(self, answer: PartialAnswer) -> tuple[list[int], PartialAnswer]:
        """Symbols that the grammar forces after an answer, up to `needed` integers; the answer with them."""
        symbols, answer = [], answer.copy()
        while len(answer.integers) < self.needed and (symbol := self.grammar.forced(answer)) is not None:
            symbols.append(symbol)
            self.grammar.append(answer, symbol)
        return symbols, answer


def _sample(
    scores: np.ndarray, drafted: int | None, temperature: float, generator: torch.Generator | None
) -> int:
    """One symbol from the softmax of the scores, -inf where a symbol is not allowed. The drafted symbol is
    accepted with its probability; otherwise one of the others is drawn in proportion to theirs. Both together
    are exactly the softmax."""
    # First the difference: a small temperature must not make the largest score infinite.
    with np.errstate(over="ignore"):
        weights = np.exp((scores.astype(np.float64) - scores.max()) / temperature)
    weights /= weights.sum()
    if drafted is not None:
        if torch.rand((), generator=generator, dtype=torch.float64).item() < weights[drafted]:
            return drafted
        weights[drafted] = 0.0
        weights /= weights.sum()
    return int(torch.multinomial(torch.from_numpy(weights), 1, generator=generator).item())
