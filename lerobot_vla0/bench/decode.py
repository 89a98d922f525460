"""`lerobot-vla0 bench decode`: how fast chunks are decoded here, against Transformers' `generate`.

All modes run on the same weights and prompts, taking turns batch by batch, so that other load on the machine
affects all alike. A chunk's time runs from token ids and pixels to integers, vision encoder included.

A model with random weights is made to give certain answers by adding to its logits: its passes take the usual
time, and the accepted drafts are those of real actions.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from ..decoding.drafting import initial_rates
from ..files import check_place, new_file
from ..modeling_vla0 import VLA0Policy
from ..options import load_policy_config, override_arguments
from . import common
from .modes import MODES, OURS, Run, run_mode, tie_gap
from .workloads import WORKLOADS, load_pairs, make_chunks


@dataclass
class BenchDecodeConfig:
    """What to measure."""

    # A policy checkpoint (folder), with `dataset`; or a VLM with random weights: qwen2.5-0.5b-random,
    # qwen2.5-vl-3b-random, small-random.
    model: str = "qwen2.5-0.5b-random"
    # Folder of a LeRobotDataset: frames for a checkpoint to look at, or actions that random weights are made
    # to write. None takes two published texts.
    dataset: Path | None = None
    # Of: recorded, recorded_masked, replanned (needs `dataset`), uniform; own, own_replanned (a checkpoint).
    # None takes all that there is material for.
    workloads: list[str] | None = None
    # Of: generate, generate_grammar, prompt_lookup, plain, forced, drafts.
    modes: list[str] = field(default_factory=lambda: list(MODES))
    # Chunks decoded together.
    batch_size: int = 1
    # Chunks of each workload; of the two published texts at least both, in turns.
    chunks: int = 2
    # How often every mode decodes every chunk.
    repeats: int = 3
    # Longest draft in tokens, 0 to 63; None as the policy chooses.
    draft_length: int | None = None
    # Run our modes as --policy.compile_model does; only plain, forced and drafts.
    compile_model: bool = False
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
    names, modes, out = _check(config), list(config.modes), check_place(config.out, "folder")
    policy, random = _load_policy(config), np.random.default_rng(config.seed)
    if config.batch_size > 1 and "prompt_lookup" in modes:
        modes.remove("prompt_lookup")
        print("prompt_lookup is left out: Transformers assists only a batch of one.")
    pairs = [] if config.dataset is None else load_pairs(config, policy, random)
    batches = []  # (workload, chunks)
    for name in names:
        chunks = make_chunks(name, policy, pairs, config.chunks, random)
        batches += [
            (name, chunks[i : i + config.batch_size]) for i in range(0, len(chunks), config.batch_size)
        ]
    print(f"{common.describe(policy)}, batch {config.batch_size}")
    # Answers are compared with those of one token per pass under the exact grammar.
    reference = next(mode for mode in ("generate_grammar", "plain", *modes) if mode in modes)
    records = []
    # First calls allocate; on a GPU each mode chooses kernels, with compile_model every shape is compiled.
    for _, chunks in batches if config.compile_model else batches[:1]:
        for mode in modes if config.compile_model or policy.model.device.type == "cuda" else modes[-1:]:
            run_mode(policy, mode, chunks)
    with tqdm(total=config.repeats * len(batches) * len(modes), desc="Decoding", unit="run") as bar:
        for repeat in range(config.repeats):
            for number, (workload, chunks) in enumerate(batches):
                if number == 0 or workload != batches[number - 1][0]:
                    policy.decoder.rates = initial_rates()  # drafts learn within a workload
                runs: dict[str, Run] = {}
                for mode in modes:
                    bar.set_postfix(workload=workload, mode=mode, refresh=False)
                    runs[mode] = run_mode(policy, mode, chunks)
                    bar.update()
                for mode, run in runs.items():
                    same = sum(a == b for a, b in zip(run.integers, runs[reference].integers, strict=True))
                    gap = None
                    if repeat == 0 and "plain" in runs and mode != "generate":
                        answers = zip(chunks, runs["plain"].integers, run.integers, strict=True)
                        gap = max(tie_gap(policy, *answer) for answer in answers)
                    ms = 1000 * run.seconds / len(chunks)
                    records.append((workload, mode, repeat, len(chunks), run.passes, ms, same, gap))
    columns = ["workload", "mode", "repeat", "chunks", "passes", "ms", "identical", "gap"]
    rows = _summarize(pd.DataFrame(records, columns=columns), policy.config.chunk_size)
    _print_rows(rows)
    result = common.write_results(
        out / "decode.json", config, common.describe(policy), rows, reference_of_identical=reference
    )
    _plot(rows, common.describe(policy), out / "decode.png")
    print(f"Wrote {out / 'decode.json'} and {out / 'decode.png'}")
    return result


def _check(config: BenchDecodeConfig) -> list[str]:
    """The names of the workloads."""
    common.check_counts(config, "batch_size", "chunks", "repeats")
    common.check_names("modes", config.modes, MODES)
    common.check_machine(config)
    if config.compile_model and not set(OURS).issuperset(config.modes):
        raise ValueError(
            f"compile_model=True compiles what this package does, not modes={config.modes}. Choose among "
            f"--modes='[{','.join(OURS)}]'."
        )
    if config.workloads is not None:
        common.check_names("workloads", config.workloads, WORKLOADS)
    trained = config.model not in common.SHAPES
    if trained and not Path(config.model).is_dir():
        raise ValueError(
            f"model={config.model!r} is neither a checkpoint folder nor one of {', '.join(common.SHAPES)}."
        )
    if trained and config.dataset is None:
        raise ValueError("a checkpoint needs something to look at: give --dataset=<LeRobotDataset folder>.")
    suitable = [name for name in WORKLOADS if name.startswith("own") == trained]
    names = config.workloads
    if names is None:
        names = [name for name in suitable if name != "replanned" or config.dataset is not None]
    wrong = [name for name in names if name not in suitable]
    if wrong:
        kind = "a checkpoint" if trained else "random weights"
        raise ValueError(f"workloads={wrong} do not go with model={config.model!r}, which is {kind}.")
    if "replanned" in names and config.dataset is None:
        raise ValueError("workloads=['replanned'] needs actions: give --dataset=<LeRobotDataset folder>.")
    return names


def _load_policy(config: BenchDecodeConfig) -> VLA0Policy:
    settings = {
        "device": common.choose_device(config.device),
        "dtype": config.dtype,
        "draft_length": config.draft_length,
        "compile_model": config.compile_model or None,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    if config.model in common.SHAPES:
        shape = common.SHAPES[config.model]
        return common.random_policy(shape, config.seed, **{"dtype": "bfloat16"} | settings)
    saved = load_policy_config(config.model, override_arguments(settings))
    return VLA0Policy.from_pretrained(config.model, config=saved).eval()


def _summarize(runs: pd.DataFrame, chunk_size: int) -> pd.DataFrame:
    """One row per workload and mode. `rtc_fps` is the largest frame rate at which real-time chunking always
    has an action (see decoding/README.md)."""
    keys = ["workload", "mode"]
    rows = (
        runs[runs["repeat"] == 0]
        .groupby(keys, sort=False)
        .agg(
            chunks=("chunks", "sum"),
            passes=("passes", "mean"),
            passes_most=("passes", "max"),
            identical=("identical", "sum"),
            gap=("gap", "max"),
        )
    )
    times = runs.groupby(keys, sort=False)["ms"]
    rows = rows.join(times.agg(ms_median="median", ms_min="min", ms_max="max")).reset_index()
    rows["gap"] = rows["gap"].where(rows["identical"] < rows["chunks"])
    # Decoding may take half of a chunk's timesteps: the robot executes the others meanwhile.
    rows["rtc_fps"] = 1000 * (chunk_size // 2) / rows["ms_median"]
    rows["speedup"] = rows.groupby("workload")["ms_median"].transform("first") / rows["ms_median"]
    return rows


def _print_rows(rows: pd.DataFrame) -> None:
    for workload, of_workload in rows.groupby("workload", sort=False):
        print(f"\n{workload}: {WORKLOADS[workload]}")
        common.print_table(
            pd.DataFrame(
                {
                    "mode": row.mode,
                    "passes": f"{row.passes:.1f}",
                    "ms per chunk (min–max)": f"{row.ms_median:.0f} ({row.ms_min:.0f}–{row.ms_max:.0f})",
                    "speed": f"{row.speedup:.1f}×",
                    "fps with RTC": f"{row.rtc_fps:.1f}",
                    "identical": f"{row.identical}/{row.chunks}"
                    + (f", parted by at most {row.gap:.1f} roundings" if pd.notna(row.gap) else ""),
                }
                for row in of_workload.itertuples()
            )
        )
    print()


def _plot(rows: pd.DataFrame, title: str, file: Path) -> None:
    from matplotlib.figure import Figure

    workloads = rows["workload"].unique()
    figure = Figure(figsize=(3.4 * len(workloads) + 2.6, 3.4), layout="constrained")
    all_axes = figure.subplots(1, len(workloads), sharey=True, squeeze=False)[0]
    for axes, (workload, shown) in zip(all_axes, rows.groupby("workload", sort=False), strict=True):
        bars = axes.barh(
            shown["mode"],
            shown["ms_median"],
            xerr=[shown["ms_median"] - shown["ms_min"], shown["ms_max"] - shown["ms_median"]],
            color=["C0" if mode in OURS else "0.65" for mode in shown["mode"]],
            ecolor="0.3",
        )
        axes.bar_label(bars, [f" {row.speedup:.1f}×, {row.passes:.4g} passes" for row in shown.itertuples()])
        axes.set(title=workload, xlabel="ms per chunk", xlim=(0, 1.6 * shown["ms_max"].max()))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=9)
    with new_file(file) as draft:
        figure.savefig(draft, dpi=120)
