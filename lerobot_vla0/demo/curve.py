"""`lerobot-vla0 curve`: the loss curve of a training run, from what `lerobot-train` printed.

LeRobot itself logs metrics to Weights & Biases only; this works without an account or a network.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from ..files import check_place, new_file

METRICS = {
    "loss": "loss (nats per token)",
    "token_accuracy": "token accuracy",
    "action_error_bins": "action error (bins)",
}


@dataclass
class CurveConfig:
    """What to plot."""

    # Output of lerobot-train, for example from `lerobot-train ... 2>&1 | tee train.log`.
    log: Path
    # Picture to write.
    out: Path = Path("outputs/loss.png")


# In the order in which they come: settings of a run, the bar's length (the steps that are left), metrics.
EVENTS = re.compile(
    r"'log_freq': (?P<every>\d+)|'steps': (?P<steps>\d+)|Training: .*\| \d+/(?P<left>\d+) \[|"
    r"step:(?P<step>\d+)(?P<unit>[KMB]?) (?P<metrics>smpl:.*\bloss:.*)"
)
UNITS = {"": 1, "K": 1000, "M": 1000**2, "B": 1000**3}


def read_log(log: Path) -> dict[str, list[float]]:
    """{"step": [...], "loss": [...], ...} from all lines with metrics that lerobot-train printed.

    LeRobot prints one such line every `log_freq` steps, but rounds the step to thousands ("1K"). Steps are
    therefore counted: from the first line of a run, or, if it was resumed, from its settings and the bar. Of
    a log to which a run was appended, the run's steps replace those that were there.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no such line, or one whose step cannot be told.
    """
    if not Path(log).is_file():
        raise FileNotFoundError(
            f"log={str(log)!r} is no file: give what lerobot-train printed, kept with "
            "`lerobot-train ... 2>&1 | tee train.log`."
        )
    # The progress bar ends its lines with \r, log lines end with \n.
    text = Path(log).read_text(errors="replace").replace("\r", "\n")
    lines: dict[int, str] = {}
    run: dict[str, int] = {}  # settings of the current run
    step = None
    for event in EVENTS.finditer(text):
        if event["metrics"] is None:
            if event["every"]:
                run, step = {}, None
            run.setdefault(event.lastgroup, int(event[event.lastgroup]))
            continue
        printed, unit = int(event["step"]), UNITS[event["unit"]]
        step = None if step is None else step + run["every"]
        if step is None or abs(step - printed * unit) > unit / 2:
            step = printed if unit == 1 else _first_step(run)
            if step is None or abs(step - printed * unit) > unit / 2:
                raise ValueError(
                    f"log={str(log)!r} has a run that begins at step {printed}{event['unit']}, which is "
                    "rounded: give the whole run's log, with the settings that lerobot-train prints first."
                )
            run.setdefault("every", step)
            lines = {earlier: line for earlier, line in lines.items() if earlier < step}
        lines[step] = event["metrics"]
    if not lines:
        raise ValueError(
            f"log={str(log)!r} has no line with metrics of lerobot-train (step:... loss:...): "
            "give what lerobot-train printed, kept with `lerobot-train ... 2>&1 | tee train.log`."
        )
    metrics: dict[str, list[float]] = {"step": list(lines)}
    for name in METRICS:
        values = [re.search(rf"\b{name}:(\S+)", line) for line in lines.values()]
        if all(values):
            try:
                metrics[name] = [float(value[1]) for value in values]
            except ValueError as error:
                raise ValueError(f"log={str(log)!r} is damaged: a {name} is no number ({error}).") from error
    return metrics


def _first_step(run: dict[str, int]) -> int | None:
    """The step of a run's first line, from its settings and its bar."""
    if not {"every", "steps", "left"} <= run.keys():
        return None
    done = run["steps"] - run["left"]
    return (done // run["every"] + 1) * run["every"]


def plot_curve(config: CurveConfig) -> Path:
    """Writes the picture and returns its path.

    Raises:
        ValueError: no such line in the log, or no kind of picture.
        OSError: `out` cannot be written.
    """
    from matplotlib.figure import Figure

    figure, out = Figure(layout="constrained"), check_place(config.out, "file")
    formats = figure.canvas.get_supported_filetypes()
    if out.suffix.lower().lstrip(".") not in formats:
        raise ValueError(f"out={str(config.out)!r} must end with one of .{', .'.join(formats)}.")
    metrics = read_log(config.log)
    shown = [name for name in METRICS if name in metrics]
    figure.set_size_inches(4 * len(shown), 3.2)
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        axes.plot(metrics["step"], metrics[name])
        axes.set(xlabel="step", title=METRICS[name], ylim=(0, None))
        axes.grid(alpha=0.3)
    with new_file(out) as draft:
        figure.savefig(draft, dpi=120)
    last = ", ".join(f"{name} {metrics[name][-1]:.3g}" for name in shown)
    print(f"Wrote {config.out} (step {metrics['step'][-1]}: {last})")
    return Path(config.out)
