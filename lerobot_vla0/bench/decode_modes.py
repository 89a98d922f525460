"""The ways of writing a chunk that `bench decode` compares: Transformers' `generate` and ours."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from .. import backbone
from ..decoding import engine as decoding
from ..decoding.drafting import Drafter
from ..decoding.grammar import IntegerGrammar, PartialAnswer
from ..modeling_vla0 import VLA0Policy
from .models import synchronize

MODES = {
    "generate": "Transformers' generate, digits and space allowed (as TinyVLA)",
    "generate_grammar": "Transformers' generate, exact grammar",
    "prompt_lookup": "Transformers' generate, exact grammar, prompt lookup",
    "plain": "ours, one token a pass",
    "forced": "ours, forced tokens ride along",
    "drafts": "ours, drafts verified (what the policy does)",
}
# Added to the logit of the token that is to be said.
BIAS = 1e4
# Tokens that prompt lookup proposes at once.
PROMPT_LOOKUP_TOKENS = 16


@dataclass
class Chunk:
    """One prompt, and what is said to it: a given text, or (None) what the model says by itself."""

    inputs: dict[str, Any]  # one row of a policy's batch
    integers: list[int] | None = None
    previous: list[int] | None = None  # the chunk one timestep before


@dataclass
class Run:
    integers: list[list[int]]
    passes: int
    seconds: float


def write(policy: VLA0Policy, mode: str, chunks: list[Chunk], masked: bool, length: int | None) -> Run:
    """Writes a batch of chunks."""
    if mode in ("plain", "forced", "drafts"):
        return _write_ours(policy, mode, chunks, masked, length)
    return _write_generate(policy, mode, chunks, masked)


def _inputs(policy: VLA0Policy, chunks: list[Chunk]) -> dict[str, Any]:
    keys = [*policy.config.camera_keys, "observation.state"]
    batch = {key: torch.cat([c.inputs[key] for c in chunks]) for key in keys if key in chunks[0].inputs}
    return policy.examples.acting_inputs(batch | {"task": [c.inputs["task"][0] for c in chunks]})


def _texts(policy: VLA0Policy, chunks: list[Chunk]) -> list[list[int]]:
    return [symbols_of(policy.grammar, chunk.integers) for chunk in chunks if chunk.integers is not None]


def _model(policy: VLA0Policy, chunks: list[Chunk], inputs: dict[str, Any], masked: bool) -> decoding.Model:
    cache, texts = policy.prompt_cache(inputs), _texts(policy, chunks)
    return Following(cache, policy.grammar, texts, masked) if texts else cache


def _write_ours(policy: VLA0Policy, mode: str, chunks: list[Chunk], masked: bool, length: int | None) -> Run:
    drafters: list[Drafter] | None = None
    if mode != "plain":
        drafters = [policy.make_drafter(rows=len(chunks)) for _ in chunks]
        if mode == "forced" or length is not None:
            length = 0 if mode == "forced" else length
            drafters = [Drafter(policy.grammar, policy.action_dim, length) for _ in chunks]
        for drafter, chunk in zip(drafters, chunks, strict=True):
            if chunk.previous is not None:
                drafter.remember(chunk.previous, executed=1)
            drafter.start()
    inputs = _inputs(policy, chunks)
    synchronize(policy)
    start = time.perf_counter()
    model = _model(policy, chunks, inputs, masked)
    decoded = decoding.decode(model, policy.grammar, len(chunks), drafters=drafters)
    return Run(
        [integers[: policy.grammar.count] for integers in decoded.integers],
        decoded.passes,
        time.perf_counter() - start,
    )


@torch.inference_mode()
def _write_generate(policy: VLA0Policy, mode: str, chunks: list[Chunk], masked: bool) -> Run:
    inputs, texts = _inputs(policy, chunks), _texts(policy, chunks)
    grammar = policy.grammar
    left = _left_padded(inputs, policy.chat.pad_id)
    prompt = left["input_ids"].shape[1]
    processors: list[LogitsProcessor] = []
    if texts:
        processors.append(Follow(grammar, texts, prompt, masked))
    restrict = DigitsAndSpaces if mode == "generate" else ExactGrammar
    processors.append(restrict(grammar, prompt))
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=grammar.max_tokens,
        eos_token_id=grammar.token_ids[grammar.end],
        pad_token_id=policy.chat.pad_id,
    )
    if mode == "prompt_lookup":
        settings.prompt_lookup_num_tokens, settings.max_matching_ngram_size = PROMPT_LOOKUP_TOKENS, 2
    passes = [0]
    counter = backbone.language_model(policy.model).register_forward_pre_hook(
        lambda *_: passes.__setitem__(0, passes[0] + 1)
    )
    # `generate` fills what a config leaves open from the model's own (repetition penalty, sampling).
    own, policy.model.generation_config = policy.model.generation_config, GenerationConfig()
    try:
        synchronize(policy)
        start = time.perf_counter()
        written = policy.model.generate(
            **left, generation_config=settings, logits_processor=LogitsProcessorList(processors)
        )[:, prompt:].tolist()
        seconds = time.perf_counter() - start
    finally:
        counter.remove()
        policy.model.generation_config = own
    return Run([_integers(grammar, row) for row in written], passes[0], seconds)


class DigitsAndSpaces(LogitsProcessor):
    """Digits, space and end of turn in any order."""

    def __init__(self, grammar: IntegerGrammar, prompt: int) -> None:
        self.ids = grammar.token_ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        kept = torch.full_like(scores, -torch.inf)
        kept[:, self.ids] = scores[:, self.ids]
        return kept


class ExactGrammar(LogitsProcessor):
    """What `IntegerGrammar` allows."""

    def __init__(self, grammar: IntegerGrammar, prompt: int) -> None:
        self.grammar, self.prompt = grammar, prompt
        self.ids = np.array(grammar.token_ids)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        kept = torch.full_like(scores, -torch.inf)
        for row, tokens in enumerate(input_ids[:, self.prompt :].tolist()):
            text = PartialAnswer()
            for token in tokens:
                if self.grammar.finished(text):
                    break
                self.grammar.append(text, self.grammar.token_ids.index(token))
            finished = self.grammar.finished(text)
            ids = (
                self.grammar.token_ids[self.grammar.end] if finished else self.ids[self.grammar.allowed(text)]
            )
            kept[row, ids] = scores[row, ids]
        return kept


class Follow(LogitsProcessor):
    """Makes `generate` say given texts (symbols). Unless `masked`, only behind what the text says."""

    def __init__(self, grammar: IntegerGrammar, texts: list[list[int]], prompt: int, masked: bool) -> None:
        self.texts = [[grammar.token_ids[s] for s in text] for text in texts]
        self.prompt, self.masked = prompt, masked

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row, (text, tokens) in enumerate(
            zip(self.texts, input_ids[:, self.prompt :].tolist(), strict=True)
        ):
            place = len(tokens)
            if place < len(text) and (self.masked or tokens == text[:place]):
                scores[row, text[place]] += BIAS
        return scores


class Following:
    """The same for our decoder: a `decoding.Model` that says given texts."""

    def __init__(
        self, model: decoding.Model, grammar: IntegerGrammar, texts: list[list[int]], masked: bool
    ) -> None:
        self.model, self.texts, self.masked = model, texts, masked
        self.symbols = {token: symbol for symbol, token in enumerate(grammar.token_ids)}
        self.held: list[list[int]] = [[] for _ in texts]
        self.fed: list[list[int]] = [[] for _ in texts]

    def start(self, drafts: list[list[int]]) -> np.ndarray:
        return self._steer(self.model.start(drafts), drafts, certain=0)

    def extend(self, kept: list[int], tokens: list[list[int]]) -> np.ndarray:
        for row, count in enumerate(kept):
            self.held[row] += self.fed[row][:count]
        return self._steer(self.model.extend(kept, tokens), tokens, certain=1)

    def _steer(self, logits: np.ndarray, tokens: list[list[int]], certain: int) -> np.ndarray:
        self.fed = [[self.symbols[token] for token in row] for row in tokens]
        for row, text in enumerate(self.texts):
            for draft in range(len(self.fed[row]) - certain + 1):
                said = self.held[row] + self.fed[row][: certain + draft]
                if len(said) < len(text) and (self.masked or said == text[: len(said)]):
                    logits[row, draft, text[len(said)]] += BIAS
        return logits


def _left_padded(inputs: dict[str, Any], pad_id: int) -> dict[str, Any]:
    """Right-padded prompts as `generate` wants them."""
    padding = (inputs["attention_mask"] == 0).sum(1).tolist()
    if not any(padding):
        return inputs
    rolled = {
        key: torch.stack([row.roll(n) for row, n in zip(value, padding, strict=True)])
        for key, value in inputs.items()
        if value.shape == inputs["input_ids"].shape
    }
    return inputs | rolled


def tie_gap(policy: VLA0Policy, chunk: Chunk, masked: bool, said: list[int], other: list[int]) -> float:
    """How close a call it was where two texts part: the difference of the two symbols' logits in one-by-one
    decoding, in roundings of the model's data type (its spacing of numbers at that size). 0 for equal texts.

    A pass over several tokens sums in another order than one over a single token, so that it may round its
    logits to a neighbouring number. A text that differs by more than a few roundings was decoded wrongly.
    """
    if said == other:
        return 0.0
    symbols = [symbols_of(policy.grammar, integers) for integers in (said, other)]
    place = next(i for i, (a, b) in enumerate(zip(*symbols, strict=False)) if a != b)
    seen: list[np.ndarray] = []

    class Recorded:
        def __init__(self, model: decoding.Model) -> None:
            self.model = model

        def start(self, drafts: list[list[int]]) -> np.ndarray:
            seen.append(self.model.start(drafts)[0, 0])
            return seen[-1][None, None]

        def extend(self, kept: list[int], tokens: list[list[int]]) -> np.ndarray:
            seen.append(self.model.extend(kept, tokens)[0, 0])
            return seen[-1][None, None]

    model = _model(policy, [chunk], _inputs(policy, [chunk]), masked)
    decoding.decode(Recorded(model), policy.grammar, 1)
    one, two = seen[place][symbols[0][place]], seen[place][symbols[1][place]]
    return float(abs(one - two) / (torch.finfo(policy.model.dtype).eps * max(abs(one), abs(two))))


def symbols_of(grammar: IntegerGrammar, integers: list[int]) -> list[int]:
    text, symbols = PartialAnswer(), []
    for integer in integers:
        symbols += grammar.spell(integer, text)
        text.integers.append(integer)
    return symbols


def _integers(grammar: IntegerGrammar, tokens: list[int]) -> list[int]:
    """Numbers of an answer of `generate`, valid or not."""
    end, space = grammar.token_ids[grammar.end], grammar.token_ids[grammar.space]
    digits = {grammar.token_ids[symbol]: str(digit) for digit, symbol in enumerate(grammar.digit_symbols)}
    tokens = tokens[: tokens.index(end)] if end in tokens else tokens
    text = "".join(" " if token == space else digits[token] for token in tokens)
    return [int(word) for word in text.split()]
