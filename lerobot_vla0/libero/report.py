"""The results folder of an evaluation: settings.json; episodes-KofN.jsonl, to which part K of N appends a
line per episode; videos/; and report.md, success rates with intervals."""

import hashlib
import json
import os
import platform
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import draccus
from lerobot.configs import PreTrainedConfig
from scipy.stats import binomtest

from ..checkpoint import find_checkpoint
from ..configuration_vla0 import VLA0Config
from ..files import check_place, read_json, reading

Episode = dict[str, Any]  # suite, task_id, task (the instruction), episode, init_state, success, steps
SETTINGS = "settings.json"
DIFFERS = "_replay_differs"  # in the name of a video whose episode ended differently when played again
PACKAGES = ("lerobot", "lerobot_policy_vla0", "transformers", "torch", "hf-libero", "robosuite", "mujoco")
# Fields of the policy's config that do not change its actions.
IGNORED_FIELDS = {"device", "pretrained_path", "compile_model", "push_to_hub", "repo_id", "private", "tags"}


def describe_policy(config: VLA0Config) -> dict[str, Any]:
    """The part of the settings that belongs to the policy."""
    fields = draccus.encode(config, PreTrainedConfig)
    return {
        "policy_path": str(config.pretrained_path),
        "weights": weights_hash(config),
        "policy": {key: value for key, value in fields.items() if key not in IGNORED_FIELDS},
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }


def weights_hash(config: VLA0Config) -> str:
    """SHA-256 of all that a checkpoint acts with: weights, an adapter's base, processors and statistics."""
    found = find_checkpoint(str(config.pretrained_path), weights=config.server is None)
    folders = [found.base.folder, found.folder] if found.base else [found.folder]
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted({*folder.glob("*.safetensors"), *folder.glob("policy_*.json")}):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError if the folder has results of other settings, OSError if nothing can be written there.
    Writes nothing."""
    check_place(folder, "folder")
    file = folder / SETTINGS
    if not file.is_file() and not read_episodes(folder):
        return
    before, now = (
        {**s, **{f"policy.{name}": value for name, value in s["policy"].items()}}
        for s in (read_json(file), json.loads(json.dumps(settings)))
    )
    for name in now:
        if name not in ("policy", "versions") and before.get(name) != now[name]:
            raise ValueError(
                f"{folder} holds results of other settings: {name} was {before.get(name)!r}, is "
                f"{now[name]!r}. Choose another --out, or repeat the settings in {file}."
            )


def save_episode(folder: Path, shard: str, settings: dict[str, Any], row: Episode) -> None:
    """Appends an episode to the file of its part ("K/N") and flushes it to disk. Folder and settings are
    written with the first one."""
    check_folder(folder, settings)  # another part may have begun with other settings meanwhile
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / SETTINGS).is_file():
        draft = folder / f"{SETTINGS}.{os.getpid()}"  # replaced in one step: parts may start at once
        draft.write_text(json.dumps(settings, indent=2))
        draft.replace(folder / SETTINGS)
    path = folder / f"episodes-{shard.replace('/', 'of')}.jsonl"
    with path.open("ab") as file:
        # A line that a kill cut off is removed; nothing else of the file is touched.
        torn = len(path.read_bytes().rpartition(b"\n")[2])
        file.truncate(file.tell() - torn)
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_episodes(folder: Path) -> dict[tuple[str, int, int], Episode]:
    """{(suite, task id, episode): its line} of all finished episodes in a results folder, of every part."""
    episodes: dict[tuple[str, int, int], Episode] = {}
    for path in sorted(Path(folder).glob("episodes-*.jsonl")):
        for line in path.read_text().split("\n")[:-1]:  # a line without its end was cut off by a kill
            with reading(path):
                episode = json.loads(line)
                key = episode["suite"], episode["task_id"], episode["episode"]
            if key in episodes and episodes[key]["success"] != episode["success"]:
                raise ValueError(f"{path}: {key} is there twice, with different outcomes.")
            episodes[key] = episode
    return episodes


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % confidence interval of a success rate (Wilson's score interval), both limits in [0, 1]."""
    interval = binomtest(successes, trials).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def success_rate(rows: list[Episode]) -> tuple[int, float, float, float]:
    """Successful episodes, success rate in percent, and the limits of its 95 % interval in percent."""
    successes = sum(row["success"] for row in rows)
    low, high = wilson(successes, len(rows))
    return successes, 100 * successes / len(rows), 100 * low, 100 * high


