"""Panels of `lerobot-vla0 strip`: the loss of a training run, and the success rates of results folders.

A panel is a box with a line of text, `title` on the left and `result` on the right, and a plot, which `draw`
draws. `height` in inches is the least it needs; `borders` are around the plot's axes, in inches: left, right,
above, below.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import read_json, reading
from ..libero.report import read_episodes, success_rate
from ..libero.results import SETTINGS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"highlight": "#1565c0", "success": "#2e7d32", "failure": "#c62828"}
MONO = "DejaVu Sans Mono"
ROW = 0.56  # inches per results folder
NAME_LENGTH = 26  # characters


@dataclass
class Score:
    """Success of one results folder. Rates are in percent."""

    name: str
    episodes: str  # which they were
    successes: int
    trials: int
    low: float  # 95 % interval
    high: float
    stand_ins: bool  # these are not LIBERO scores


class LossPanel:
    """The loss by step.

    Args:
        metrics: from `curve.read_log`.
    """

    title, height, borders = "training loss", 1.4, (0.35, 0.25, 0.35, 0.38)

    def __init__(self, metrics: dict[str, list[float]]) -> None:
        self.metrics = metrics
        self.result = f"{metrics['loss'][-1]:.3g} nats/token, step {metrics['step'][-1]:,}"

    def draw(self, axes: "Axes") -> None:
        steps, loss = self.metrics["step"], self.metrics["loss"]
        axes.plot(steps, loss, color=COLORS["highlight"], linewidth=1.5, marker="." if len(loss) < 3 else "")
        axes.set(ylim=(0, None), xlim=(0, steps[-1]), facecolor="none")
        axes.set_xlabel("step", fontsize=8, labelpad=1)
        axes.tick_params(labelsize=8, length=2, pad=2)
        axes.locator_params(nbins=5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)


class SuccessPanel:
    """A success rate with its interval for each results folder."""

    title, result = "success, with 95 % intervals", ""

    def __init__(self, scores: list[Score]) -> None:
        self.scores = scores
        self.stand_ins = any(score.stand_ins for score in scores)
        note = 0.2 if self.stand_ins else 0
        self.height, self.borders = 0.33 + ROW * len(scores) + note, (0.1, 0.15, 0.28, 0.05 + note)

    def draw(self, axes: "Axes") -> None:
        axes.axis("off")
        axes.set(xlim=(0, 100), ylim=(len(self.scores), 0))
        for row, score in enumerate(self.scores):
            rate, line = 100 * score.successes / score.trials, row + 0.54
            name = score.name if len(score.name) <= NAME_LENGTH else score.name[: NAME_LENGTH - 1] + "…"
            axes.text(0, row + 0.24, name, fontsize=9, va="center")
            counts = f"{score.successes}/{score.trials}"
            axes.text(100, row + 0.24, counts, fontsize=11, weight="bold", ha="right", va="center")
            bar = {"solid_capstyle": "butt", "clip_on": False}
            axes.plot([0, 100], [line] * 2, color="white", linewidth=7, **bar)
            axes.plot([score.low, score.high], [line] * 2, color="#a5d6a7", linewidth=7, **bar)
            axes.plot([rate], [line], "o", color=COLORS["success"], markersize=7, clip_on=False)
            axes.text(0, row + 0.82, score.episodes, fontsize=8, color="0.4", va="center")
            interval = f"{score.low:.1f}–{score.high:.1f} %"
            axes.text(100, row + 0.82, interval, fontsize=8, color="0.4", ha="right", va="center")
        if self.stand_ins:
            note = "stand-in assets: not LIBERO scores"
            axes.text(0, len(self.scores) + 0.2, note, fontsize=8, color="0.4", va="center")


Panel = LossPanel | SuccessPanel


def split_folders(reports: str) -> list[Path]:
    """The results folders that `reports` names, separated by commas.

    Raises:
        ValueError: it names none, or one twice.
    """
    names = [name.strip() for name in reports.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(
            f"reports={reports!r} must name results folders of `lerobot-vla0 eval` (its --out), each once, "
            "separated by commas."
        )
    return [Path(name) for name in names]


def read_score(folder: Path, weights: str) -> Score:
    """Success of all finished episodes in a results folder.

    Args:
        weights: `results.weights_hash` of the policy whose success it should be.

    Raises:
        ValueError: there is no such folder, it holds no finished episode, or those of another policy.
    """
    shown = f"reports={str(folder)!r}"
    rows = list(read_episodes(folder).values())
    if not rows or not (folder / SETTINGS).is_file():
        reason = "holds no finished episode" if not rows else f"lacks {SETTINGS}"
        raise ValueError(
            f"{shown} {reason if folder.is_dir() else 'is no folder'}: give the --out of `lerobot-vla0 "
            "eval`, once it has evaluated this policy."
        )
    with reading(folder / SETTINGS):
        settings = read_json(folder / SETTINGS)
        tested, stand_ins = settings["weights"], bool(settings["stand_in_assets"])
        path = settings["policy_path"]
    if tested != weights:
        raise ValueError(
            f"{shown} holds results of other weights ({path}) than those of --policy.path. Evaluate this "
            "policy, or leave the folder out."
        )
    with reading(f"a results file in {folder}"):
        successes, _, low, high = success_rate(rows)
        tasks, states = ({row[key] for row in rows} for key in ("task", "init_state"))
        which = f"{len(tasks)} tasks" if len(tasks) > 1 else f"initial states {min(states)}–{max(states)}"
    name = folder.resolve().name
    name = (name.removeprefix("eval").strip("_-") or name).replace("_", " ")
    return Score(name, which, successes, len(rows), low, high, stand_ins)
