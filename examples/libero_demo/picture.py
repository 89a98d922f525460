"""One picture of a policy: an episode with the integers that it wrote, one chat, training loss and success.

python examples/libero_demo/picture.py --policy.path=<folder> --log=train.log --reports=[eval] --out=demo.png
"""

import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image
from torch import Tensor

from lerobot_vla0.agent import Agent
from lerobot_vla0.cli import PolicyOptions, parse_options
from lerobot_vla0.dataset import to_task_bins
from lerobot_vla0.examples import Observation
from lerobot_vla0.files import read_json
from lerobot_vla0.libero.env import LiberoEnv, cameras_of
from lerobot_vla0.libero.report import read_episodes, success_rate, weights_hash

NUM_FRAMES, FRAME_SIZE = 6, 256  # pixels, whatever the size of the policy's images
# Inches: width of the page, its border, space between boxes, width of a plot, height of the chat's picture.
WIDTH, MARGIN, GAP, PLOTS, PICTURE = 10.0, 0.15, 0.1, 3.3, 1.0
FONT, DPI = 9, 160  # points, pixels per inch
CHARACTER, LINE = 0.602 * FONT / 72, 1.5 * FONT / 72  # inches, of DejaVu Sans Mono
MONO, BLUE, GREY, GREEN, RED = "DejaVu Sans Mono", "#1565c0", "0.4", "#2e7d32", "#c62828"
BOXES = {"system": "#eceff1", "user": "#fdf3e1", "assistant": "#e7f5e4"}


@dataclass(kw_only=True)
class PictureConfig(PolicyOptions):
    """What to draw. `--policy.path=` names the checkpoint."""

    # Picture to write, a PNG.
    out: Path
    # Output of the lerobot-train run that made the policy, from its first step to its last.
    log: Path
    # Results folders of `lerobot-vla0 eval` on the policy. The first episode of the first one is drawn.
    reports: list[Path]


class Episode:
    """Plays the first episode of a results folder once more. Records its frames, and each chunk by the step
    at which it was written: chunks[step] = (the policy's observation, integers of each timestep)."""

    def __init__(self, agent: Agent, report: Path) -> None:
        self.frames: list[np.ndarray] = []
        self.chunks: dict[int, tuple[Observation, list[list[int]]]] = {}
        self.written: list[int] = []  # of each step, the step at which its chunk was written
        decode, config = agent.policy.decoder.decode, agent.policy.config

        def decode_and_record(observation: Observation, *args: Any, **kwargs: Any) -> Tensor:
            bins = decode(observation, *args, **kwargs)  # (1, T, D), of the data set's range
            integers = to_task_bins(bins, observation.task_range, config.num_bins)[0].round().int()
            self.chunks[len(self.frames) - 1] = observation, integers.tolist()
            return bins

        agent.policy.decoder.decode = decode_and_record
        settings, first = read_json(report / "settings.json"), next(iter(read_episodes(report).values()))
        pictures = {"image_size": settings["image_size"], "cameras": cameras_of(config)}
        assets = "primitive" if settings["stand_in_assets"] else "auto"
        env = LiberoEnv(first["suite"], first["task_id"], assets=assets, **pictures)
        observation, info = env.reset(options={"init_state": first["init_state"]})
        self.instruction, ended = info["task"], False
        while not ended:
            self._render(env)
            action = agent.act(observation, self.instruction)
            self.written.append(max(self.chunks))
            observation, _, terminated, truncated, info = env.step(action)
            ended = terminated or truncated
        self._render(env)
        env.close()
        self.outcome, self.color = ("success", GREEN) if info["is_success"] else ("failure", RED)

    def _render(self, env: LiberoEnv) -> None:
        # Larger than the policy's images. LIBERO's cameras are mounted upside down.
        pixels = env.simulator.sim.render(width=FRAME_SIZE, height=FRAME_SIZE, camera_name="agentview")
        self.frames.append(pixels[::-1, ::-1])


def write(page: Axes, x: float, y: float, text: str, **style: Any) -> None:
    page.text(x, y, text, **{"va": "top", "fontsize": FONT, **style})


def draw_box(page: Axes, x: float, y: float, width: float, height: float, color: str) -> None:
    style = {"boxstyle": "round,pad=0,rounding_size=0.06", "color": color, "zorder": 0}
    page.add_patch(FancyBboxPatch((x, y), width, height, linewidth=0, **style))


