"""The picture of `lerobot-vla0 strip`: frames above the integers written for them, a chat, panels."""

from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from .strip_panels import COLORS, MONO, Panel

FRAME_SIZE = 256  # pixels per side of a frame, whatever the size of the images that the policy sees
MAX_BYTES = 300_000
# Layout, in inches: width, border, space between things, column of the chat's roles, pictures in the chat,
# column of the panels.
WIDTH, MARGIN, GAP, ROLES, PICTURE, PANELS = 10.0, 0.15, 0.1, 0.85, 1.0, 3.3
FONT_SIZE = 9  # points, of the chat
CHARACTER, LINE = 0.602 * FONT_SIZE / 72, 1.5 * FONT_SIZE / 72  # inches; of DejaVu Sans Mono
BACKGROUNDS = {"system": "#eceff1", "user": "#e3f0fd", "assistant": "#e7f5e4"}
HIGHLIGHT = COLORS["highlight"]
TIMESTEPS = 8  # of a chunk, under a frame


@dataclass
class Rollout:
    """One episode of T steps."""

    instruction: str
    observations: list[dict[str, Any]]  # T + 1, as the environment gives them
    frames: list[np.ndarray]  # T + 1 of the scene camera, uint8 (FRAME_SIZE, FRAME_SIZE, 3)
    success: bool = False
    averaged: bool = False  # chunks with earlier ones, before they are executed
    # What the policy wrote, by the step at which it looked: the integers of each timestep.
    chunks: dict[int, list[list[int]]] = field(default_factory=dict)

    @property
    def outcome(self) -> str:
        return "success" if self.success else "failure"

    def written_for(self, step: int) -> tuple[list[list[int]], int]:
        """The last chunk that was written when the action of a step was executed, and the number of that
        step's timestep in it, from 0."""
        look = max(earlier for earlier in self.chunks if earlier <= step)
        return self.chunks[look], step - look


@dataclass
class Turn:
    """What one role says in the chat."""

    role: str
    parts: list[str]  # of the text, drawn in alternating colours
    pictures: list[np.ndarray]  # uint8 (H, W, 3), before the text


class Page:
    """A figure that is measured in inches from the upper left corner, and as high as it turns out to be."""

    def __init__(self) -> None:
        from matplotlib.figure import Figure

        self.figure = Figure(dpi=160)
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), autoscale_on=False)
        self.axes.axis("off")

    def show(
        self, x: float, y: float, width: float, height: float, pixels: np.ndarray, **border: Any
    ) -> None:
        from matplotlib.patches import Rectangle

        self.axes.imshow(pixels, extent=(x, x + width, y + height, y), aspect="auto")
        self.axes.add_patch(Rectangle((x, y), width, height, fill=False, **border))

    def write(self, x: float, y: float, words: str, **style: Any) -> None:
        self.axes.text(x, y, words, **{"va": "top", **style})

    def box(self, x: float, y: float, width: float, height: float, color: str, zorder: float = -1) -> None:
        from matplotlib.patches import FancyBboxPatch

        style = {"boxstyle": "round,pad=0,rounding_size=0.06", "color": color, "zorder": zorder}
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, linewidth=0, **style))

    def finish(self, height: float, panels: list[tuple[Panel, float, float, float, float]]) -> Image.Image:
        """Draws the panels, each with its place (x, y, width, height), and renders the page."""
        self.axes.set_ylim(height, 0)
        self.figure.set_size_inches(WIDTH, height)
        for panel, x, y, wide, high in panels:
            place = x / WIDTH, 1 - (y + high) / height, wide / WIDTH, high / height
            panel.draw(self.figure.add_axes(place))
        buffer = BytesIO()
        self.figure.savefig(buffer)
        return Image.open(buffer).convert("RGB")


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


