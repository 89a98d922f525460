"""examples/libero_demo: the recorder and its expert."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import record as module
from expert import PickAndPlaceExpert
from record import RecordConfig, features, jobs_of, play_episode, record

MILK = "pick up the milk and place it in the basket"  # task 7
BUTTER = "pick up the butter and place it in the basket"  # of another object in its scene


def load(folder):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset(f"local/{folder.name}", root=folder)


@pytest.mark.slow
def test_data_set_is_like_lerobot_libero(libero_dataset):
    dataset = load(libero_dataset)
    assert (dataset.fps, dataset.num_episodes, dataset.meta.robot_type) == (10, 2, "panda")
    for key, feature in features(["image", "image2"], 256).items():
        assert tuple(dataset.features[key]["shape"]) == feature["shape"]
    frame = dataset[0]
    assert frame["observation.images.image"].shape == (3, 256, 256) and frame["task"] == MILK
    recorded = json.loads((libero_dataset / "recording.json").read_text())["episodes"]
    assert recorded == [{"task_id": 7, "instruction": MILK, "init_state": state} for state in (0, 1)]


@pytest.mark.slow
def test_no_ops_are_left_out(libero_dataset):
    dataset = load(libero_dataset)
    actions = np.stack([dataset[i]["action"] for i in range(len(dataset))])
    assert np.abs(actions).max() <= 1 and set(np.unique(actions[:, 6])) == {-1.0, 1.0}
    still = np.abs(actions[1:, :6]).max(1) < 1e-4
    assert not (still & (actions[1:, 6] == actions[:-1, 6])).any()


@pytest.mark.slow
def test_images_are_upright(libero_dataset):
    """LIBERO's cameras are upside down. Upright, the white arm is in the upper half of the scene, and the
    black hand covers the lower edge of the wrist camera's picture."""
    frame = load(libero_dataset)[0]
    image, wrist = frame["observation.images.image"].numpy(), frame["observation.images.image2"].numpy()
    bright = image.mean(0) > 0.7
    assert np.median(np.repeat(np.arange(256), bright.sum(1))) < 100
    assert wrist[:, -20:].mean() < wrist[:, :20].mean()


@pytest.fixture
def config(tmp_path, throw_away) -> RecordConfig:
    return RecordConfig(
        out=tmp_path / "data", tasks=[7], assets="primitive", image_size=32, cameras=["image"], noise=0.1
    )


@pytest.mark.slow
@pytest.mark.parametrize(("task", "other"), [(0, False), (2, False), (7, True)])
def test_expert_does_what_it_is_told(config, no_pictures, task, other):
    """It succeeds with the scene's own instruction and with another; `first_frames` is the start of that."""
    config.assets = str(module.prepare_libero("libero_object", "primitive"))
    own, *others = module.goals_in_scene("libero_object", task)
    instruction = others[0] if other else own
    frames = play_episode(config, task, instruction, 3)
    assert 80 < len(frames) < 200 and {frame["task"] for frame in frames} == {instruction}
    first = play_episode(replace(config, first_frames=5), task, instruction, 3)
    assert len(first) == 5
    for one, two in zip(first, frames, strict=False):
        assert (one["action"] == two["action"]).all()
        assert (one["observation.state"] == two["observation.state"]).all()


def test_expert_refuses_other_goals():
    problem = {"goal_state": [["open", "wooden_cabinet_1_middle_region"]]}
    env = SimpleNamespace(env=SimpleNamespace(parsed_problem=problem))
    with pytest.raises(ValueError, match="pick up X and place it in the basket"):
        PickAndPlaceExpert(env)


@pytest.mark.slow
def test_interrupted_and_failed_episodes(config, monkeypatch):
    """Failed episodes are left out; Ctrl-C leaves the episodes up to then."""
    played = []

    def play(config, task, instruction, episode):
        played.append((task, instruction, episode))
        if episode == 3:
            raise KeyboardInterrupt
        arrays = {"observation.state": np.zeros(8, np.float32), "action": np.zeros(7, np.float32)}
        picture = np.zeros((32, 32, 3), np.uint8)
        frame = {"observation.images.image": picture, "task": instruction, **arrays}
        return [] if episode == 1 else [dict(frame) for _ in range(4)]

    monkeypatch.setattr(module, "play_episode", play)
    with pytest.raises(KeyboardInterrupt):
        record(config)
    assert played == [(7, MILK, episode) for episode in range(4)]
    assert load(config.out).num_episodes == 2 and len(load(config.out)) == 8
    info = json.loads((config.out / "recording.json").read_text())
    assert [episode["init_state"] for episode in info["episodes"]] == [0, 2]
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        record(config)


@pytest.mark.parametrize("others", [0, 1])
def test_jobs(monkeypatch, config, others):
    monkeypatch.setattr(module, "goals_in_scene", lambda suite, task: [f"own {task}", "b", "c"])
    config.episodes, config.other_episodes = 2, others
    own = [(4, "own 4", 0), (4, "own 4", 1)]
    assert jobs_of(config, 4) == [*own, (4, "b", 0), (4, "c", 0)][: 2 + 2 * others]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"episodes": 0}, "episodes=0 must be"),
        ({"tasks": [10]}, "has the tasks 0..9"),
        ({"cameras": ["wrist"]}, "cameras="),
    ],
)
def test_options_that_cannot_work(config, overrides, message):
    with pytest.raises(ValueError, match=message):
        record(replace(config, **overrides))
    assert not config.out.exists()
