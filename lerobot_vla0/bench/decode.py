"""`lerobot-vla0 bench decode`: how fast chunks are decoded here, against Transformers' `generate`.

All modes run on the same weights and prompts, taking turns batch by batch, so that other load on the machine
affects all alike. A chunk's time runs from token ids and pixels to integers, vision encoder included. A model
with random weights is made to write certain answers: its passes take the usual time, and the accepted drafts
are those of real actions.
"""

import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate
from transformers import GenerationConfig

from .. import vlm
from ..action_text import IntegerGrammar, PartialAnswer
from ..checkpoint import load_policy_config, override_arguments
from ..decoding import engine
from ..decoding.decoder import Plan
from ..decoding.drafting import Drafter, initial_rates
from ..modeling_vla0 import VLA0Policy
from ..processor_vla0 import load_processors
from .random_vlm import (
    SHAPES,
    check_names,
    choose_device,
    describe,
    random_policy,
    synchronize,
    write_results,
)

# Transformers' generate under the grammar, without and with prompt lookup; ours with one token per pass, with
# forced tokens fed together with the next one, and with drafts (what the policy does).
MODES = ("generate", "prompt_lookup", "plain", "forced", "drafts")
# Recorded actions, where a model predicts anything after a wrong token, or (masked) the recorded tokens;
# uniform random integers, the worst case.
RANDOM_WORKLOADS = ("recorded", "recorded_masked", "uniform")
# The checkpoint's own answers; the same, one timestep after the chunk before.
OWN_WORKLOADS = ("own", "own_replanned")
# Ground-truth texts of LIBERO's data (8 timesteps × 7 integers), as printed in VLA-0's public repositories.
RECORDED = (
    "474 479 460 669 391 674 0 471 479 460 669 391 674 0 458 479 460 669 391 674 0 455 472 460 669 391 674 0 "
    "455 444 460 669 391 674 0 455 396 449 669 391 674 0 449 335 422 669 391 674 0 422 282 397 669 391 674 0",
    "569 513 500 437 500 474 0 569 514 500 437 500 474 0 571 519 500 437 500 474 0 573 521 500 437 500 474 0 "
    "573 523 500 437 500 472 0 574 527 500 437 501 471 0 574 529 500 437 500 471 0 569 531 500 437 500 470 0",
)
Answers = list[list[int]]  # the integers of each chunk


@dataclass
class BenchDecodeConfig:
    """What to measure."""

    # A VLM with random weights: qwen2.5-0.5b-random, qwen2.5-vl-3b-random, small-random; or a checkpoint's
    # folder, with `dataset`.
    model: str = "qwen2.5-0.5b-random"
    # Folder of a LeRobotDataset, whose frames a checkpoint sees.
    dataset: Path | None = None
    # Of: recorded, recorded_masked, uniform (random weights); own, own_replanned (a checkpoint). None: all.
    workloads: list[str] | None = None
    # Of: generate, prompt_lookup (batch_size 1 only), plain, forced, drafts.
    modes: list[str] = field(default_factory=lambda: list(MODES))
    # Chunks decoded together.
    batch_size: int = 1
    # Chunks of each workload; the two published texts in turns.
    chunks: int = 2
    # How often every mode decodes every chunk.
    repeats: int = 3
    # Run our modes as --policy.compile_model does; only plain, forced and drafts.
    compile_model: bool = False
    # None: that of the checkpoint; bfloat16 for random weights.
    dtype: str | None = None
    # None: cuda where there is one.
    device: str | None = None
    # Folder for decode.json.
    out: Path = Path("outputs/bench")
    seed: int = 0


@dataclass
class Chunk:
    """One prompt, and the answer that a model with random weights is made to write."""

    inputs: dict[str, Any]  # a batch of one row from the preprocessor
    answer: list[int] = field(default_factory=list)  # token ids; none: the model's own answer
    masked: bool = False  # predict the answer's tokens after wrong ones, too
    previous: list[int] = field(default_factory=list)  # integers of the chunk one timestep before

    def next_token(self, written: list[int]) -> int | None:
        """The token of the answer that follows those written; None leaves the choice to the model."""
        index = len(written)
        follows = self.masked or written == self.answer[:index]
        return self.answer[index] if follows and index < len(self.answer) else None