def table_row(suite: str, task: str, rows: list[Episode]) -> str:
    """One line of the report's Markdown table."""
    successes, rate, low, high = success_rate(rows)
    steps = [row["steps"] for row in rows if row["success"]]
    mean = f"{sum(steps) / len(steps):.0f}" if steps else "–"
    return f"| {suite} | {task} | {successes}/{len(rows)} = {rate:.1f} % | {low:.1f}–{high:.1f} % | {mean} |"


def write_report(folder: Path, missing: dict[str, int]) -> Path:
    """Writes report.md and returns its path.

    Args:
        missing: {"K/N": number of episodes that this part has not finished}.
    """
    episodes, settings = read_episodes(folder), read_json(folder / SETTINGS)
    groups: dict[str, dict[int, list[Episode]]] = defaultdict(lambda: defaultdict(list))
    for (suite, task_id, _), episode in sorted(episodes.items()):
        groups[suite][task_id].append(episode)
    lines = ["# LIBERO evaluation", ""]
    if settings["stand_in_assets"]:
        lines += ["**Run on stand-in assets: these are not LIBERO scores.**", ""]
    lines += ["| suite | task | success | 95 % interval | mean steps of successes |", "|---|---|---|---|---|"]
    for suite, tasks in groups.items():
        for task_id, rows in tasks.items():
            lines.append(table_row(suite, f"{task_id}: {rows[0]['task']}", rows))
        if len(tasks) > 1:
            lines.append(table_row(f"**{suite}**", "all", [row for rows in tasks.values() for row in rows]))
    if len(groups) > 1:
        lines.append(table_row("**all**", "all", list(episodes.values())))
    if missing:
        parts = ", ".join(f"{count} of part {part}" for part, count in missing.items())
        total = settings["episodes_in_all"]
        lines += ["", f"Unfinished: {len(episodes)} of {total} episodes. Missing: {parts}."]
    differing = sorted(path.name for path in (folder / "videos").glob(f"*{DIFFERS}.mp4"))
    if differing:
        lines += ["", f"Played again for a video, these ended differently: {', '.join(differing)}."]
    lines += ["", "## Settings", "", "```json", json.dumps(settings, indent=2), "```", ""]
    (folder / "report.md").write_text("\n".join(lines))
    return folder / "report.md"


def compare(first: Path, second: Path) -> str:
    """Paired comparison of two results folders on the episodes that both have. McNemar's exact test is a
    binomial test on the pairs whose outcomes differ."""
    one, two = read_episodes(first), read_episodes(second)
    common = sorted(one.keys() & two.keys())
    if not common:
        raise ValueError(f"{first} and {second} have no finished episode in common.")
    pairs = [(bool(one[key]["success"]), bool(two[key]["success"])) for key in common]
    outcomes = [(True, True), (True, False), (False, True), (False, False)]
    both, only_first, only_second, neither = map(pairs.count, outcomes)
    differing = only_first + only_second
    p_value = binomtest(only_first, differing).pvalue if differing else 1.0
    return (
        f"{len(common)} episodes in common (same suite, task and initial state)\n"
        f"A  {first}: {100 * (both + only_first) / len(common):.1f} %\n"
        f"B  {second}: {100 * (both + only_second) / len(common):.1f} %\n"
        f"both {both}, only A {only_first}, only B {only_second}, neither {neither}\n"
        f"McNemar's exact test, two-sided: p = {p_value:.3g}"
    )
