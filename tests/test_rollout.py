"""LeRobot's rollout script and its parts, with a robot without hardware (lerobot_robot_mock.py)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_robot_checkpoint, run_script
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.rtc import ActionQueue
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot_robot_mock import CAMERAS, JOINTS

from lerobot_vla0.modeling_vla0 import VLA0Policy
from lerobot_vla0.processor_vla0 import make_vla0_pre_post_processors

TASK = "put the cube into the box"


def observation(seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    images = {f"observation.images.{key}": (1, 3, *CAMERAS[key][:2]) for key in ("front", "wrist")}
    return {**{key: torch.rand(shape, generator=generator) for key, shape in images.items()}, "task": [TASK]}


@pytest.mark.parametrize("is_rtc", [True, False])
def test_the_executed_action_does_not_jump_between_chunks(is_rtc, robot_checkpoint):
    """LeRobot's queue, filled as its RTC thread does, while decoding takes 3 timesteps: the first timestep of
    a new chunk that is executed is what the old chunk would have executed then, and without RTC it is not."""
    policy, queue = VLA0Policy.from_pretrained(robot_checkpoint), ActionQueue(RTCConfig(execution_horizon=16))
    _, postprocess = make_vla0_pre_post_processors(
        policy.config, {"action": {"min": torch.full((6,), -90.0), "max": torch.full((6,), 90.0)}}
    )
    delay, jumps = 3, []
    for look in range(4):
        left = queue.get_left_over()
        rtc = {"inference_delay": delay if look else 0, "prev_chunk_left_over": left} if is_rtc else {}
        chunk = policy.predict_action_chunk(observation(look), **rtc)
        before = queue.get_action_index()
        planned = [queue.get() for _ in range(delay + 1)]  # one more than is executed meanwhile
        queue.last_index = before + (delay if look else 0)
        queue.merge(chunk[0].clone(), postprocess(chunk)[0], delay if look else 0, before)
        if look:
            # The old and the new plan of the timestep before the first new one, which both have.
            overlap = postprocess(chunk)[0, delay - 1]
            jumps.append((overlap - planned[delay - 1]).abs().max().item())
        for _ in range(4):
            assert queue.get() is not None
    assert max(jumps) == 0 if is_rtc else max(jumps) > 10  # degrees


@pytest.fixture
def rollout(robot_checkpoint, tmp_path, robot_env):
    """Runs lerobot-rollout with the robot; returns its output and the rows of the robot's log."""
    log = tmp_path / "robot.jsonl"

    def run(*arguments: str, check: bool = True, path: Path = robot_checkpoint):
        result = run_script(
            "lerobot-rollout",
            f"--policy.path={path}",
            "--robot.type=mock_arm",
            f"--robot.log={log}",
            f"--task={TASK}",
            "--device=cpu",
            "--play_sounds=false",
            "--return_to_initial_position=false",
            *arguments,
            env=robot_env,
            check=check,
        )
        lines = log.read_text().splitlines() if log.exists() else []  # the robot makes the file
        return result, np.array([json.loads(line) for line in lines])

    return run


@pytest.mark.slow
@pytest.mark.parametrize("inference", ["sync", "rtc"])
def test_lerobot_rollout(inference, rollout):
    arguments = ["--inference.rtc.execution_horizon=16"] if inference == "rtc" else []
    result, rows = rollout(f"--inference.type={inference}", "--fps=2", "--duration=12", *arguments)
    assert "ERROR" not in result.stdout and "Rollout finished" in result.stdout
    assert len(rows) >= 12 and rows.shape[1] == 1 + len(JOINTS)
    assert (np.abs(rows[:, 1:]) <= 90).all() and len(np.unique(rows[:, 1:], axis=0)) > 5
    if inference == "rtc":
        # The queue has an action for every tick from the first on.
        assert np.diff(rows[:, 0]).max() < 2 / 2


@pytest.mark.slow
def test_relative_actions_in_real_time(rollout, tiny_vlm, tmp_path):
    """LeRobot makes what is left of a chunk relative to the new state. A command is at most `reach` away from
    where the robot was when it looked: at the start, or where an earlier command has sent it."""
    reach, names = 2.0, [f"{joint}.pos" for joint in JOINTS]
    path = make_robot_checkpoint(
        tiny_vlm, tmp_path / "relative", reach, use_relative_actions=True, action_feature_names=names
    )
    settings = ["--fps=2", "--duration=12", "--inference.rtc.execution_horizon=16"]
    result, rows = rollout("--inference.type=rtc", *settings, path=path)
    assert "ERROR" not in result.stdout and "RTC prefix will be re-anchored" in result.stdout
    assert len(rows) >= 12 and len(np.unique(rows[:, 1:], axis=0)) > 5
    places = np.concatenate([np.zeros((1, 5)), rows[:, 1:6]])
    for i in range(1, len(places)):
        assert np.abs(places[:i] - places[i]).max(1).min() <= reach + 1e-4
    assert np.abs(rows[:, 6]).max() <= reach < np.abs(rows[:, 1:6]).max()  # the gripper is absolute


