import json
from types import SimpleNamespace

import numpy as np
import picture as module
import pytest
import torch
from conftest import randomise
from picture import Episode, PictureConfig, draw
from PIL import Image

import lerobot_vla0
from lerobot_vla0.checkpoint import load_policy_config
from lerobot_vla0.libero.report import weights_hash


class StubEnv:
    """Three steps of random observations. The first pixel of the scene's picture holds the step."""

    def __init__(self, suite, task_id, **settings) -> None:
        self.actions, self.settings = [], settings
        self.simulator = SimpleNamespace(sim=SimpleNamespace(render=self.render))

    def render(self, width, height, camera_name):
        frame = np.zeros((height, width, 3), dtype=np.uint8)
        frame[0, 0] = len(self.actions)
        return frame

    def reset(self, options=None):
        self.start = options
        rng = np.random.default_rng(len(self.actions))
        pixels = {key: rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for key in ("image", "image2")}
        state = rng.uniform(-1, 1, 8).astype(np.float32)
        return {"pixels": pixels, "agent_pos": state}, {"task": "fly", "is_success": True}

    def step(self, action):
        self.actions.append(action)
        observation, info = self.reset(self.start)
        return observation, 0.0, len(self.actions) == 3, False, info

    def close(self):
        StubEnv.last = self


@pytest.fixture
def report(tmp_path, monkeypatch):
    """A results folder with one successful episode."""
    monkeypatch.setattr(module, "LiberoEnv", StubEnv)
    folder = tmp_path / "eval_seen"
    folder.mkdir()
    settings = {"image_size": 64, "stand_in_assets": True, "weights": "?"}
    (folder / "settings.json").write_text(json.dumps(settings))
    row = {"suite": "libero_object", "task_id": 2, "task": "fly", "episode": 0, "init_state": 5}
    (folder / "episodes-1of1.jsonl").write_text(json.dumps(row | {"success": True, "steps": 9}) + "\n")
    return folder


def test_integers_are_those_that_were_executed(policy, processors, report):
    randomise(policy)
    policy.config.n_action_steps = 2
    episode = Episode(lerobot_vla0.Agent(policy, *processors), report)
    env = StubEnv.last
    assert env.start == {"init_state": 5} and env.settings["assets"] == "primitive"
    assert (episode.instruction, episode.outcome) == ("fly", "success")
    # LIBERO's pictures are upside down: the first pixel becomes the last.
    assert [frame[-1, -1, 0] for frame in episode.frames] == [0, 1, 2, 3]
    assert list(episode.chunks) == [0, 2] and episode.written == [0, 0, 2]
    for step, (written, action) in enumerate(zip(episode.written, env.actions, strict=True)):
        integers = torch.tensor(episode.chunks[written][1][step - written], dtype=torch.float32)
        assert np.allclose(processors[1](integers[None]).numpy()[0], action, atol=1e-5)
    assert episode.chunks[0][1] != episode.chunks[2][1]


def test_picture(learnt, report, tmp_path):
    data = tmp_path / "data/meta"
    data.mkdir(parents=True)
    (data / "info.json").write_text(json.dumps({"total_episodes": 20}))
    train = {"steps": 2000, "log_freq": 500, "dataset": {"root": str(data.parent)}}
    config = PictureConfig(out=tmp_path / "demo.png", log=tmp_path / "train.log", reports=[report])
    config.policy = load_policy_config(learnt[0])
    settings = json.loads((report / "settings.json").read_text())
    settings["weights"] = weights_hash(config.policy)
    train_config = learnt[0] / "train_config.json"
    train_config.write_text(json.dumps(train))
    lines = "".join(f"step:{step} smpl:4K loss:{2.5} grdn:0.5\r" for step in ("500", "1K", "2K", "2K"))
    config.log.write_text(lines)
    try:
        with pytest.raises(ValueError, match="results of other weights"):
            draw(config)
        (report / "settings.json").write_text(json.dumps(settings))
        draw(config)
        config.log.write_text(lines[:40])
        with pytest.raises(ValueError, match="has 1 lines with a loss, a whole run 4"):
            draw(config)
    finally:
        train_config.unlink()
    picture = Image.open(config.out)
    assert picture.mode == "P" and picture.width == 1600 and 800 < picture.height < 1600
