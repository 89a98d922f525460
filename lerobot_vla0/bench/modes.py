"""The ways of decoding a chunk that `bench decode` compares: Transformers' `generate` and ours."""

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from .. import backbone
from ..decoding import engine
from ..decoding.drafting import Drafter
from ..decoding.grammar import IntegerGrammar, PartialAnswer
from ..modeling_vla0 import VLA0Policy
from .common import synchronize

MODES = {
    "generate": "Transformers' generate, digits and space allowed (as TinyVLA)",
    "generate_grammar": "Transformers' generate, exact grammar",
    "prompt_lookup": "Transformers' generate, exact grammar, prompt lookup",
    "plain": "ours, one token per pass",
    "forced": "ours, tokens that the grammar forces fed with the next one",
    "drafts": "ours, speculative decoding (what the policy does)",
}
OURS = ("plain", "forced", "drafts")
BIAS = 1e4  # added to the logit of a scripted token
PROMPT_LOOKUP_TOKENS = 16  # longest draft of prompt lookup


@dataclass
class Chunk:
    """One prompt, and the answer that a model with random weights is made to give."""

    inputs: dict[str, Any]  # one row of a batch for the policy
    answer: list[int] = field(default_factory=list)  # token ids; none: the model's own answer
    # Predict the answer's tokens after wrong ones, too: a model that does not look at its own numbers.
    masked: bool = False
    previous: list[int] = field(default_factory=list)  # integers of the chunk one timestep before, if known

    def next_token(self, written: list[int]) -> int | None:
        """The token of the answer that follows those written; None leaves the choice to the model."""
        place = len(written)
        follows = self.masked or written == self.answer[:place]
        return self.answer[place] if follows and place < len(self.answer) else None


@dataclass
class Run:
    integers: list[list[int]]  # of each chunk
    passes: int
    seconds: float


def run_mode(policy: VLA0Policy, mode: str, chunks: list[Chunk]) -> Run:
    """Decodes a batch of chunks in a mode of MODES. Timed from pixels and token ids to integers."""
    run = _run_ours if mode in OURS else _run_generate
    return run(policy, mode, chunks, _inputs(policy, chunks))


def _inputs(policy: VLA0Policy, chunks: list[Chunk]) -> dict[str, Tensor]:
    batch: dict[str, Any] = {
        key: torch.cat([chunk.inputs[key] for chunk in chunks]).to(policy.model.device)
        for key, value in chunks[0].inputs.items()
        if isinstance(value, Tensor)
    }
    batch["task"] = [chunk.inputs["task"][0] for chunk in chunks]
    return policy.examples.acting_inputs(policy.examples.check(batch))


def _run_ours(policy: VLA0Policy, mode: str, chunks: list[Chunk], inputs: dict[str, Tensor]) -> Run:
    decoder = policy.decoder
    drafters = {
        "plain": None,
        "forced": [Drafter(decoder.grammar, decoder.action_dim, length=0) for _ in chunks],
        "drafts": [decoder.make_drafter(len(chunks), decoder.rates) for _ in chunks],
    }[mode]
    for drafter, chunk in zip(drafters or [], chunks, strict=False):
        drafter.remember(chunk.previous, executed=1)
    synchronize(policy)
    start = time.perf_counter()
    with decoder.cache() as cache:
        model = ScriptedModel(decoder.session(inputs, cache), decoder.grammar, chunks)
        decoded = engine.decode(model, decoder.grammar, len(chunks), drafters=drafters)
    return Run(decoded.integers, decoded.passes, time.perf_counter() - start)


@torch.inference_mode()
def _run_generate(policy: VLA0Policy, mode: str, chunks: list[Chunk], inputs: dict[str, Tensor]) -> Run:
    model, chat, grammar = policy.model, policy.examples.chat, policy.decoder.grammar
    inputs = _left_padded(inputs)
    length, end = inputs["input_ids"].shape[1], grammar.token_ids[grammar.end]
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=grammar.max_tokens, eos_token_id=end, pad_token_id=chat.pad_id
    )
    if mode == "prompt_lookup":
        settings.prompt_lookup_num_tokens, settings.max_matching_ngram_size = PROMPT_LOOKUP_TOKENS, 2
    processor = AnswerProcessor(grammar, chunks, length, exact=mode != "generate")
    passes: list[None] = []
    counter = backbone.language_model(model).register_forward_pre_hook(lambda *_: passes.append(None))
    # What `settings` leaves open, `generate` takes from the model's own (repetition penalty, sampling).
    own_settings, model.generation_config = model.generation_config, GenerationConfig()
    try:
        synchronize(policy)
        start = time.perf_counter()
        output = model.generate(
            **inputs, generation_config=settings, logits_processor=LogitsProcessorList([processor])
        )
        answers = output[:, length:].tolist()
        seconds = time.perf_counter() - start
    finally:
        counter.remove()
        model.generation_config = own_settings
    texts = [chat.tokenizer.decode(ids[: ids.index(end)] if end in ids else ids) for ids in answers]
    return Run([[int(word) for word in text.split()] for text in texts], len(passes), seconds)