@pytest.mark.slow
def test_what_a_rollout_records_can_be_trained_on(rollout, tiny_vlm, robot_env, tmp_path):
    data = tmp_path / "recorded"
    rollout(
        "--inference.type=rtc",
        "--inference.rtc.execution_horizon=16",
        "--fps=4",
        "--strategy.type=episodic",
        "--dataset.repo_id=local/rollout_arm",  # LeRobot wants the prefix and adds the date
        f"--dataset.root={data}",
        "--dataset.single_task=put the cube into the box",
        "--dataset.fps=4",
        "--dataset.num_episodes=1",
        "--dataset.episode_time_s=6",
        "--dataset.reset_time_s=0",
        "--dataset.push_to_hub=false",
        "--dataset.rgb_encoder.vcodec=h264",
    )
    (found,) = (path.parent.parent for path in tmp_path.rglob("meta/info.json"))
    info = json.loads((found / "meta/info.json").read_text())
    assert info["features"]["action"]["names"] == [f"{joint}.pos" for joint in JOINTS]
    result = run_script(
        "lerobot-train",
        "--policy.type=vla0",
        f"--policy.vlm={tiny_vlm}",
        "--policy.device=cpu",
        "--policy.dtype=float32",
        "--policy.image_size=56",
        "--policy.push_to_hub=false",
        "--dataset.repo_id=local/rollout_arm",
        f"--dataset.root={found}",
        "--batch_size=2",
        "--steps=1",
        "--num_workers=0",
        f"--output_dir={tmp_path / 'train'}",
        env=robot_env,
    )
    assert (tmp_path / "train/checkpoints/000001/pretrained_model/model.safetensors").is_file(), result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("inference", ["sync", "rtc"])
def test_a_robot_with_fewer_joints_is_refused_at_its_first_observation(inference, rollout):
    """LeRobot would send it the first five numbers of each action."""
    result, rows = rollout(
        f"--inference.type={inference}", "--robot.joints=5", "--fps=2", "--duration=60", check=False
    )
    assert "the robot has 5 joints (observation.state), and the policy writes actions of 6" in result.stdout
    assert len(rows) == 0
    assert result.returncode != 0 or inference == "rtc"  # whose thread ends the script by itself


@pytest.mark.slow
def test_rtc_on_averaged_chunks_is_refused_before_the_robot_is_connected(rollout, tmp_path):
    options = [
        "--policy.ensemble_size=4",
        "--policy.n_action_steps=1",
        "--inference.type=rtc",
        "--duration=5",
    ]
    result, _ = rollout(*options, check=False)
    assert result.returncode != 0 and "ensemble_size=4 averages chunks" in result.stdout
    assert "Use '--inference.type=sync' instead" in result.stdout and not (tmp_path / "robot.jsonl").exists()


@pytest.mark.slow
def test_a_robot_with_a_camera_less_is_trained_for_and_driven(rollout, tiny_vlm, robot_env, tmp_path):
    """A checkpoint with two cameras, trained on with data of one, then on a robot with one."""
    names = [f"{joint}.pos" for joint in JOINTS]
    image = {"dtype": "image", "shape": (480, 640, 3), "names": ["height", "width", "channels"]}
    joints = {"dtype": "float32", "shape": (6,), "names": names}
    features = {"observation.images.front": image, "observation.state": joints, "action": joints}
    data = LeRobotDataset.create(
        "local/one", fps=10, features=features, root=tmp_path / "data", use_videos=False
    )
    random = np.random.default_rng(0)
    for _ in range(20):
        frame = {key: random.uniform(-90, 90, 6).astype(np.float32) for key in list(features)[1:]}
        frame["observation.images.front"] = random.integers(0, 256, (480, 640, 3), dtype=np.uint8)
        data.add_frame(frame | {"task": TASK})
    data.save_episode()
    data.finalize()
    base = make_robot_checkpoint(tiny_vlm, tmp_path / "base", empty_cameras=1)
    log = run_script(
        "lerobot-train",
        f"--policy.path={base}",
        "--policy.push_to_hub=false",
        "--dataset.repo_id=local/one",
        f"--dataset.root={tmp_path / 'data'}",
        "--batch_size=2",
        "--steps=2",
        "--log_freq=1",
        "--num_workers=0",
        f"--output_dir={tmp_path / 'train'}",
        env=robot_env,
    ).stdout
    black = "the cameras ['observation.images.wrist'] are not there: the model sees black pictures"
    assert black in log
    trained = tmp_path / "train/checkpoints/last/pretrained_model"
    result, rows = rollout("--robot.keys=[front]", "--fps=2", "--duration=6", path=trained)
    assert black in result.stdout and len(rows) >= 4 and rows.shape[1] == 1 + len(JOINTS)
