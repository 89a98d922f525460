"""Constrained decoding of a causal LM under a grammar, several tokens per forward pass. Knows tokens and
logits; nothing of images or robots.

The definition of VLA-0 decoding here: at each step the argmax of the model's logits over the tokens that the
grammar allows (ties: lowest token id). No repetition penalty and no sampling, whatever the model's
`generation_config` says. Drafts change the number of passes, never the tokens (Leviathan et al., "Fast
Inference from Transformers via Speculative Decoding", 2023; here drafts cost no model of their own).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from .drafting import Drafter
from .grammar import IntegerGrammar, Text


class Model(Protocol):
    """A causal LM behind R prompts. Logits are (R, at least 1 + longest draft, 12): of the grammar's symbols,
    after the last certain token of each row and after each of its drafted ones."""

    def start(self, drafts: list[list[int]]) -> np.ndarray:
        """Feeds the prompts, each followed by its drafted tokens."""

    def extend(self, kept: list[int], tokens: list[list[int]]) -> np.ndarray:
        """Keeps the first `kept[r]` tokens that were fed to row r last time, and feeds `tokens[r]`: a certain
        one and drafted ones. Rows without tokens are finished; their logits do not matter."""


@dataclass
class Decoded:
    rows: list["Row"]
    passes: int = 0  # forward passes of the model, the prompt's included

    @property
    def integers(self) -> list[list[int]]:
        """R lists of the integers that are finished so far."""
        return [row.text.integers for row in self.rows]


def decode(model: Model, grammar: IntegerGrammar, rows: int, **settings: Any) -> Decoded:
    """Writes until every row has the integers that are needed. Arguments and errors of `decode_stream`."""
    *_, decoded = decode_stream(model, grammar, rows, **settings)
    return decoded


@torch.inference_mode()
def decode_stream(
    model: Model,
    grammar: IntegerGrammar,
    rows: int,
    *,
    count: int | None = None,
    drafters: list[Drafter] | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Iterator[Decoded]:
    """Yields, after each pass, the same object with what is written so far.

    Args:
        model: behind the prompts.
        grammar: what may be written.
        rows: R, how many prompts.
        count: integers needed; fewer than `grammar.count` stops early. None writes the whole text.
        drafters: one per row; None feeds one token a pass, even those that the grammar forces.
        temperature: 0 takes the argmax, above 0 samples from softmax(logits / temperature) over allowed
            symbols.
        generator: of the sampling, on the CPU.

    Raises:
        ValueError: `count` or `temperature` out of range.
    """
    needed = grammar.count if count is None else count
    if not 1 <= needed <= grammar.count:
        raise ValueError(f"count must be in 1..{grammar.count}, got {needed}.")
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}.")
    result = Decoded([Row(grammar, needed, drafters[i] if drafters else None) for i in range(rows)])

    def token_ids(symbols: list[int]) -> list[int]:
        return [grammar.token_ids[s] for s in symbols]

    logits = model.start([token_ids(row.draft) for row in result.rows])
    while True:
        result.passes += 1
        kept = [row.read(logits[i], temperature, generator) for i, row in enumerate(result.rows)]
        yield result
        if all(row.done for row in result.rows):
            return
        logits = model.extend(kept, [token_ids(row.pending + row.draft) for row in result.rows])


class Row:
    """One row's text, and what is fed next: a certain symbol that the model has not seen, and a draft."""

    def __init__(self, grammar: IntegerGrammar, needed: int, drafter: Drafter | None) -> None:
        self.grammar, self.needed, self.drafter = grammar, needed, drafter
        self.text, self.symbols = Text(), []
        self.pending: list[int] = []
        self.draft = self._propose()

    @property
    def done(self) -> bool:
        return len(self.text.integers) >= self.needed

    def read(self, logits: np.ndarray, temperature: float, generator: torch.Generator | None) -> int:
        """Takes over what the model says, (places, 12) logits, and drafts anew. Returns how many of the
        tokens that were fed hold."""
        if self.done:
            return 0
        new, predicted, walk = [], [], self.text.copy()
        # What the model says behind the first difference only serves the next draft.
        agreed = True
        for place in range(len(self.draft) + 1):
            guess = self.draft[place] if place < len(self.draft) else None
            allowed = self.grammar.allowed(walk)
            if temperature > 0 and agreed:
                symbol = _sample(logits[place], allowed, guess, temperature, generator)
            else:
                symbol = int(np.where(allowed, logits[place], -np.inf).argmax())
            predicted.append(symbol)
            if agreed:
                new.append(symbol)
            agreed = agreed and symbol == guess
            if guess is None:
                break
            self.grammar.write(walk, guess)
            if self.grammar.finished(walk):
                break
        accepted = sum(a == b for a, b in zip(new, self.draft, strict=False))
        if self.drafter is not None:
            self.drafter.learn(self.text, self.draft, predicted[: len(self.draft)])
        kept = len(self.pending) + accepted
        self.pending = new[accepted:]
        self._write(new)
        if self.drafter is not None and not self.done:
            # A text whose rest is forced needs no further pass.
            rest = self._forced([])
            after = self.text.copy()
            for symbol in rest:
                self.grammar.write(after, symbol)
            if len(after.integers) >= self.needed:
                self._write(rest)
        if self.done:
            self.pending, self.draft = [], []
        else:
            self.draft = self._propose()
        return kept

    def _write(self, symbols: list[int]) -> None:
        for symbol in symbols:
            self.grammar.write(self.text, symbol)
        self.symbols += symbols

    def _propose(self) -> list[int]:
        """The drafter's symbols, and those that the grammar forces behind them, which cost nothing."""
        if self.drafter is None:
            return []
        draft = self.drafter.draft(self.text, self.needed)
        return draft + self._forced(draft)

    def _forced(self, draft: list[int]) -> list[int]:
        """The symbols that must follow a draft."""
        text, forced = self.text.copy(), []
        for symbol in draft:
            self.grammar.write(text, symbol)
        while len(text.integers) < self.needed and (symbol := self.grammar.forced(text)) is not None:
            forced.append(symbol)
            self.grammar.write(text, symbol)
        return forced


def _sample(
    logits: np.ndarray,
    allowed: np.ndarray,
    guess: int | None,
    temperature: float,
    generator: torch.Generator | None,
) -> int:
    """One symbol from the softmax over allowed ones. A guess is taken with its own probability, else the
    others share the draw: together exactly the softmax, and the guess holds as often as it can."""
    scores = np.where(allowed, logits.astype(np.float64) / temperature, -np.inf)
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    if guess is not None:
        if torch.rand((), generator=generator, dtype=torch.float64).item() < weights[guess]:
            return guess
        weights[guess] = 0.0
        weights /= weights.sum()
    return int(torch.multinomial(torch.from_numpy(weights), 1, generator=generator).item())