def draw(
    rollout: Rollout, steps: list[int], shown: int, chat: list[Turn], panels: list[Panel] | None = None
) -> Image.Image:
    """The picture: frames at `steps` in a row, each above the integers that were written for it; below them
    the chat of the frame with index `shown`, and the panels beside it."""
    page, panels = Page(), panels or []
    page.write(MARGIN, MARGIN, f"“{rollout.instruction}”", fontsize=12, weight="bold")
    ending = f"{rollout.outcome} after {steps[-1]} steps"
    page.write(WIDTH - MARGIN, MARGIN, ending, fontsize=12, color=COLORS[rollout.outcome], ha="right")
    y = _draw_frames(page, MARGIN + 0.35, rollout, steps, shown) + GAP
    executed = "executed here, averaged with earlier chunks" if rollout.averaged else "executed at that step"
    note = (
        "Under each frame: the integers last written, a line per timestep (x y z, rotation x y z, gripper). "
        f"Blue: {executed}."
    )
    page.write(MARGIN, y, note, fontsize=FONT_SIZE, color="0.4")
    y += 0.3
    column = PANELS + GAP if panels else 0
    # Chat and panels end at one height. Of what is left, the first panel or the last turn takes all.
    beside = sum(panel.height + GAP for panel in panels) - GAP
    bottom = _draw_chat(page, y, WIDTH - 2 * MARGIN - column, chat, y + beside)
    spare = max(0.0, bottom - y - beside)
    placed, top, x = [], y, WIDTH - MARGIN - PANELS
    for panel in panels:
        height = panel.height + (spare if panel is panels[0] else 0)
        page.box(x, top, PANELS, height, BACKGROUNDS["system"])
        page.write(x + GAP, top + GAP, panel.title, fontsize=FONT_SIZE, weight="bold", color="0.4")
        page.write(x + PANELS - GAP, top + GAP, panel.result, fontsize=FONT_SIZE, ha="right")
        left, right, above, below = panel.borders
        placed.append((panel, x + left, top + above, PANELS - left - right, height - above - below))
        top += height + GAP
    return page.finish(bottom + MARGIN, placed)


def _draw_frames(page: Page, y: float, rollout: Rollout, steps: list[int], shown: int) -> float:
    """Frames, and the integers below them. Returns where they end."""
    side = (WIDTH - 2 * MARGIN + GAP) / len(steps) - GAP
    written = {step: rollout.written_for(step) for step in steps if step < len(rollout.frames) - 1}
    rows = [[str(integer) for integer in row] for chunk, _ in written.values() for row in chunk]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    # So that a line fits under a frame.
    font = min(FONT_SIZE, (side - GAP) / (sum(widths) + len(widths) - 1) / 0.602 * 72)
    line = 1.5 * font / 72
    height = line * min(TIMESTEPS, max(len(chunk) for chunk, _ in written.values())) + GAP
    for i, step in enumerate(steps):
        x, color, border = MARGIN + i * (side + GAP), *((HIGHLIGHT, 3) if i == shown else ("0.4", 0.5))
        page.show(x, y, side, side, rollout.frames[step], color=color, linewidth=border)
        label = f"step {step}: chat below" if i == shown else f"step {step}"
        page.write(x + side / 2, y + side + 0.07, label, fontsize=10, color=color, ha="center")
        top = y + side + 0.3
        page.box(x, top, side, height, BACKGROUNDS["assistant" if step in written else "system"])
        if step not in written:
            style = {"fontsize": 10, "color": COLORS[rollout.outcome], "ha": "center", "va": "center"}
            page.write(x + side / 2, top + height / 2, f"the end:\n{rollout.outcome}", **style)
            continue
        chunk, executed = written[step]
        # Of a long chunk, the lines around the executed one.
        first = max(0, min(executed - TIMESTEPS // 2, len(chunk) - TIMESTEPS))
        for row, integers in enumerate(chunk[first : first + TIMESTEPS]):
            words = " ".join(str(n).rjust(width) for n, width in zip(integers, widths, strict=True))
            middle, style = top + GAP / 2 + (row + 0.5) * line, {"color": "0.35"}
            if first + row == executed:
                page.box(x, middle - line / 2, side, line, HIGHLIGHT, zorder=0)
                style = {"color": "white", "weight": "bold"}
            style |= {"fontsize": font, "family": MONO, "ha": "center", "va": "center_baseline"}
            page.write(x + side / 2, middle, words, **style)
    return y + side + 0.3 + height


def _draw_chat(page: Page, y: float, width: float, chat: list[Turn], least: float) -> float:
    """One box per turn, the last one down to `least` at least. Returns where it ends."""
    for turn in chat:
        page.write(MARGIN + GAP, y + GAP, turn.role, fontsize=FONT_SIZE, weight="bold", color="0.4")
        left = MARGIN + GAP + ROLES
        for pixels in turn.pictures:
            wide = PICTURE * pixels.shape[1] / pixels.shape[0]
            page.show(left, y + GAP, wide, PICTURE, pixels, color=HIGHLIGHT, linewidth=2)
            left += wide + GAP
        words = _wrap(turn.parts, int((MARGIN + width - GAP - left) / CHARACTER))
        for row, column, word, color in words:
            x, top = left + column * CHARACTER, y + GAP + row * LINE
            page.write(x, top, word, fontsize=FONT_SIZE, family=MONO, color=color)
        height = 2 * GAP + max(PICTURE if turn.pictures else 0, (words[-1][0] + 0.75) * LINE)
        if turn is chat[-1]:
            height = max(height, least - y)
        page.box(MARGIN, y, width, height, BACKGROUNDS[turn.role])
        y += height + GAP
    return y - GAP


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
