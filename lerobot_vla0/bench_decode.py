"""`lerobot-vla0 bench decode`: how fast actions are written here, against Transformers' `generate`.

All modes run side by side on the same weights and prompts, taking turns, so that what else the machine does
hits them alike. The time of a chunk runs from tokens and pixels to integers, vision encoder included.

A model with random weights is made to say given texts by adding to its logits: its passes cost what they
cost, and the drafts that are accepted are those of real actions.
"""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from . import decoding
from .configuration_vla0 import VLA0Config
from .drafting import Drafter
from .grammar import IntegerGrammar, Text
from .modeling_vla0 import VLA0Policy
from .tiny_vlm import make_config, make_processor

# Ground-truth texts of LIBERO's data (8 timesteps × 7 integers), as printed in VLA-0's public repositories.
RECORDED = {
    "mug": "474 479 460 669 391 674 0 471 479 460 669 391 674 0 458 479 460 669 391 674 0 "
    "455 472 460 669 391 674 0 455 444 460 669 391 674 0 455 396 449 669 391 674 0 "
    "449 335 422 669 391 674 0 422 282 397 669 391 674 0",
    "stove": "569 513 500 437 500 474 0 569 514 500 437 500 474 0 571 519 500 437 500 474 0 "
    "573 521 500 437 500 474 0 573 523 500 437 500 472 0 574 527 500 437 501 471 0 "
    "574 529 500 437 500 471 0 569 531 500 437 500 470 0",
}
SHAPES = {
    # Qwen2.5-VL-3B (its config.json on the Hub).
    "qwen2.5-vl-3b-random": (
        {
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
            "num_attention_heads": 16, "num_key_value_heads": 2,
        },
        {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16},
    ),
    # The language model of Qwen2.5-0.5B behind a small vision encoder: what two CPU cores can still time.
    "qwen2.5-0.5b-random": (
        {
            "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
            "num_attention_heads": 14, "num_key_value_heads": 2,
        },
        {
            "depth": 4, "hidden_size": 320, "intermediate_size": 1280, "num_heads": 4,
            "fullatt_block_indexes": [3],
        },
    ),
}  # fmt: skip
MODES = {
    "generate": "Transformers' generate, digits and space allowed (as TinyVLA)",
    "generate_grammar": "Transformers' generate, exact grammar",
    "prompt_lookup": "Transformers' generate, exact grammar, prompt lookup",
    "plain": "ours, one token a pass",
    "forced": "ours, forced tokens ride along",
    "drafts": "ours, drafts verified (what the policy does)",
}
WORKLOADS = {
    "recorded": "recorded actions; behind a wrong guess the model says anything",
    "recorded_masked": "recorded actions; the model does not look at its own numbers",
    "replanned": "recorded actions one timestep later than the chunk before",
    "uniform": "uniform random integers: the worst case",
    "own": "what the checkpoint itself says",
    "own_replanned": "what the checkpoint itself says one timestep after the chunk before",
}
# Added to the logit of the token that is to be said.
BIAS = 1e4
# Tokens that prompt lookup proposes at once.
PROMPT_LOOKUP_TOKENS = 16


@dataclass
class BenchDecodeConfig:
    """What to measure."""

    # A policy checkpoint (folder), with `dataset`; or a VLM with random weights: qwen2.5-0.5b-random,
    # qwen2.5-vl-3b-random.
    model: str = "qwen2.5-0.5b-random"
    # Folder of a LeRobotDataset: frames for a checkpoint to look at, or actions for a random model to say.
    # None takes two published texts.
    dataset: Path | None = None
    # Of: recorded, recorded_masked, replanned (needs `dataset`), uniform; own, own_replanned (a checkpoint).
    # None takes all that there is material for.
    workloads: list[str] | None = None
    # Of: generate, generate_grammar, prompt_lookup, plain, forced, drafts.
    modes: list[str] = field(default_factory=lambda: list(MODES))
    # Chunks written together.
    batch_size: int = 1
    # Chunks of each workload (of `dataset`, a checkpoint's own, and uniform ones).
    chunks: int = 2
    # How often every chunk is written by every mode.
    repeats: int = 3
    # Longest draft; None as the policy chooses.
    draft_length: int | None = None
    # None: that of the checkpoint; bfloat16 for random weights.
    dtype: str | None = None
    # None: cuda where there is one.
    device: str | None = None
    # Folder for decode.json and decode.png.
    out: Path = Path("outputs/bench")
    seed: int = 0


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