def bench_decode(config: BenchDecodeConfig) -> dict[str, Any]:
    """Measures, prints a table, writes `decode.json`, and returns the results.

    Raises:
        ValueError: a name that is not known, or a checkpoint without a data set.
    """
    suitable = RANDOM_WORKLOADS if config.model in SHAPES else OWN_WORKLOADS
    names, modes = config.workloads or list(suitable), list(config.modes)
    check_names("modes", modes, MODES[2:] if config.compile_model else MODES)
    check_names("workloads", names, suitable)
    if config.batch_size > 1 and "prompt_lookup" in modes:
        modes.remove("prompt_lookup")
        print("prompt_lookup is left out: Transformers assists only a batch of one.")
    policy, random = _load_policy(config), np.random.default_rng(config.seed)
    warmed, rows = config.compile_model or policy.model.device.type == "cuda", []
    for name in names:
        chunks = _random_chunks(config, policy, name, random)
        if suitable is OWN_WORKLOADS:
            chunks = _dataset_chunks(config, policy, name, random)
        batches = [chunks[i : i + config.batch_size] for i in range(0, len(chunks), config.batch_size)]
        # First calls allocate; on a GPU every mode chooses kernels, with compile_model for every shape.
        for batch in batches if config.compile_model else batches[:1]:
            for mode in modes if warmed else modes[-1:]:
                decode(policy, mode, batch)
        runs = defaultdict(list)
        for _ in range(config.repeats):
            policy.decoder.rates = initial_rates()  # drafts learn within a workload
            for batch in batches:
                for mode in modes:
                    runs[mode].append((len(batch), *decode(policy, mode, batch)))
        rows += _summarize(name, runs, len(batches), policy.config.chunk_size)
    return write_results(config.out / "decode.json", config, describe(policy), rows)


