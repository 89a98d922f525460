"""`lerobot-vla0 strip`: one episode of a policy as a picture, with the chat behind one of its chunks."""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.envs.utils import preprocess_observation
from PIL import Image

from ..agent import Agent
from ..files import check_place, new_file
from ..libero.env import LiberoEnv
from ..modeling_vla0 import VLA0Policy
from ..options import PolicyOptions
from ..processor_vla0 import load_processors
from .record import check_image_size

FRAME_SIZE = 256  # pixels per side of a frame, whatever the size of the images that the policy sees
MAX_BYTES = 300_000
# Layout, in inches: width, border, space between things, column of the chat's roles, pictures in the chat.
WIDTH, MARGIN, GAP, ROLES, PICTURE = 10.0, 0.15, 0.1, 1.0, 1.0
FONT_SIZE = 9  # points, of the chat
CHARACTER, LINE = 0.602 * FONT_SIZE / 72, 1.5 * FONT_SIZE / 72  # inches; of DejaVu Sans Mono
BACKGROUNDS = {"system": "#eceff1", "user": "#e3f0fd", "assistant": "#e7f5e4"}
HIGHLIGHT = "#1565c0"


@dataclass(kw_only=True)
class StripConfig(PolicyOptions):
    """Which episode to draw. `--policy.path=` names the checkpoint; its fields can be overridden
    (`--policy.device=cpu`). The defaults are the task of `make demo`."""

    # Picture to write, a PNG of at most 300 KB.
    out: Path = Path("outputs/rollout.png")
    # LIBERO suite.
    suite: str = "libero_object"
    # Task id of the suite.
    task: int = 2
    # Which of LIBERO's 50 stored initial states the episode starts from.
    init_state: int = 0
    # LIBERO's assets: auto, real, primitive, or a folder.
    assets: str = "primitive"
    # Side in pixels of the camera images that the policy gets.
    image_size: int = 112
    # Number of frames in the strip.
    frames: int = 6


@dataclass
class Rollout:
    """One episode of T steps."""

    instruction: str
    observations: list[dict[str, Any]]  # T + 1, as the environment gives them
    frames: list[np.ndarray]  # T + 1 of the scene camera, uint8 (FRAME_SIZE, FRAME_SIZE, 3)
    success: bool = False


@dataclass
class Turn:
    """What one role says in the chat."""

    role: str
    parts: list[str]  # of the text, drawn in alternating colours
    pictures: list[np.ndarray]  # uint8 (H, W, 3), before the text


def rollout_strip(config: StripConfig) -> Path:
    """Plays one episode, writes the picture and returns its path.

    Raises:
        ValueError: no policy, fewer than two frames, or an unknown suite, task or initial state.
    """
    config.require_policy("which policy?")
    if config.frames < 2:
        raise ValueError(f"frames={config.frames} must be at least 2.")
    check_image_size(config.image_size)
    out = check_place(config.out, "file")
    if out.suffix.lower() != ".png":
        raise ValueError(f"out={str(config.out)!r} must end with .png: the picture is a PNG.")
    start = {"init_state": config.init_state, "image_size": config.image_size}
    env = LiberoEnv(config.suite, config.task, assets=config.assets, **start)
    path = str(config.policy.pretrained_path)
    policy = VLA0Policy.from_pretrained(path, config=config.policy)
    agent = Agent(policy, *load_processors(config.policy, path))
    try:
        rollout = play_rollout(agent, env)
    finally:
        env.close()
    last = len(rollout.frames) - 1
    steps = np.linspace(0, last, config.frames).round().astype(int).tolist()
    # The chat belongs to one of the middle frames, moved to the last step at which the policy wrote a chunk.
    shown = (config.frames - 1) // 2
    steps[shown] -= steps[shown] % config.policy.n_action_steps
    chat = read_chat(agent, rollout.observations[steps[shown]], rollout.instruction)
    with new_file(out) as draft:
        draft.write_bytes(compress(draw(rollout, steps, shown, chat)))
    print(f"{'Success' if rollout.success else 'Failure'} after {last} steps. Wrote {out}")
    return out


def play_rollout(agent: Agent, env: LiberoEnv) -> Rollout:
    """Plays one episode to its end."""

    def frame() -> np.ndarray:
        # Rendered once more, since the policy's images may be too small to look at. LIBERO's cameras are
        # mounted upside down.
        pixels = env.simulator.sim.render(width=FRAME_SIZE, height=FRAME_SIZE, camera_name="agentview")
        return pixels[::-1, ::-1]

    observation, info = env.reset()
    agent.reset()
    rollout = Rollout(info["task"], [observation], [frame()])
    done = False
    while not done:
        observation, _, terminated, truncated, info = env.step(agent.act(observation, rollout.instruction))
        rollout.observations.append(observation)
        rollout.frames.append(frame())
        done = terminated or truncated
    rollout.success = bool(info["is_success"])
    return rollout


