import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from lerobot_vla0.demo import record as module
from lerobot_vla0.demo.record import RecordConfig, features, record

pytestmark = pytest.mark.slow
MILK = "pick up the milk and place it in the basket"  # task 7
BUTTER = "pick up the butter and place it in the basket"  # another of the objects in its scene


def load(folder):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset(f"local/{folder.name}", root=folder)


def test_data_set_has_the_keys_shapes_and_rate_of_lerobot_libero(libero_dataset):
    dataset = load(libero_dataset)
    assert dataset.fps == 10 and dataset.num_episodes == 2 and dataset.meta.robot_type == "panda"
    for key, feature in features(["image", "image2"], 256, video=False).items():
        assert tuple(dataset.features[key]["shape"]) == feature["shape"]
    frame = dataset[0]
    assert frame["observation.images.image"].shape == (3, 256, 256)
    assert frame["observation.state"].shape == (8,) and frame["action"].shape == (7,)
    assert frame["task"] == MILK
    actions = np.stack([dataset[i]["action"] for i in range(len(dataset))])
    assert np.abs(actions).max() <= 1 and set(np.unique(actions[:, 6])) == {-1.0, 1.0}
    assert dataset.meta.stats["action"]["min"].shape == (7,)


def test_images_are_upright(libero_dataset):
    """LIBERO's cameras are upside down; `lerobot/libero` is turned by 180°, so the robot's base is at the top
    and the wide floor in front of it is at the bottom; the gripper's fingers enter the wrist image from
    below."""
    frame = load(libero_dataset)[0]
    image, wrist = frame["observation.images.image"].numpy(), frame["observation.images.image2"].numpy()
    bright = image.mean(0) > 0.7  # the white arm
    rows = np.flatnonzero(bright.any(1))
    assert np.median(np.repeat(np.arange(256), bright.sum(1))) < 100 and rows.min() < 20
    # the black hand covers the lower edge of the wrist camera's picture
    assert wrist[:, -20:].mean() < wrist[:, :20].mean()


def test_no_ops_are_left_out(libero_dataset):
    dataset = load(libero_dataset)
    actions = np.stack([dataset[i]["action"] for i in range(len(dataset))])
    still = np.abs(actions[1:, :6]).max(1) < 1e-4
    assert not (still & (actions[1:, 6] == actions[:-1, 6])).any()


def test_never_overwrites(libero_dataset):
    with pytest.raises(FileExistsError, match="exists and is not empty. Choose another"):
        record(RecordConfig(out=libero_dataset))


def test_what_ends_a_recording_keeps_its_episodes(tmp_path, throw_away, monkeypatch):
    """After the first episode; before it, nothing is left that would block the next try."""
    out, calls, play = tmp_path / "data", [], module.play_episode

    def stop(config, task, instruction, episode):
        calls.append(episode)
        if len(calls) != 2:
            raise KeyboardInterrupt
        return play(config, task, instruction, episode)

    monkeypatch.setattr(module, "play_episode", stop)
    config = RecordConfig(out=out, tasks=[7], assets="primitive", image_size=64, video=True)
    config.cameras = ["image"]
    with pytest.raises(KeyboardInterrupt):
        record(config)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt):
        record(config)
    assert calls == [0, 0, 1] and [path.name for path in tmp_path.iterdir()] == ["data"]
    assert load(out).meta.camera_keys == ["observation.images.image"]
    assert load(out).num_episodes == 1 and load(out)[0]["observation.images.image"].shape == (3, 64, 64)
    info = json.loads((out / "recording.json").read_text())
    assert info["tried"] == 1
    assert info["episodes"] == [{"task_id": 7, "instruction": MILK, "init_state": 0}]


