"""`lerobot-vla0 bench decode`: how fast actions are written here, against Transformers' `generate`.

All modes run side by side on the same weights and prompts, taking turns, so that what else the machine does
hits them alike. The time of a chunk runs from tokens and pixels to integers, vision encoder included.

A model with random weights is made to say given texts by adding to its logits: its passes cost what they
cost, and the drafts that are accepted are those of real actions.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from lerobot.policies.factory import make_pre_post_processors
from tqdm import tqdm

from ..configuration_vla0 import VLA0Config
from ..modeling_vla0 import VLA0Policy
from .decode_modes import MODES, Chunk, Run, tie_gap, write
from .decode_report import plot, print_table
from .models import SHAPES, check_names, describe, random_policy

# Ground-truth texts of LIBERO's data (8 timesteps × 7 integers), as printed in VLA-0's public repositories.
RECORDED = {
    "mug": "474 479 460 669 391 674 0 471 479 460 669 391 674 0 458 479 460 669 391 674 0 "
    "455 472 460 669 391 674 0 455 444 460 669 391 674 0 455 396 449 669 391 674 0 "
    "449 335 422 669 391 674 0 422 282 397 669 391 674 0",
    "stove": "569 513 500 437 500 474 0 569 514 500 437 500 474 0 571 519 500 437 500 474 0 "
    "573 521 500 437 500 474 0 573 523 500 437 500 472 0 574 527 500 437 501 471 0 "
    "574 529 500 437 500 471 0 569 531 500 437 500 470 0",
}
WORKLOADS = {
    "recorded": "recorded actions; behind a wrong guess the model says anything",
    "recorded_masked": "recorded actions; the model does not look at its own numbers",
    "replanned": "recorded actions one timestep later than the chunk before",
    "uniform": "uniform random integers: the worst case",
    "own": "what the checkpoint itself says",
    "own_replanned": "what the checkpoint itself says one timestep after the chunk before",
}
MASKED = ("recorded_masked", "replanned")  # in which the model does not look at its own numbers


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
    # Chunks of each workload; of the two published texts at least both, in turns.
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


def bench_decode(config: BenchDecodeConfig) -> dict[str, Any]:
    """Measures, prints a table, writes `decode.json` and `decode.png`, and returns the results.

    Raises:
        ValueError: a name or number that is not allowed, or a workload without its material.
    """
    for name in ("batch_size", "chunks", "repeats"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1.")
    check_names("modes", config.modes, MODES)
    check_names("workloads", config.workloads or [], WORKLOADS)
    policy, preprocess = _load(config)
    workloads = _workloads(config, policy, preprocess)
    modes = list(config.modes)
    if config.batch_size > 1 and "prompt_lookup" in modes:
        modes.remove("prompt_lookup")
        print("prompt_lookup is left out: Transformers assists only a batch of one.")

    print(f"{describe(policy)}, batch {config.batch_size}")
    groups = {
        name: [chunks[i : i + config.batch_size] for i in range(0, len(chunks), config.batch_size)]
        for name, chunks in workloads.items()
    }
    runs: dict[tuple[str, str], list[list[Run]]] = {(w, m): [] for w in groups for m in modes}
    total = config.repeats * sum(map(len, groups.values())) * len(modes)
    # The first call allocates; the last mode is the fastest.
    write(policy, modes[-1], next(iter(groups.values()))[0], True, config.draft_length)
    with tqdm(total=total, desc="Decoding", unit="run") as bar:
        for _ in range(config.repeats):
            for workload, batches in groups.items():
                for mode in modes:
                    runs[workload, mode].append([])
                for batch in batches:
                    for mode in modes:
                        bar.set_postfix(workload=workload, mode=mode, refresh=False)
                        masked = workload in MASKED
                        run = write(policy, mode, batch, masked, config.draft_length)
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
        if same < sum(sizes) and "plain" in modes and mode not in ("generate", "plain"):
            plain = [r.integers for r in runs[workload, "plain"][0]]
            rows[-1]["gap"] = max(
                tie_gap(policy, chunk, workload in MASKED, said, other)
                for batch, run, expected in zip(groups[workload], repeats[0], plain, strict=True)
                for chunk, said, other in zip(batch, expected, run.integers, strict=True)
            )
    for row in rows:
        first = next(r for r in rows if r["workload"] == row["workload"])
        row["speedup"] = first["ms_median"] / row["ms_median"]
    result = {
        "model": str(config.model),
        "machine": describe(policy),
        "versions": {name: version(name) for name in ("lerobot_policy_vla0", "torch", "transformers")},
        "settings": json.loads(json.dumps(asdict(config), default=str)),
        "reference_of_identical": _reference(modes),
        "results": rows,
    }
    print_table(rows, WORKLOADS)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "decode.json").write_text(json.dumps(result, indent=2))
    plot(result, out / "decode.png")
    print(f"Wrote {out / 'decode.json'} and {out / 'decode.png'}")
    return result


# ------------------------------------------------------------------------------------------- what is measured


def _load(config: BenchDecodeConfig) -> tuple[VLA0Policy, Callable]:
    """(policy, preprocessor)."""
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if config.model in SHAPES:
        return random_policy(config, device), lambda batch: batch
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
                    chunk.previous = write(policy, "drafts", [Chunk(before)], False, None).integers[0]
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
            count = max(len(texts), config.chunks)
            result[name] = [Chunk(_scene(random), texts[i % len(texts)]) for i in range(count)]
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


def _reference(modes: list[str]) -> str:
    """The mode whose text the others are compared with: one token a pass, under the exact grammar."""
    return next((mode for mode in ("generate_grammar", "plain", *modes) if mode in modes), modes[0])