def bench_decode(config: BenchDecodeConfig) -> dict[str, Any]:
    """Measures, prints a table, writes `decode.json` and `decode.png`, and returns the results.

    Raises:
        ValueError: a name or number that is not allowed, or a workload without its material.
    """
    for name in ("batch_size", "chunks", "repeats"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1.")
    _check_names("modes", config.modes, MODES)
    _check_names("workloads", config.workloads or [], WORKLOADS)
    policy, preprocess = _load(config)
    workloads = _workloads(config, policy, preprocess)
    modes = list(config.modes)
    if config.batch_size > 1 and "prompt_lookup" in modes:
        modes.remove("prompt_lookup")
        print("prompt_lookup is left out: Transformers assists only a batch of one.")

    print(f"{_describe(policy)}, batch {config.batch_size}")
    groups = {
        name: [chunks[i : i + config.batch_size] for i in range(0, len(chunks), config.batch_size)]
        for name, chunks in workloads.items()
    }
    runs: dict[tuple[str, str], list[list[Run]]] = {(w, m): [] for w in groups for m in modes}
    total = config.repeats * sum(map(len, groups.values())) * len(modes)
    for mode in modes:  # the first call allocates
        _run(policy, mode, next(iter(groups.values()))[0], True, config.draft_length)
    with tqdm(total=total, desc="Decoding", unit="run") as bar:
        for _ in range(config.repeats):
            for workload, batches in groups.items():
                for mode in modes:
                    runs[workload, mode].append([])
                for batch in batches:
                    for mode in modes:
                        bar.set_postfix(workload=workload, mode=mode, refresh=False)
                        masked = workload in ("recorded_masked", "replanned")
                        run = _run(policy, mode, batch, masked, config.draft_length)
                        runs[workload, mode][-1].append(run)
                        bar.update()

    rows = []
    for (workload, mode), repeats in runs.items():
        sizes = [len(batch) for batch in groups[workload]]
        ms = [1000 * run.seconds / n for repeat in repeats for run, n in zip(repeat, sizes, strict=True)]
        # `generate` without the grammar may write something else; ours must all write the same.
        reference = [run.integers for run in runs[workload, _reference(modes)][0]]
        same = sum(
            a == b
            for run, expected in zip(repeats[0], reference, strict=True)
            for a, b in zip(run.integers, expected, strict=True)
        )
        rows.append(
            {
                "workload": workload,
                "mode": mode,
                "chunks": sum(sizes),
                "passes": sum(run.passes for run in repeats[0]) / len(sizes),
                "passes_most": max(run.passes for run in repeats[0]),
                "ms_median": median(ms),
                "ms_min": min(ms),
                "ms_max": max(ms),
                "identical": same,
            }
        )
    for row in rows:
        first = next(r for r in rows if r["workload"] == row["workload"])
        row["speedup"] = first["ms_median"] / row["ms_median"]
    result = {
        "model": str(config.model),
        "machine": _describe(policy),
        "versions": {name: version(name) for name in ("lerobot_policy_vla0", "torch", "transformers")},
        "settings": json.loads(json.dumps(asdict(config), default=str)),
        "reference_of_identical": _reference(modes),
        "results": rows,
    }
    _print_table(rows)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "decode.json").write_text(json.dumps(result, indent=2))
    _plot(result, out / "decode.png")
    print(f"Wrote {out / 'decode.json'} and {out / 'decode.png'}")
    return result


# ------------------------------------------------------------------------------------------- what is measured