def test_episodes_with_other_instructions(tmp_path, throw_away, no_pictures, monkeypatch):
    """One with the scene's own instruction and one with another are played; the other four fail."""
    play, out = module.play_episode, tmp_path / "data"

    def some(config, task, instruction, episode):
        return play(config, task, instruction, episode) if instruction in (MILK, BUTTER) else []

    monkeypatch.setattr(module, "play_episode", some)
    config = RecordConfig(out=out, tasks=[7], episodes=1, other_episodes=1, assets="primitive", image_size=32)
    record(config)
    info = json.loads((out / "recording.json").read_text())
    assert info["tried"] == 6 and info["settings"]["other_episodes"] == 1
    kept = [(episode["task_id"], episode["instruction"]) for episode in info["episodes"]]
    assert kept == [(7, MILK), (7, BUTTER)]
    episodes = load(out).meta.episodes
    assert [episode["tasks"] for episode in episodes] == [[MILK], [BUTTER]]


def test_first_frames_only(tmp_path, no_pictures, capsys):
    """Those of the whole recording; no episode is played to its end."""
    config = RecordConfig(
        out=tmp_path / "data", tasks=[7], episodes=1, assets="primitive", image_size=32, noise=0.1
    )
    record(replace(config, out=tmp_path / "first", first_frames=5))
    assert "The first 5 frames of 1 of 1 episodes: 5 frames." in capsys.readouterr().out
    record(config)
    first, whole = load(tmp_path / "first"), load(tmp_path / "data")
    assert len(first) == 5 < len(whole)
    for i in range(5):
        for key in ("action", "observation.state"):
            assert (first[i][key] == whole[i][key]).all()
    assert json.loads((tmp_path / "first/recording.json").read_text())["settings"]["first_frames"] == 5
    with pytest.raises(ValueError, match="first_frames=-1 must be at least 0"):
        record(replace(config, out=tmp_path / "other", first_frames=-1))


@pytest.mark.parametrize("others", [0, 1])
def test_jobs(monkeypatch, others):
    monkeypatch.setattr(
        module, "goals_in_scene", lambda suite, task: dict.fromkeys((f"own {task}", "b", "c"))
    )
    config = RecordConfig(out=Path("data"), tasks=[3, 4], episodes=2, other_episodes=others)
    own = [(4, "own 4", 0), (4, "own 4", 1)]
    assert module.jobs_of(config, 4) == [*own, (4, "b", 0), (4, "c", 0)][: 2 + 2 * others]


def test_workers_end_with_a_killed_recording(tmp_path, process_env):
    script = Path(sys.executable).with_name("lerobot-vla0")
    options = [f"--out={tmp_path}/data", "--tasks=[7]", "--episodes=4", "--workers=2", "--assets=primitive"]
    process = psutil.Popen([script, "record", *options], env=process_env)

    def workers() -> list[psutil.Process]:
        return [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]

    def plays(worker: psutil.Process) -> bool:
        return any("mujoco" in library.path for library in worker.memory_maps())

    deadline = time.monotonic() + 300
    while len(started := workers()) < 2 or not all(map(plays, started)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs(started, timeout=60)  # they waited for ever
    for worker in alive:
        worker.kill()
    assert len(gone) == 2 and not (tmp_path / "data").exists()


@pytest.mark.parametrize("overrides", [{"episodes": 0}, {"tasks": []}])
def test_nothing_to_record(tmp_path, overrides):
    with pytest.raises(ValueError, match="nothing to record"):
        record(RecordConfig(out=tmp_path / "data", **overrides))
    assert not (tmp_path / "data").exists()


def test_no_such_camera(tmp_path):
    with pytest.raises(ValueError, match=r"cameras=\['wrist'\] must be one or more of"):
        record(RecordConfig(out=tmp_path / "data", cameras=["wrist"]))
    assert not (tmp_path / "data").exists()


def test_other_episodes_below_zero(tmp_path):
    with pytest.raises(ValueError, match="other_episodes=-1 must be at least 0"):
        record(RecordConfig(out=tmp_path / "data", other_episodes=-1))
    assert not (tmp_path / "data").exists()