def read_chat(agent: Agent, observation: dict[str, Any], instruction: str) -> list[Turn]:
    """The chat at one observation. The policy writes the chunk once more; unless it samples (`temperature`),
    the chunk is the same."""
    batch = agent.preprocess({**preprocess_observation(observation), "task": [instruction]})
    examples = agent.policy.examples
    checked = examples.check(batch)
    pictures = list(examples.pictures(checked, None)[0].permute(0, 2, 3, 1).cpu().numpy())
    turns = []
    for message in examples.chat.messages(examples.instructions(checked)[0]):
        text = "".join(part["text"] for part in message["content"] if part["type"] == "text")
        shown = [pictures.pop(0) for part in message["content"] if part["type"] == "image"]
        turns.append(Turn(message["role"], [text], shown))
    chunk = agent.policy.predict_action_chunk(batch)[0].long()  # (chunk_size, D)
    return [*turns, Turn("assistant", [examples.codec.to_text(timestep) for timestep in chunk], [])]


def _wrap(parts: list[str], columns: int) -> list[tuple[int, int, str, str]]:
    """Breaks a text into lines of at most `columns` characters: (row, column, word, colour) of every word."""
    placed, row, column = [], 0, 0
    for i, part in enumerate(parts):
        for number, line in enumerate(part.split("\n")):
            if number:
                row, column = row + 1, 0
            for word in line.split():
                if column + len(word) > columns:
                    row, column = row + 1, 0
                placed.append((row, column, word, ("black", HIGHLIGHT)[i % 2]))
                column += len(word) + 1
    return placed


def draw(rollout: Rollout, steps: list[int], shown: int, chat: list[Turn]) -> Image.Image:
    """The picture: frames at `steps` in a row, and below them the chat of the frame with index `shown`."""
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch, Rectangle

    figure = Figure(dpi=160)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), autoscale_on=False)  # inches, y downwards
    axes.axis("off")

    def show(x: float, y: float, width: float, height: float, pixels: np.ndarray, **border: Any) -> None:
        axes.imshow(pixels, extent=(x, x + width, y + height, y), aspect="auto")
        axes.add_patch(Rectangle((x, y), width, height, fill=False, **border))

    def write(x: float, y: float, words: str, **style: Any) -> None:
        axes.text(x, y, words, va="top", **style)

    outcome, color = ("success", "#2e7d32") if rollout.success else ("failure", "#c62828")
    write(MARGIN, MARGIN, f"“{rollout.instruction}”", fontsize=12, weight="bold")
    write(WIDTH - MARGIN, MARGIN, f"{outcome} after {steps[-1]} steps", fontsize=12, color=color, ha="right")
    y, side = MARGIN + 0.35, (WIDTH - 2 * MARGIN + GAP) / len(steps) - GAP
    for i, step in enumerate(steps):
        x, color, line = MARGIN + i * (side + GAP), *((HIGHLIGHT, 3) if i == shown else ("0.4", 0.5))
        show(x, y, side, side, rollout.frames[step], color=color, linewidth=line)
        label = f"step {step}: chat below" if i == shown else f"step {step}"
        write(x + side / 2, y + side + 0.07, label, fontsize=10, color=color, ha="center")
    y += side + 0.35
    for turn in chat:
        write(MARGIN + GAP, y + GAP, turn.role, fontsize=FONT_SIZE, weight="bold", color="0.4")
        left = MARGIN + ROLES
        for pixels in turn.pictures:
            width = PICTURE * pixels.shape[1] / pixels.shape[0]
            show(left, y + GAP, width, PICTURE, pixels, color=HIGHLIGHT, linewidth=2)
            left += width + GAP
        words = _wrap(turn.parts, int((WIDTH - MARGIN - GAP - left) / CHARACTER))
        for row, column, word, color in words:
            x, top = left + column * CHARACTER, y + GAP + row * LINE
            write(x, top, word, fontsize=FONT_SIZE, family="DejaVu Sans Mono", color=color)
        height = 2 * GAP + max(PICTURE if turn.pictures else 0, (words[-1][0] + 0.75) * LINE)
        style = {"boxstyle": "round,pad=0,rounding_size=0.08", "color": BACKGROUNDS[turn.role], "zorder": -1}
        axes.add_patch(FancyBboxPatch((MARGIN, y), WIDTH - 2 * MARGIN, height, **style))
        y += height + GAP
    note = "Colours alternate by timestep. Each has seven integers: x y z, rotation x y z, gripper."
    write(MARGIN, y, note, fontsize=FONT_SIZE, color="0.4")
    y += 0.2 + MARGIN
    axes.set_ylim(y, 0)
    figure.set_size_inches(WIDTH, y)
    buffer = BytesIO()
    figure.savefig(buffer)
    return Image.open(buffer).convert("RGB")


def compress(picture: Image.Image) -> bytes:
    """PNG with a palette of 256 colours, or of fewer if the file would be larger than `MAX_BYTES`."""
    for colors in (256, 64, 16):
        buffer = BytesIO()
        # k-means keeps the colours of small objects, which Pillow's median cut alone turns to grey.
        palette = picture.quantize(colors, kmeans=3, dither=Image.Dither.NONE)
        palette.save(buffer, "PNG", optimize=True)
        if buffer.tell() <= MAX_BYTES:
            break
    return buffer.getvalue()