def _load(config: BenchDecodeConfig) -> tuple[VLA0Policy, Callable]:
    """(policy, preprocessor)."""
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if config.model in SHAPES:
        return _random_policy(config, device), lambda batch: batch
    if not Path(config.model).is_dir():
        raise ValueError(
            f"model={config.model!r} is neither a checkpoint folder nor one of {', '.join(SHAPES)}."
        )
    saved = VLA0Config.from_pretrained(
        config.model,
        cli_overrides=[f"--device={device}"] + ([f"--dtype={config.dtype}"] * bool(config.dtype)),
    )
    policy = VLA0Policy.from_pretrained(config.model, config=saved).eval()
    if config.dataset is None:
        raise ValueError("a checkpoint needs something to look at: give --dataset=<LeRobotDataset folder>.")
    preprocess, _ = make_pre_post_processors(
        saved, pretrained_path=config.model, preprocessor_overrides={"device_processor": {"device": device}}
    )
    return policy, preprocess


def _random_policy(config: BenchDecodeConfig, device: str) -> VLA0Policy:
    text, vision = SHAPES[config.model]
    image = PolicyFeature(FeatureType.VISUAL, (3, 256, 256))
    policy_config = VLA0Config(
        input_features={"observation.images.image": image, "observation.images.image2": image},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))},
        device=device,
        dtype=config.dtype or "bfloat16",
        push_to_hub=False,
    )
    with TemporaryDirectory() as folder:
        processor = make_processor()
        vlm_config = make_config(processor, text, vision)
        vlm_config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
        vlm_config.save_pretrained(folder)
        processor.save_pretrained(folder)
        policy = VLA0Policy(policy_config, vlm_folder=Path(folder)).eval()
    # Filled in place, on the device: Transformers' own initialisation takes minutes for three billion.
    torch.manual_seed(config.seed)
    for name, parameter in policy.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
        else:
            torch.nn.init.constant_(parameter, float("norm" in name))
    return policy


def _workloads(config: BenchDecodeConfig, policy: VLA0Policy, preprocess: Callable) -> dict[str, list[Chunk]]:
    own = config.model not in SHAPES
    names = config.workloads
    if names is None:
        names = ["own", "own_replanned"] if own else ["recorded", "recorded_masked", "uniform"]
        if not own and config.dataset is not None:
            names.insert(2, "replanned")
    wrong = [name for name in names if name.startswith("own") != own]
    if wrong:
        kind = "a checkpoint" if own else "random weights"
        raise ValueError(f"workloads={wrong} do not go with model={config.model!r}, which is {kind}.")
    if "replanned" in names and config.dataset is None:
        raise ValueError("workloads=['replanned'] needs actions: give --dataset=<LeRobotDataset folder>.")
    random = np.random.default_rng(config.seed)
    dim, horizon, maximum = policy.action_dim, policy.config.chunk_size, policy.config.num_bins
    frames = _frames(config, policy, preprocess, random) if config.dataset is not None else []
    result = {}
    for name in names:
        if own:
            result[name] = [Chunk(now, previous=[] if "replanned" in name else None) for _, now in frames]
            if "replanned" in name:
                for chunk, (before, _) in zip(result[name], frames, strict=True):
                    chunk.previous = _run(policy, "drafts", [Chunk(before)], False, None).integers[0]
        elif name == "uniform":
            texts = random.integers(0, maximum + 1, (config.chunks, horizon * dim)).tolist()
            result[name] = [Chunk(_scene(random), text) for text in texts]
        elif frames:
            result[name] = [
                Chunk(
                    _scene(random),
                    now["action"].flatten().tolist(),
                    before["action"].flatten().tolist() if name == "replanned" else None,
                )
                for before, now in frames
            ]
        else:
            texts = [[int(v) for v in text.split()] for text in RECORDED.values()]
            result[name] = [Chunk(_scene(random), text) for text in texts]
    return result


def _scene(random: np.random.Generator) -> dict[str, Any]:
    """Two random camera images and an instruction."""
    images = torch.from_numpy(random.random((2, 1, 3, 256, 256), dtype=np.float32))
    return {
        "observation.images.image": images[0],
        "observation.images.image2": images[1],
        "task": ["pick up the salad dressing and place it in the basket"],
    }