def add_plot(page: Axes, y: float, height: float, title: str, left: float, right: float) -> Axes:
    """A box at the page's right border, with a title and axes `left` and `right` inches inside."""
    x = WIDTH - MARGIN - PLOTS
    draw_box(page, x, y, PLOTS, height, BOXES["system"])
    write(page, x + GAP, y + GAP, title, weight="bold", color=GREY)
    area = np.array([x + left, WIDTH - y - height + 0.4, PLOTS - left - right, height - 0.8]) / WIDTH
    axes = page.figure.add_axes(tuple(area), facecolor="none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    return axes


def draw_frames(page: Axes, y: float, episode: Episode, steps: list[int], chat: int, legend: str) -> float:
    """Frames in a row, each above the integers of its chunk. Returns the lower end."""
    side = (WIDTH - 2 * MARGIN + GAP) / len(steps) - GAP
    chunks = {step: integers for step, (_, integers) in episode.chunks.items()}
    digits, dim = len(str(np.concatenate([*chunks.values()]).max())), len(chunks[0][0])
    font = min(FONT, (side - GAP) / (dim * (digits + 1) - 1) / 0.602 * 72)  # so that a timestep fits
    line, top = 1.5 * font / 72, y + side + 0.3
    height = max(map(len, chunks.values())) * line + GAP
    centre = {"ha": "center", "va": "center_baseline"}
    for i, step in enumerate(steps):
        x = MARGIN + i * (side + GAP)
        page.imshow(episode.frames[step], extent=(x, x + side, y + side, y), aspect="auto", zorder=1)
        label, weight = f"step {step}", "normal"
        if i == chat:
            label, weight = f"{label}: chat below", "bold"
            draw_box(page, x - 0.04, y - 0.04, side + 0.08, side + 0.08, "black")
        write(page, x + side / 2, y + side + 0.07, label, ha="center", weight=weight)
        if step == steps[-1]:
            write(page, x + side / 2, top + height / 2, legend, fontsize=8, color=GREY, **centre)
            break
        draw_box(page, x, top, side, height, BOXES["assistant"])
        for row, timestep in enumerate(chunks[episode.written[step]]):
            middle, style = top + GAP / 2 + (row + 0.5) * line, {"color": GREY}
            if episode.written[step] + row == step:
                draw_box(page, x, middle - line / 2, side, line, BLUE)
                style = {"color": "white", "weight": "bold"}
            text = " ".join(str(n).rjust(digits) for n in timestep)
            write(page, x + side / 2, middle, text, fontsize=font, family=MONO, **centre, **style)
    return top + height


def draw_chat(page: Axes, y: float, width: float, agent: Agent, episode: Episode, step: int) -> float:
    """The chat of the chunk written at a step, a box per turn. Returns the lower end."""
    examples, (observation, integers) = agent.policy.examples, episode.chunks[step]
    pictures = examples.pictures(observation, None)[0].cpu().numpy()  # (N, 3, H, W)
    picture = np.concatenate([*pictures], axis=2).transpose(1, 2, 0)
    messages = examples.chat.messages(examples.instructions(observation)[0])
    turns = [(m["role"], "".join(part.get("text", "") for part in m["content"])) for m in messages]
    for role, text in [*turns, ("assistant", "\n".join(" ".join(map(str, row)) for row in integers))]:
        write(page, MARGIN + GAP, y + GAP, role, weight="bold", color=GREY)
        left, top, least = MARGIN + GAP + 0.85, y + GAP, 0.0
        if role == "user":
            right, least = left + PICTURE * picture.shape[1] / picture.shape[0], PICTURE
            page.imshow(picture, extent=(left, right, top + PICTURE, top), aspect="auto", zorder=1)
            left = right + GAP
        columns = int((MARGIN + width - GAP - left) / CHARACTER)
        lines = [part for line in text.split("\n") for part in textwrap.wrap(line, columns)]
        for row, line in enumerate(lines):
            style = {"color": BLUE, "weight": "bold"} if role == "assistant" and row == 0 else {}
            write(page, left, top + row * LINE, line, family=MONO, **style)
        height = 2 * GAP + max(least, (len(lines) - 0.25) * LINE)
        draw_box(page, MARGIN, y, width, height, BOXES[role])
        y += height + GAP
    return y - GAP


def draw_loss(page: Axes, y: float, height: float, log: Path, train: dict[str, Any]) -> None:
    """The loss that `lerobot-train` printed. It rounds a step above 1,000, so steps are counted."""
    loss = [float(value) for value in re.findall(r"step:\S+ smpl:.*?\bloss:(\S+)", log.read_text())]
    steps = np.arange(train["log_freq"], train["steps"] + 1, train["log_freq"])
    if len(loss) != len(steps):
        raise ValueError(f"log={str(log)!r} has {len(loss)} lines with a loss, a whole run {len(steps)}.")
    axes = add_plot(page, y, height, f"training loss: {loss[-1]:.3g} nats per token", left=0.35, right=0.25)
    axes.plot(steps, loss, color="0.2")
    axes.set(xlim=(0, train["steps"]), ylim=(0, None), xlabel="step")


def draw_success(page: Axes, y: float, height: float, reports: list[Path], weights: str) -> None:
    """Success rates of results folders."""
    axes, names = add_plot(page, y, height, "success, 95 % intervals", left=1.05, right=0.5), []
    for row, report in enumerate(reports):
        settings, episodes = read_json(report / "settings.json"), [*read_episodes(report).values()]
        if settings["weights"] != weights:
            raise ValueError(f"reports: {report} holds results of other weights than --policy.path.")
        successes, rate, low, high = success_rate(episodes)
        states = [episode["init_state"] for episode in episodes]
        names.append(
            f"{report.name.removeprefix('eval_').replace('_', ' ')}\nstates {min(states)}–{max(states)}"
        )
        axes.barh(row, high - low, left=low, height=0.3, color="#a5d6a7")
        axes.plot(rate, row, "o", color=GREEN, clip_on=False)
        axes.text(104, row, f"{successes}/{len(episodes)}", weight="bold", va="center", color=GREEN)
    axes.set(xlim=(0, 100), ylim=(len(reports) - 0.5, -0.5), yticks=range(len(reports)), yticklabels=names)
    axes.set_xticks([0, 50, 100], ["0 %", "50 %", "100 %"])
    axes.set_xlabel("stand-in assets: not LIBERO scores" if settings["stand_in_assets"] else "")


def draw(config: PictureConfig) -> None:
    """Plays the episode and writes the picture."""
    policy, right = config.require_policy("which policy?"), WIDTH - MARGIN
    agent = Agent.from_config(policy)
    episode = Episode(agent, config.reports[0])
    train = read_json(Path(policy.pretrained_path) / "train_config.json")
    data = read_json(Path(train["dataset"]["root"]) / "meta/info.json")
    page = Figure((WIDTH, WIDTH), dpi=DPI).add_axes((0, 0, 1, 1), autoscale_on=False)
    page.set(xlim=(0, WIDTH), ylim=(WIDTH, 0))
    page.set_axis_off()
    write(page, MARGIN, MARGIN, f"“{episode.instruction}”", fontsize=12, weight="bold")
    ending = f"{episode.outcome} after {len(episode.written)} steps"
    write(page, right, MARGIN, ending, fontsize=12, ha="right", color=episode.color)
    parameters = sum(parameter.numel() for parameter in agent.policy.parameters()) / 1e6
    trained = f"{parameters:.2g} million parameters ({policy.vlm}), trained for {train['steps']:,} steps"
    trained += f" on {data['total_episodes']} episodes of {train['dataset']['root']}"
    write(page, MARGIN, MARGIN + 0.28, trained, color=GREY)
    # The chat belongs to a frame in the middle, moved to the last step at which a chunk was written.
    steps, chat = np.linspace(0, len(episode.written), NUM_FRAMES).round().astype(int), NUM_FRAMES // 2 - 1
    steps[chat] = episode.written[steps[chat]]
    executed = "executed here" if policy.ensemble_size == 1 else "executed, averaged"
    legend = "lines: timesteps\nx y z, rotation x y z, gripper\n"
    legend += f"0, {policy.num_bins / 2:g}, {policy.num_bins} are −1, 0, +1\nblue: {executed}"
    y = draw_frames(page, MARGIN + 0.55, episode, steps.tolist(), chat, legend) + 2 * GAP
    bottom = draw_chat(page, y, right - MARGIN - PLOTS - GAP, agent, episode, steps[chat])
    half = (bottom - y - GAP) / 2
    draw_loss(page, y, half, config.log, train)
    draw_success(page, bottom - half, half, config.reports, weights_hash(policy))
    page.figure.savefig(config.out)
    picture = Image.open(config.out).convert("RGB").crop((0, 0, WIDTH * DPI, (bottom + MARGIN) * DPI))
    # A palette takes a third of the bytes; k-means preserves the colours of small objects.
    picture.quantize(256, kmeans=3, dither=Image.Dither.NONE).save(config.out, optimize=True)
    print(f"{ending.capitalize()}. Wrote {config.out}")


if __name__ == "__main__":
    rcParams["font.size"] = 8  # of the plots
    draw(parse_options(PictureConfig, "picture.py", sys.argv[1:]))
