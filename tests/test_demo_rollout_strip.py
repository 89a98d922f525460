from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import run_script
from PIL import Image

import lerobot_vla0
from lerobot_vla0.demo import rollout_strip
from lerobot_vla0.demo.rollout_strip import (
    HIGHLIGHT,
    MAX_BYTES,
    Rollout,
    StripConfig,
    Turn,
    _wrap,
    compress,
    draw,
    play_rollout,
    read_chat,
)

COLORS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30)]


def solid(color, size=256) -> np.ndarray:
    return np.full((size, size, 3), color, dtype=np.uint8)


def noise(size=256, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


class StubEnv:
    """Three steps long. The top left pixel of the scene, as the simulator renders it, holds the step."""

    def __init__(self, success: bool) -> None:
        self.success, self.actions = success, []
        self.simulator = SimpleNamespace(sim=SimpleNamespace(render=self.render))

    def render(self, width, height, camera_name):
        assert camera_name == "agentview"
        frame = np.zeros((height, width, 3), dtype=np.uint8)
        frame[0, 0] = len(self.actions)
        return frame

    def observation(self):
        return {"step": len(self.actions)}, {"task": "fly", "is_success": self.success}

    def reset(self):
        return self.observation()

    def step(self, action):
        self.actions.append(action)
        observation, info = self.observation()
        ended = len(self.actions) == 3
        return observation, 0.0, ended and self.success, ended and not self.success, info


@pytest.mark.parametrize("success", [True, False])
def test_rollout(success):
    env, resets = StubEnv(success), []
    agent = SimpleNamespace(reset=lambda: resets.append(1), act=lambda obs, task: (obs["step"], task))
    rollout = play_rollout(agent, env)
    assert env.actions == [(0, "fly"), (1, "fly"), (2, "fly")] and resets == [1]
    assert rollout.instruction == "fly" and rollout.success is success
    assert [observation["step"] for observation in rollout.observations] == [0, 1, 2, 3]
    # LIBERO's images are upside down: the marked corner is now at the bottom right.
    assert [frame[-1, -1, 0] for frame in rollout.frames] == [0, 1, 2, 3]


def test_chat_is_what_the_policy_gets_and_writes(learnt):
    """A policy that knows an example by heart writes its bins; the picture is the one that it sees."""
    folder, batch = learnt
    agent = lerobot_vla0.Agent.from_pretrained(folder, device="cpu")
    pixels = {
        key.split(".")[-1]: (batch[key][0] * 255).round().byte().permute(1, 2, 0).numpy()
        for key in ("observation.images.image", "observation.images.image2")
    }
    state = batch["observation.state"][0].numpy()
    system, user, assistant = read_chat(agent, {"pixels": pixels, "agent_pos": state}, batch["task"][0])
    assert (system.role, user.role, assistant.role) == ("system", "user", "assistant")
    assert "14 integers (0-1000 each), representing the 2 timesteps" in system.parts[0]
    assert user.parts == [batch["task"][0]]
    # Both cameras side by side.
    assert len(user.pictures) == 1 and user.pictures[0].shape == (56, 112, 3)
    assert np.array_equal(user.pictures[0], np.concatenate(list(pixels.values()), axis=1))
    written = [[int(word) for word in timestep.split()] for timestep in assistant.parts]
    assert written == batch["action"][0].tolist()


def test_wrap():
    words = _wrap(["one two three", "four\nfive"], columns=8)
    assert [(row, column, word) for row, column, word, _ in words] == [
        (0, 0, "one"), (0, 4, "two"), (1, 0, "three"), (2, 0, "four"), (3, 0, "five"),
    ]  # fmt: skip
    assert [color for *_, color in words] == ["black"] * 3 + [HIGHLIGHT] * 2


@pytest.fixture
def chat() -> list[Turn]:
    return [
        Turn("system", ["Analyze the input image. " * 12], []),
        Turn("user", ["pick up the milk\nState: 1 2 3"], [noise(56), noise(56)]),
        Turn("assistant", [" ".join(["1000"] * 7)] * 8, []),
    ]


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """What is drawn as text."""
    from matplotlib.axes import Axes

    texts, write = [], Axes.text
    monkeypatch.setattr(
        Axes, "text", lambda self, x, y, s, **style: texts.append(s) or write(self, x, y, s, **style)
    )
    return texts


@pytest.mark.parametrize(("success", "outcome"), [(True, "success"), (False, "failure")])
def test_picture(chat, written, success, outcome):
    frames = [solid(COLORS[step // 10]) for step in range(31)]
    rollout = Rollout("pick up the milk", [], frames, success)
    picture = draw(rollout, [0, 10, 20, 30], 1, chat)
    width, height = picture.size
    assert width == 1600 and height < width
    for i, color in enumerate(COLORS):  # the four frames in a row
        pixel = picture.getpixel((width * (2 * i + 1) // 8, 250))
        assert np.allclose(pixel, color, atol=2)
    assert {"“pick up the milk”", f"{outcome} after 30 steps"} <= set(written)
    assert {"step 0", "step 10: chat below", "step 20", "step 30"} <= set(written)
    assert {"system", "user", "assistant", "Analyze", "State:"} <= set(written)
    assert written.count("1000") == 56


@pytest.mark.slow
def test_file_is_small(chat):
    """Six frames of noise, which cannot be compressed well."""
    rollout = Rollout("pick up the milk", [], [noise(seed=i) for i in range(6)])
    file = compress(draw(rollout, list(range(6)), 2, chat))
    assert file.startswith(b"\x89PNG") and len(file) <= MAX_BYTES
    assert Image.open(BytesIO(file)).size[0] == 1600


def test_bad_settings(tmp_path, learnt):
    with pytest.raises(ValueError, match="which policy"):
        rollout_strip.rollout_strip(StripConfig(out=tmp_path / "strip.png"))
    config = StripConfig(out=tmp_path / "strip.png", frames=1)
    config.policy = lerobot_vla0.Agent.from_pretrained(learnt[0], device="cpu").policy.config
    with pytest.raises(ValueError, match="frames=1 must be at least 2"):
        rollout_strip.rollout_strip(config)


@pytest.mark.slow
def test_command(learnt, process_env, tmp_path):
    arguments = [f"--policy.path={learnt[0]}", "--policy.device=cpu", f"--out={tmp_path}/new/strip.png"]
    log = run_script("lerobot-vla0", "strip", *arguments, env=process_env).stdout
    assert "Failure after 280 steps" in log and f"Wrote {tmp_path}/new/strip.png" in log
    assert (tmp_path / "new/strip.png").stat().st_size <= MAX_BYTES