def _frames(
    config: BenchDecodeConfig, policy: VLA0Policy, preprocess: Callable, random: np.random.Generator
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Pairs of consecutive frames with their chunks of actions as integers."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata
    from lerobot.processor import NormalizerProcessorStep

    meta = LeRobotDatasetMetadata("local/bench", root=config.dataset)
    horizon = policy.config.chunk_size
    if meta.shapes["action"] != (policy.action_dim,):
        raise ValueError(
            f"dataset={str(config.dataset)!r} has actions of shape {tuple(meta.shapes['action'])}, not "
            f"({policy.action_dim},)."
        )
    times = {"action": [i / meta.fps for i in range(horizon)]}
    dataset = LeRobotDataset("local/bench", root=config.dataset, delta_timestamps=times)
    # Of consecutive frames of one episode, whose chunks both end before it does.
    episodes = meta.episodes
    starts = [
        i
        for first, last in zip(episodes["dataset_from_index"], episodes["dataset_to_index"], strict=True)
        for i in range(first, last - horizon)
    ]
    chosen = random.choice(starts, min(config.chunks, len(starts)), replace=False).tolist()
    own_actions = config.model in SHAPES
    if own_actions:
        normalize = NormalizerProcessorStep(
            policy.config.output_features, policy.config.normalization_mapping, meta.stats
        )
    pairs = []
    for i in chosen:
        pair = []
        for frame in (dataset[i], dataset[i + 1]):
            batch = {
                key: value[None] for key, value in frame.items() if key.startswith(("observation", "action"))
            } | {"task": [frame["task"]]}
            if own_actions:
                normal = normalize._normalize_action(batch["action"], inverse=False)
                batch = {"action": policy.examples.codec.encode(normal)[0]}
            else:
                batch = preprocess(batch)
            pair.append(batch)
        pairs.append(tuple(pair))
    return pairs


# ------------------------------------------------------------------------------------------------------ modes


def _run(policy: VLA0Policy, mode: str, chunks: list[Chunk], masked: bool, length: int | None) -> Run:
    """Writes a batch of chunks."""
    batch = {
        key: torch.cat([chunk.inputs[key] for chunk in chunks])
        for key in [*policy.config.camera_keys, "observation.state"]
        if key in chunks[0].inputs
    } | {"task": [chunk.inputs["task"][0] for chunk in chunks]}
    inputs = policy.examples.acting_inputs(batch)
    texts = [_symbols(policy.grammar, chunk.integers) for chunk in chunks if chunk.integers is not None]
    if mode in ("plain", "forced", "drafts"):
        return _run_ours(policy, mode, chunks, inputs, texts, masked, length)
    return _run_generate(policy, mode, inputs, texts, masked)


def _run_ours(
    policy: VLA0Policy,
    mode: str,
    chunks: list[Chunk],
    inputs: dict[str, Any],
    texts: list[list[int]],
    masked: bool,
    length: int | None,
) -> Run:
    drafters: list[Drafter] | None = None
    if mode != "plain":
        drafters = [policy.make_drafter() for _ in chunks]
        if mode == "forced" or length is not None:
            length = 0 if mode == "forced" else length
            drafters = [Drafter(policy.grammar, policy.action_dim, length) for _ in chunks]
        for drafter, chunk in zip(drafters, chunks, strict=True):
            if chunk.previous is not None:
                drafter.remember(chunk.previous, executed=1)
            drafter.start()
    policy._prompt_prefix(inputs)  # kept between calls, as in the policy
    _synchronize(policy)
    start = time.perf_counter()
    model: decoding.Model = policy.prompt_cache(inputs)
    if texts:
        model = Following(model, policy.grammar, texts, masked)
    decoded = decoding.decode(model, policy.grammar, len(chunks), drafters=drafters)
    return Run(
        [integers[: policy.grammar.count] for integers in decoded.integers],
        decoded.passes,
        time.perf_counter() - start,
    )


@torch.inference_mode()
def _run_generate(
    policy: VLA0Policy, mode: str, inputs: dict[str, Any], texts: list[list[int]], masked: bool
) -> Run:
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
        max_new_tokens=grammar.count * (len(str(grammar.maximum)) + 1),
        eos_token_id=grammar.token_ids[grammar.end],
        pad_token_id=policy.chat.pad_id,
    )
    if mode == "prompt_lookup":
        settings.prompt_lookup_num_tokens, settings.max_matching_ngram_size = PROMPT_LOOKUP_TOKENS, 2
    passes = [0]
    counter = policy.model.model.language_model.register_forward_pre_hook(
        lambda *_: passes.__setitem__(0, passes[0] + 1)
    )
    # `generate` fills what a config leaves open from the model's own (repetition penalty, sampling).
    own, policy.model.generation_config = policy.model.generation_config, GenerationConfig()
    try:
        _synchronize(policy)
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
            text = Text()
            for token in tokens:
                if self.grammar.finished(text):
                    break
                self.grammar.write(text, self.grammar.token_ids.index(token))
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
        key: torch.stack([row.roll(n) for row, n in zip(inputs[key], padding, strict=True)])
        for key in ("input_ids", "attention_mask", "mm_token_type_ids")
    }
    return inputs | rolled


