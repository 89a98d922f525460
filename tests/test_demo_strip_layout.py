from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from lerobot_vla0.demo.strip_layout import (
    HIGHLIGHT,
    MAX_BYTES,
    MONO,
    Rollout,
    Turn,
    _wrap,
    compress,
    draw,
)
from lerobot_vla0.demo.strip_panels import LossPanel, Score, SuccessPanel

COLORS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30)]
SCORE = Score("held out", "initial states 40–49", 9, 10, 59.6, 98.2, stand_ins=True)


def solid(color, size=256) -> np.ndarray:
    return np.full((size, size, 3), color, dtype=np.uint8)


def noise(size=256, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def chunk(look: int, length: int = 8) -> list[list[int]]:
    """The first integer tells the step at which it was written, the second one the timestep."""
    return [[look, timestep, 500, 500, 500, 500, 1000] for timestep in range(length)]


def make_rollout(frames, success=True, length=8, **other) -> Rollout:
    chunks = {look: chunk(look, length) for look in range(0, len(frames) - 1, length)}
    return Rollout("pick up the milk", [], frames, success, chunks=chunks, **other)


def test_wrap():
    words = _wrap(["one two three", "four\nfive"], columns=8)
    assert [(row, column, word) for row, column, word, _ in words] == [
        (0, 0, "one"), (0, 4, "two"), (1, 0, "three"), (2, 0, "four"), (3, 0, "five"),
    ]  # fmt: skip
    assert [color for *_, color in words] == ["black"] * 3 + [HIGHLIGHT] * 2


def test_integers_of_a_step():
    rollout = make_rollout([None] * 21)
    assert rollout.written_for(0) == (chunk(0), 0)
    assert rollout.written_for(15) == (chunk(8), 7)
    assert rollout.written_for(16) == (chunk(16), 0)


@pytest.fixture
def chat() -> list[Turn]:
    return [
        Turn("system", ["Analyze the input image. " * 12], []),
        Turn("user", ["pick up the milk\nState: 1 2 3"], [noise(56), noise(56)]),
        Turn("assistant", [" ".join(["1000"] * 7)] * 8, []),
    ]


@pytest.fixture
def written(monkeypatch) -> list[tuple[str, dict]]:
    """What is drawn as text, with its style."""
    from matplotlib.axes import Axes

    texts, write = [], Axes.text
    monkeypatch.setattr(
        Axes, "text", lambda self, x, y, s, **style: texts.append((s, style)) or write(self, x, y, s, **style)
    )
    return texts


@pytest.mark.parametrize(("success", "outcome"), [(True, "success"), (False, "failure")])
def test_picture(chat, written, success, outcome):
    frames = [solid(COLORS[step // 10]) for step in range(31)]
    picture = draw(make_rollout(frames, success), [0, 10, 20, 30], 1, chat)
    width, height = picture.size
    assert width == 1600 and height < width
    for i, color in enumerate(COLORS):  # the four frames in a row
        pixel = picture.getpixel((width * (2 * i + 1) // 8, 250))
        assert np.allclose(pixel, color, atol=2)
    words = [text for text, _ in written]
    assert {"“pick up the milk”", f"{outcome} after 30 steps", f"the end:\n{outcome}"} <= set(words)
    assert {"step 0", "step 10: chat below", "step 20", "step 30"} <= set(words)
    assert {"system", "user", "assistant", "Analyze", "State:"} <= set(words)
    assert words.count("1000") == 56
    # All eight lines of three chunks; of each the executed one is marked.
    lines = [(text.split(), style) for text, style in written if text.endswith(" 1000")]
    assert len(lines) == 24 and all(style["family"] == MONO for _, style in lines)
    marked = [tuple(map(int, integers[:2])) for integers, style in lines if style["color"] == "white"]
    assert marked == [(0, 0), (8, 2), (16, 4)]
    assert "Blue: executed at that step." in " ".join(words)


def test_a_long_chunk_shows_the_lines_around_the_executed_one(chat, written):
    rollout = make_rollout([solid(COLORS[0])] * 41, length=50, averaged=True)
    draw(rollout, [0, 20, 39, 40], 1, chat)
    lines = [int(text.split()[1]) for text, _ in written if text.endswith(" 1000")]
    assert lines == [*range(8), *range(16, 24), *range(35, 43)]
    assert any("averaged with earlier chunks" in text for text, _ in written)


def test_lines_fit_under_their_frames(chat):
    """Integers of four digits, under many frames and under few."""
    from matplotlib.figure import Figure

    for frames in (2, 6, 12):
        rollout = make_rollout([solid(COLORS[0])] * (frames + 1))
        rollout.chunks = {0: [[1000] * 7] * frames}
        texts, savefig = [], Figure.savefig

        def measure(figure, *args, texts=texts, savefig=savefig, **kwargs):
            savefig(figure, *args, **kwargs)
            lines = [text for text in figure.axes[0].texts if text.get_text().startswith("1000 ")]
            texts.extend(line.get_window_extent().width for line in lines)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Figure, "savefig", measure)
            draw(rollout, list(range(frames)), 0, chat)
        assert texts and max(texts) < (1600 - 48) / frames


def test_panels_are_beside_the_chat(chat, written):
    rollout = make_rollout([solid(COLORS[0])] * 21)
    loss = LossPanel({"step": [50, 100], "loss": [2.5, 0.25]})
    plain = draw(rollout, [0, 10, 20], 1, chat)
    one, two, eight = (SuccessPanel([SCORE] * number) for number in (1, 2, 8))
    for panels in ([loss], [one], [loss, two], [eight]):
        written.clear()
        picture = draw(rollout, [0, 10, 20], 1, chat, panels)
        words = [text for text, _ in written]
        assert all(panel.title in words for panel in panels)
        assert ("0.25 nats/token, step 100" in words) == (loss in panels)
        assert picture.size[0] == 1600 and picture.size[1] >= plain.size[1]
        # The bottom of the assistant's box and of the last panel are at the same height, near the border.
        columns = [[picture.getpixel((x, y)) for y in range(picture.size[1])] for x in (100, 1500)]
        ends = [max(y for y, pixel in enumerate(column) if pixel != (255, 255, 255)) for column in columns]
        assert abs(ends[0] - ends[1]) <= 2 and 15 < picture.size[1] - ends[0] < 35


@pytest.mark.slow
def test_file_is_small(chat):
    """Six frames of noise, which cannot be compressed well."""
    rollout = make_rollout([noise(seed=i) for i in range(6)])
    panels = [LossPanel({"step": [50, 100], "loss": [2.5, 0.25]}), SuccessPanel([SCORE] * 2)]
    file = compress(draw(rollout, list(range(6)), 2, chat, panels))
    assert file.startswith(b"\x89PNG") and len(file) <= MAX_BYTES
    assert Image.open(BytesIO(file)).size[0] == 1600
