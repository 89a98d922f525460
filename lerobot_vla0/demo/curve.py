"""`lerobot-vla0 curve`: the loss curve of a training run, from what `lerobot-train` printed.

LeRobot itself logs metrics to Weights & Biases only; this works without an account or a network.
"""

import re
from dataclasses import dataclass
from pathlib import Path

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


def read_log(log: Path) -> dict[str, list[float]]:
    """{"step": [...], "loss": [...], ...} from all lines with metrics that lerobot-train printed.

    LeRobot prints one such line every `log_freq` steps, but rounds the step to thousands ("1K"). Steps are
    therefore counted from the first line.

    Raises:
        ValueError: no such line, or a log that does not begin at the start of a run.
    """
    # The progress bar ends its lines with \r, log lines end with \n.
    text = Path(log).read_text(errors="replace").replace("\r", "\n")
    lines = re.findall(r"step:(\d+)([KMB]?) (smpl:.*)", text)
    if not lines:
        raise ValueError(f"log={str(log)!r} has no line with metrics of lerobot-train (step:... loss:...).")
    if lines[0][1]:
        raise ValueError(
            f"log={str(log)!r} begins at step {lines[0][0]}{lines[0][1]}: give the whole run's log."
        )
    every = int(lines[0][0])
    metrics: dict[str, list[float]] = {"step": [every * (i + 1) for i in range(len(lines))]}
    for name in METRICS:
        values = [re.search(rf"\b{name}:([-\d.e+]+|nan)", line[2]) for line in lines]
        if all(values):
            metrics[name] = [float(value[1]) for value in values]
    return metrics


def plot_curve(config: CurveConfig) -> Path:
    """Writes the picture and returns its path."""
    from matplotlib.figure import Figure

    metrics = read_log(config.log)
    shown = [name for name in METRICS if name in metrics]
    figure = Figure(figsize=(4 * len(shown), 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        axes.plot(metrics["step"], metrics[name])
        axes.set(xlabel="step", title=METRICS[name], ylim=(0, None))
        axes.grid(alpha=0.3)
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.out, dpi=120)
    last = ", ".join(f"{name} {metrics[name][-1]:.3g}" for name in shown)
    print(f"Wrote {config.out} (step {metrics['step'][-1]}: {last})")
    return Path(config.out)