def _symbols(grammar: IntegerGrammar, integers: list[int]) -> list[int]:
    text, symbols = Text(), []
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


def _synchronize(policy: VLA0Policy) -> None:
    if policy.model.device.type == "cuda":
        torch.cuda.synchronize()


# ----------------------------------------------------------------------------------------------------- report


def _check_names(field_name: str, given: list[str], known: dict[str, str]) -> None:
    wrong = [name for name in given if name not in known]
    if wrong:
        raise ValueError(f"{field_name}={wrong} are not among {', '.join(known)}.")


def _reference(modes: list[str]) -> str:
    """The mode whose text the others are compared with: one token a pass, under the exact grammar."""
    return next((mode for mode in ("generate_grammar", "plain", *modes) if mode in modes), modes[0])


def _describe(policy: VLA0Policy) -> str:
    device = policy.model.device
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    millions = policy.model.num_parameters() / 1e6
    return f"{millions:,.1f} million parameters, {str(policy.model.dtype).removeprefix('torch.')}, {where}"


def _print_table(rows: list[dict[str, Any]]) -> None:
    workload = None
    for row in rows:
        if row["workload"] != workload:
            workload = row["workload"]
            print(f"\n{workload}: {WORKLOADS[workload]}")
            print(f"  {'mode':17}{'passes':>8}{'ms per chunk (min–max)':>30}{'speed':>8}  identical")
        ms = f"{row['ms_median']:.0f} ({row['ms_min']:.0f}–{row['ms_max']:.0f})"
        print(
            f"  {row['mode']:17}{row['passes']:>8.1f}{ms:>30}{row['speedup']:>7.1f}×  "
            f"{row['identical']}/{row['chunks']}"
        )
    print()


def _plot(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    rows = result["results"]
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    figure = Figure(figsize=(3.4 * len(workloads) + 2.6, 3.4), layout="constrained")
    for axes, workload in zip(
        figure.subplots(1, len(workloads), sharey=True, squeeze=False)[0], workloads, strict=True
    ):
        shown = {row["mode"]: row for row in rows if row["workload"] == workload}
        for place, mode in enumerate(modes):
            row = shown[mode]
            axes.barh(
                place,
                row["ms_median"],
                xerr=[[row["ms_median"] - row["ms_min"]], [row["ms_max"] - row["ms_median"]]],
                color="C0" if mode in ("plain", "forced", "drafts") else "0.65",
                ecolor="0.3",
            )
            axes.annotate(
                f" {row['speedup']:.1f}×, {row['passes']:.0f} passes", (row["ms_max"], place), va="center"
            )
        axes.set(title=workload, xlabel="ms per chunk", yticks=range(len(modes)), yticklabels=modes)
        axes.set_xlim(0, 1.5 * max(row["ms_max"] for row in shown.values()))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.suptitle(result["machine"], fontsize=9)
    figure.savefig(path, dpi=120)
