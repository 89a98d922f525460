"""Videos of episodes: the cameras side by side, with instruction, step and outcome on the border."""

import textwrap
from collections.abc import Iterable
from io import BytesIO
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .env import FPS

SIDE = 256  # pixels of each camera's picture
TOP, BOTTOM, LINE, COLUMNS = 44, 24, 18, 32  # of the borders: pixels, of a line; characters per camera
COLORS = {None: "#37474f", True: "#2e7d32", False: "#c62828"}


def frame(pixels: dict[str, np.ndarray], instruction: str, step: int, success: bool | None) -> np.ndarray:
    """One frame.

    Args:
        pixels: uint8 (size, size, 3) of each camera.
        success: the outcome, at the episode's end; before, None.

    Returns:
        uint8 (H, W, 3), both even.
    """
    width = len(pixels) * SIDE
    canvas = Image.new("RGB", (width, TOP + SIDE + BOTTOM), COLORS[success])
    for place, picture in enumerate(pixels.values()):
        canvas.paste(Image.fromarray(picture).resize((SIDE, SIDE)), (place * SIDE, TOP))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=15)
    for row, line in enumerate(textwrap.wrap(instruction, len(pixels) * COLUMNS, max_lines=2)):
        draw.text((6, 3 + row * LINE), line, "white", font)
    outcome = {None: "", True: "success", False: "failure"}[success]
    for text, x, anchor in ((f"step {step}", 6, "la"), (outcome, width - 6, "ra")):
        draw.text((x, TOP + SIDE + 2), text, "white", font, anchor=anchor)
    return np.asarray(canvas)


def encode(frames: Iterable[np.ndarray]) -> bytes:
    """An MP4 file (H.264) at the control frequency. Holds one frame at a time, where LeRobot's `write_video`
    takes a list of all."""
    buffer, stream = BytesIO(), None
    with av.open(buffer, "w", format="mp4") as container:
        for image in frames:
            picture: Any = av.VideoFrame.from_ndarray(image, format="rgb24")
            if stream is None:
                stream = container.add_stream("libx264", rate=FPS)
                stream.width, stream.height, stream.pix_fmt = picture.width, picture.height, "yuv420p"
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return buffer.getvalue()