def _left_padded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Right-padded prompts with the padding moved to the left, as `generate` needs them."""
    ids, padding = inputs["input_ids"], (inputs["attention_mask"] == 0).sum(1).tolist()
    return inputs | {
        key: torch.stack([row.roll(n) for row, n in zip(value, padding, strict=True)])
        for key, value in inputs.items()
        if value.shape == ids.shape
    }


def answer_tokens(grammar: IntegerGrammar, integers: list[int]) -> list[int]:
    """Token ids of an answer."""
    answer, symbols = PartialAnswer(), []
    for integer in integers:
        spelled = grammar.spell(integer, answer)
        grammar.append(answer, *spelled)
        symbols += spelled
    return [grammar.token_ids[symbol] for symbol in symbols]


class AnswerProcessor(LogitsProcessor):
    """Restricts `generate` to the tokens of answers, in any order or, if `exact`, as the grammar allows them;
    and makes it give the chunks' answers. Prompts have `length` tokens."""

    def __init__(self, grammar: IntegerGrammar, chunks: list[Chunk], length: int, exact: bool) -> None:
        self.grammar, self.chunks, self.length, self.exact = grammar, chunks, length, exact

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        kept = torch.full_like(scores, -torch.inf)
        for row, written in enumerate(input_ids[:, self.length :].tolist()):
            allowed = self._allowed(written) if self.exact else self.grammar.token_ids
            kept[row, allowed] = scores[row, allowed]
            token = self.chunks[row].next_token(written)
            if token is not None:
                kept[row, token] += BIAS
        return kept

    def _allowed(self, written: list[int]) -> list[int]:
        ids, answer = self.grammar.token_ids, PartialAnswer()
        if ids[self.grammar.end] in written:  # this row is finished, others are not
            return [ids[self.grammar.end]]
        self.grammar.append(answer, *map(ids.index, written))
        return [ids[symbol] for symbol in self.grammar.allowed(answer).nonzero()[0]]


class ScriptedModel:
    """An `engine.Model` that is made to give the chunks' answers. `logits` are those of all passes."""

    def __init__(self, model: engine.Model, grammar: IntegerGrammar, chunks: list[Chunk]) -> None:
        self.model, self.token_ids, self.chunks = model, grammar.token_ids, chunks
        self.written: list[list[int]] = [[] for _ in chunks]
        self.fed: list[list[int]] = []
        self.logits: list[np.ndarray] = []

    def start(self, drafts: list[list[int]]) -> np.ndarray:
        return self._script(self.model.start(drafts), drafts, first=0)

    def extend(self, kept: list[int], tokens: list[list[int]]) -> np.ndarray:
        for written, fed, count in zip(self.written, self.fed, kept, strict=True):
            written += fed[:count]
        return self._script(self.model.extend(kept, tokens), tokens, first=1)

    def _script(self, logits: np.ndarray, tokens: list[list[int]], first: int) -> np.ndarray:
        """`logits` are those after the first `first` tokens of a row, then after each further one."""
        self.fed = tokens
        for row, fed in enumerate(tokens):
            for count in range(first, len(fed) + 1):
                token = self.chunks[row].next_token(self.written[row] + fed[:count])
                if token is not None:
                    logits[row, count - first, self.token_ids.index(token)] += BIAS
        self.logits.append(logits)
        return logits


def tie_gap(policy: VLA0Policy, chunk: Chunk, one: list[int], other: list[int]) -> float:
    """How close two answers to a chunk were where they part: the difference of their tokens' logits with one
    token per pass, in rounding steps of the model's data type at that size. 0 for equal answers.

    A pass over several tokens sums in another order than one over a single token, and may round a logit to a
    neighbouring number. Answers that part at more than a few steps mean a decoding error.
    """
    if one == other:
        return 0.0
    grammar = policy.decoder.grammar
    pairs = zip(answer_tokens(grammar, one), answer_tokens(grammar, other), strict=False)
    place, tokens = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    model = ScriptedModel(policy.decoder.session(_inputs(policy, [chunk])), grammar, [chunk])
    engine.decode(model, grammar, 1)
    a, b = (model.logits[place][0, 0, grammar.token_ids.index(token)] for token in tokens)
    return float(abs(a - b) / (torch.finfo(policy.model.dtype).eps * max(abs(a), abs(b))))
