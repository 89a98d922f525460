"""The report of an evaluation: success rates with intervals, paired comparison, table and plot."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

Episode = dict[str, Any]  # one line of a results file
DIFFERS = "_replay_differs"  # in the name of a video whose episode ended differently when played again


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % confidence interval of a success rate (Wilson's score interval), both limits in [0, 1].

    Raises:
        ValueError: no trials.
    """
    if trials < 1:
        raise ValueError("a success rate needs at least one trial.")
    interval = binomtest(successes, trials).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p value of McNemar's exact test: a binomial test on the pairs whose outcomes differ.

    Args:
        only_first, only_second: number of episodes that only the first, or only the second policy solved.
    """
    differing = only_first + only_second
    return float(binomtest(only_first, differing).pvalue) if differing else 1.0


def key_of(episode: Episode) -> tuple[str, int, int]:
    return episode["suite"], episode["task_id"], episode["episode"]


def read_episodes(folder: Path) -> dict[tuple[str, int, int], Episode]:
    """All finished episodes in a results folder, of every shard. A last line that was not written to its end
    (the process was killed) is left out.

    Raises:
        ValueError: a damaged line elsewhere, or one episode twice with different outcomes.
    """
    episodes: dict[tuple[str, int, int], Episode] = {}
    for path in sorted(Path(folder).glob("episodes-*.jsonl")):
        lines = path.read_text().split("\n")
        for number, line in enumerate(lines[:-1], start=1):  # a finished line ends with a newline
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
    differing = sorted(path.name for path in (folder / "videos").glob(f"*{DIFFERS}.mp4"))
    if differing:
        lines += ["", f"Played again for a video, these ended differently: {', '.join(differing)}."]
    plot_success_rates(groups, folder / "report.png", settings["stand_in_assets"])
    lines += ["", "![success by task](report.png)", "", "## Settings", ""]
    lines += ["```json", json.dumps(settings, indent=2), "```", ""]
    (folder / "report.md").write_text("\n".join(lines))
    return folder / "report.md"


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


def plot_success_rates(groups: dict[str, dict[int, list[Episode]]], path: Path, stand_ins: bool) -> None:
    """Success rate of every task with its interval, one colour per suite."""
    from matplotlib.figure import Figure

    tasks = [task_id for suite in groups.values() for task_id in suite]
    figure = Figure(figsize=(max(4.0, 0.35 * len(tasks) + 2), 3.6), layout="constrained")
    axes, drawn = figure.subplots(), 0
    for number, (suite, episodes) in enumerate(groups.items()):
        _, rates, low, high = np.array([success_rate(rows) for rows in episodes.values()]).T
        axes.bar(
            np.arange(drawn, drawn + len(rates)),
            rates,
            yerr=[rates - low, high - rates],
            color=f"C{number}",
            label=suite,
            error_kw={"ecolor": "0.3"},
        )
        drawn += len(rates)
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set(xlabel="task", ylabel="success (%), 95 % interval", ylim=(0, 105))
    axes.set_xlim(-0.8, max(len(tasks), 5) - 0.2)  # keeps a single bar narrow
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
    outcomes = [(True, True), (True, False), (False, True), (False, False)]
    both, only_first, only_second, neither = map(pairs.count, outcomes)
    return (
        f"{len(common)} episodes in common (same suite, task and initial state)\n"
        f"A  {first}: {100 * (both + only_first) / len(common):.1f} %\n"
        f"B  {second}: {100 * (both + only_second) / len(common):.1f} %\n"
        f"both {both}, only A {only_first}, only B {only_second}, neither {neither}\n"
        f"McNemar's exact test, two-sided: p = {mcnemar(only_first, only_second):.3g}"
    )