def _summarize(
    workload: str, runs: dict[str, list[tuple[int, Answers, int, float]]], batches: int, chunk_size: int
) -> list[dict[str, Any]]:
    """One row per mode. Answers are compared with those of one token per pass."""

    def answers_of(mode: str) -> Answers:
        return [answer for _, answers, *_ in runs[mode][:batches] for answer in answers]

    first = next(iter(runs))
    expected = answers_of("plain" if "plain" in runs else first)
    ms = {mode: [1000 * seconds / rows for rows, *_, seconds in of_mode] for mode, of_mode in runs.items()}
    return [
        {
            "workload": workload,
            "mode": mode,
            "chunks": len(expected),
            "identical": sum(a == b for a, b in zip(answers_of(mode), expected, strict=True)),
            "passes": mean(passes for *_, passes, _ in of_mode[:batches]),
            "ms": median(ms[mode]),
            "ms_min": min(ms[mode]),
            "ms_max": max(ms[mode]),
            "speedup": median(ms[first]) / median(ms[mode]),
            # The largest frame rate at which real-time chunking always has an action: decoding may take half
            # of a chunk's timesteps (see decoding/README.md).
            "rtc_fps": 1000 * (chunk_size // 2) / median(ms[mode]),
        }
        for mode, of_mode in runs.items()
    ]


def _load_policy(config: BenchDecodeConfig) -> VLA0Policy:
    settings = {"dtype": config.dtype, "compile_model": config.compile_model or None}
    settings = {name: value for name, value in settings.items() if value is not None}
    settings["device"] = choose_device(config.device)
    if config.model in SHAPES:
        return random_policy(SHAPES[config.model], config.seed, **{"dtype": "bfloat16"} | settings)
    if config.dataset is None:
        raise ValueError(f"model={config.model!r} needs --dataset, or must be one of {', '.join(SHAPES)}.")
    saved = load_policy_config(config.model, override_arguments(settings))
    return VLA0Policy.from_pretrained(config.model, config=saved).eval()


def _random_chunks(
    config: BenchDecodeConfig, policy: VLA0Policy, name: str, random: np.random.Generator
) -> list[Chunk]:
    """Noise as pictures, and recorded or random integers to write."""
    grammar, chunks = policy.decoder.grammar, []
    for i in range(config.chunks):
        integers = [int(word) for word in RECORDED[i % len(RECORDED)].split()]
        if name == "uniform":
            integers = random.integers(0, grammar.maximum + 1, grammar.count).tolist()
        pictures = torch.from_numpy(random.random((2, 1, 3, 256, 256), dtype=np.float32))
        inputs = dict(zip(policy.config.camera_keys, pictures, strict=True)) | {"task": ["pick up the milk"]}
        chunks.append(Chunk(inputs, answer_tokens(grammar, integers), name == "recorded_masked"))
    return chunks


def _dataset_chunks(
    config: BenchDecodeConfig, policy: VLA0Policy, name: str, random: np.random.Generator
) -> list[Chunk]:
    """Frames of the data set, whose answers are the checkpoint's own."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset  # takes seconds

    preprocess, _ = load_processors(policy.config, config.model)
    dataset, chunks = LeRobotDataset("local/bench", root=config.dataset), []

    def frame(index: int) -> Chunk:
        item = {key: value for key, value in dataset[index].items() if key != "action"}
        return Chunk(preprocess(default_collate([item])))

    firsts = set(dataset.meta.episodes["dataset_from_index"])
    later = [i for i in range(len(dataset)) if i not in firsts]
    for i in random.choice(later, min(config.chunks, len(later)), replace=False).tolist():
        chunks.append(frame(i))
        if name == "own_replanned":
            chunks[-1].previous = decode(policy, "drafts", [frame(i - 1)])[0][0]
    return chunks


def answer_tokens(grammar: IntegerGrammar, integers: list[int]) -> list[int]:
    """Token ids of an answer."""
    answer, symbols = PartialAnswer(), []
    for integer in integers:
        spelled = grammar.spell(integer, answer)
        grammar.append(answer, *spelled)
        symbols += spelled
    return [grammar.token_ids[symbol] for symbol in symbols]


def decode(policy: VLA0Policy, mode: str, chunks: list[Chunk]) -> tuple[Answers, int, float]:
    """Decodes a batch of chunks in a mode of MODES: their integers, forward passes and seconds."""
    batch = {
        key: torch.cat([chunk.inputs[key] for chunk in chunks]).to(policy.model.device)
        for key, value in chunks[0].inputs.items()
        if isinstance(value, Tensor)
    }
    tasks = [chunk.inputs["task"][0] for chunk in chunks]
    inputs = policy.examples.acting_inputs(policy.examples.check({**batch, "task": tasks}))
    run = _generate if mode in ("generate", "prompt_lookup") else _decode
    synchronize(policy)
    start = time.perf_counter()
    answers, passes = run(policy, mode, chunks, inputs)
    return answers, passes, time.perf_counter() - start


def _decode(
    policy: VLA0Policy, mode: str, chunks: list[Chunk], inputs: dict[str, Tensor]
) -> tuple[Answers, int]:
    decoder, dim = policy.decoder, policy.decoder.action_dim
    plans = [Plan(previous=chunk.previous[dim:], history=chunk.previous[:dim]) for chunk in chunks]
    drafters = {
        "plain": None,
        "forced": [Drafter(decoder.grammar, dim, length=0) for _ in chunks],
        "drafts": [decoder.drafter(plan, len(chunks)) for plan in plans],
    }[mode]
    session = ScriptedSession(decoder.session(inputs), decoder.grammar, chunks)
    decoded = engine.decode(session, decoder.grammar, len(chunks), drafters=drafters)
    return decoded.integers, decoded.passes


@torch.inference_mode()
def _generate(
    policy: VLA0Policy, mode: str, chunks: list[Chunk], inputs: dict[str, Tensor]
) -> tuple[Answers, int]:
    model, chat, grammar = policy.model, policy.examples.chat, policy.decoder.grammar
    ids, end, length = grammar.token_ids, grammar.token_ids[grammar.end], inputs["input_ids"].shape[1]
    padding = (inputs["attention_mask"] == 0).sum(1).tolist()
    for key, value in inputs.items():
        if value.shape == inputs["attention_mask"].shape:  # `generate` needs the padding on the left
            inputs[key] = torch.stack([row.roll(n) for row, n in zip(value, padding, strict=True)])

    def allowed(row: int, tokens: Tensor) -> list[int]:
        written, answer = tokens[length:].tolist(), PartialAnswer()
        if end in written:  # this row is finished, others are not
            return [end]
        scripted = chunks[row].next_token(written)
        grammar.append(answer, *map(ids.index, written))
        return [ids[s] for s in grammar.allowed(answer).nonzero()[0]] if scripted is None else [scripted]

    settings = {"max_new_tokens": grammar.max_tokens, "eos_token_id": end, "pad_token_id": chat.pad_id}
    if mode == "prompt_lookup":
        settings |= {"prompt_lookup_num_tokens": 16, "max_matching_ngram_size": 2}
    passes: list[None] = []
    counter = vlm.language_model(model).register_forward_pre_hook(lambda *_: passes.append(None))
    # Otherwise `generate` takes what is left open from the model's own (repetition penalty, sampling).
    model.generation_config = GenerationConfig()
    generation = GenerationConfig(do_sample=False, **settings)
    output = model.generate(**inputs, generation_config=generation, prefix_allowed_tokens_fn=allowed)
    counter.remove()
    texts = [chat.tokenizer.decode(row[: row.index(end)]) for row in output[:, length:].tolist()]
    return [[int(word) for word in text.split()] for text in texts], len(passes)


class ScriptedSession:
    """A decoding session that is made to write the chunks' answers, by adding to the logits."""

    def __init__(self, session: Any, grammar: IntegerGrammar, chunks: list[Chunk]) -> None:
        self.session, self.token_ids, self.chunks = session, grammar.token_ids, chunks
        self.written: list[list[int]] = [[] for _ in chunks]
        self.fed: list[list[int]] = []

    def start(self, drafts: list[list[int]]) -> np.ndarray:
        return self._script(self.session.start(drafts), drafts, first=0)

    def extend(self, accepted: list[int], tokens: list[list[int]]) -> np.ndarray:
        for written, fed, count in zip(self.written, self.fed, accepted, strict=True):
            written += fed[:count]
        return self._script(self.session.extend(accepted, tokens), tokens, first=1)

    def _script(self, logits: np.ndarray, tokens: list[list[int]], first: int) -> np.ndarray:
        """`logits` are those after the first `first` tokens of a row, then after each further one."""
        self.fed = tokens
        for row, fed in enumerate(tokens):
            for count in range(first, len(fed) + 1):
                token = self.chunks[row].next_token(self.written[row] + fed[:count])
                if token is not None:
                    logits[row, count - first, self.token_ids.index(token)] += 1e4
        return logits
