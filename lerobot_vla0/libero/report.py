"""Statistics and the report of an evaluation: success rates with intervals, paired comparison, table and
plot."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

Episode = dict[str, Any]  # one line of a results file
Z95 = 1.959964  # two-sided 95 % quantile of the normal distribution


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % confidence interval of a success rate (Wilson's score interval), both in [0, 1].

    Raises:
        ValueError: no trials.
    """
    if trials < 1:
        raise ValueError("a success rate needs at least one trial.")
    rate, z2 = successes / trials, Z95**2
    centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 * math.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    # The formula's exact limits, which floating point misses by a bit.
    low = 0.0 if successes == 0 else centre - half
    return low, 1.0 if successes == trials else centre + half


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p value of McNemar's test: how likely so uneven a split of the pairs that differ is by
    chance.

    Args:
        only_first, only_second: episodes that only the first, or only the second policy solved.
    """
    n, k = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    return min(1.0, 2 * tail)


def key_of(episode: Episode) -> tuple[str, int, int]:
    return episode["suite"], episode["task_id"], episode["episode"]


def read_episodes(folder: Path) -> dict[tuple[str, int, int], Episode]:
    """All finished episodes in a results folder, of every shard; a last line cut off by a kill does not
    count.

    Raises:
        ValueError: a damaged line elsewhere, or one episode twice with different outcomes.
    """
    episodes: dict[tuple[str, int, int], Episode] = {}
    for path in sorted(Path(folder).glob("episodes-*.jsonl")):
        lines = path.read_text().split("\n")
        for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline was not finished
            try:
                episode = json.loads(line)
                key = key_of(episode)
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number} is damaged: {line[:60]!r}. Remove this line."
                ) from error
            if key in episodes and episodes[key]["success"] != episode["success"]:
                raise ValueError(f"{path}, line {number}: {key} is there twice, with different outcomes.")
            episodes[key] = episode
    return episodes


def write_report(folder: Path) -> Path:
    """Writes report.md and report.png from what a results folder holds, and returns the former.

    Raises:
        ValueError: no finished episode.
    """
    folder = Path(folder)
    episodes = read_episodes(folder)
    if not episodes:
        raise ValueError(f"{folder} holds no finished episode.")
    settings = json.loads((folder / "settings.json").read_text())
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
    expected = settings["episodes_in_all"]
    if len(episodes) < expected:
        lines += ["", f"Unfinished: {len(episodes)} of {expected} episodes."]
    plot(groups, folder / "report.png", settings["stand_in_assets"])
    lines += ["", "![success by task](report.png)", "", "## Settings", ""]
    lines += ["```json", json.dumps(settings, indent=2), "```", ""]
    (folder / "report.md").write_text("\n".join(lines))
    return folder / "report.md"


def table_row(suite: str, task: str, rows: list[Episode]) -> str:
    successes = sum(row["success"] for row in rows)
    low, high = wilson(successes, len(rows))
    steps = [row["steps"] for row in rows if row["success"]]
    mean = f"{sum(steps) / len(steps):.0f}" if steps else "–"
    rate = f"{successes}/{len(rows)} = {100 * successes / len(rows):.1f} %"
    return f"| {suite} | {task} | {rate} | {100 * low:.1f}–{100 * high:.1f} % | {mean} |"


def plot(groups: dict[str, dict[int, list[Episode]]], path: Path, stand_ins: bool) -> None:
    """Success rate of every task with its interval, one colour per suite."""
    from matplotlib.figure import Figure

    bars = [(suite, task_id, rows) for suite, tasks in groups.items() for task_id, rows in tasks.items()]
    figure = Figure(figsize=(max(4.0, 0.35 * len(bars) + 2), 3.6), layout="constrained")
    axes = figure.subplots()
    for number, suite in enumerate(groups):
        places = [i for i, bar in enumerate(bars) if bar[0] == suite]
        counts = [(sum(row["success"] for row in bars[i][2]), len(bars[i][2])) for i in places]
        rates = [100 * k / n for k, n in counts]
        intervals = [wilson(k, n) for k, n in counts]
        below = [rate - 100 * low for rate, (low, _) in zip(rates, intervals, strict=True)]
        above = [100 * high - rate for rate, (_, high) in zip(rates, intervals, strict=True)]
        axes.bar(
            places, rates, yerr=[below, above], color=f"C{number}", label=suite, error_kw={"ecolor": "0.3"}
        )
    axes.set_xticks(range(len(bars)), [str(task_id) for _, task_id, _ in bars])
    axes.set(xlabel="task", ylabel="success (%), 95 % interval", ylim=(0, 105))
    axes.set_xlim(-0.8, max(len(bars), 5) - 0.2)  # a lone bar does not fill the plot
    axes.set_title("stand-in assets: not LIBERO scores" if stand_ins else "LIBERO", fontsize="medium")
    axes.legend(fontsize="small", loc="lower right")
    figure.savefig(path, dpi=120)


def compare(first: Path, second: Path) -> str:
    """Paired comparison of two results folders on the episodes that both have.

    Raises:
        ValueError: no episode in common.
    """
    one, two = read_episodes(first), read_episodes(second)
    common = sorted(one.keys() & two.keys())
    if not common:
        raise ValueError(f"{first} and {second} have no finished episode in common.")
    pairs = [(bool(one[key]["success"]), bool(two[key]["success"])) for key in common]
    both, only_first, only_second = (
        pairs.count((True, True)),
        pairs.count((True, False)),
        pairs.count((False, True)),
    )
    n = len(common)
    return "\n".join(
        [
            f"{n} episodes in common (same suite, task and initial state)",
            f"A  {first}: {100 * (both + only_first) / n:.1f} %",
            f"B  {second}: {100 * (both + only_second) / n:.1f} %",
            f"both {both}, only A {only_first}, only B {only_second}, neither {pairs.count((False, False))}",
            f"McNemar's exact test, two-sided: p = {mcnemar(only_first, only_second):.3g}",
        ]
    )
