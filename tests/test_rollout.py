"""LeRobot's rollout script and its parts, with a robot without hardware (lerobot_robot_mock.py)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_robot_checkpoint, run_script
from lerobot.policies.rtc import ActionQueue
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot_robot_mock import CAMERAS, JOINTS

from lerobot_vla0.modeling_vla0 import VLA0Policy
from lerobot_vla0.processor_vla0 import make_vla0_pre_post_processors

TASK = "put the cube into the box"


def camera_batch(seed: int) -> dict:
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
    for number in range(4):
        left = queue.get_left_over()
        rtc = {"inference_delay": delay if number else 0, "prev_chunk_left_over": left} if is_rtc else {}
        chunk = policy.predict_action_chunk(camera_batch(number), **rtc)
        before = queue.get_action_index()
        planned = [queue.get() for _ in range(delay + 1)]  # one more than is executed meanwhile
        queue.last_index = before + (delay if number else 0)
        queue.merge(chunk[0].clone(), postprocess(chunk)[0], delay if number else 0, before)
        if number:
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
def test_relative_actions_in_real_time_without_a_camera(rollout, tiny_vlm, tmp_path):
    """LeRobot makes the rest of a chunk relative to the new state. A command is at most `reach` away from a
    position at which the robot was observed: the start, or an earlier command."""
    reach, names = 2.0, [f"{joint}.pos" for joint in JOINTS]
    relative = {"use_relative_actions": True, "action_feature_names": names, "empty_cameras": 1}
    path = make_robot_checkpoint(tiny_vlm, tmp_path / "relative", reach, **relative)
    arguments = ["--robot.keys=[front]", "--fps=2", "--duration=12", "--inference.rtc.execution_horizon=16"]
    result, rows = rollout("--inference.type=rtc", *arguments, path=path)
    assert "ERROR" not in result.stdout and "RTC prefix will be re-anchored" in result.stdout
    assert "the model sees black pictures" in result.stdout
    assert len(rows) >= 12 and len(np.unique(rows[:, 1:], axis=0)) > 5
    positions = np.concatenate([np.zeros((1, 5)), rows[:, 1:6]])
    for i in range(1, len(positions)):
        assert np.abs(positions[:i] - positions[i]).max(1).min() <= reach + 1e-4
    assert np.abs(rows[:, 6]).max() <= reach < np.abs(rows[:, 1:6]).max()  # the gripper is absolute


@pytest.mark.slow
def test_a_robot_with_fewer_joints_is_refused_at_its_first_observation(rollout):
    """LeRobot would send it the first five numbers of each action."""
    result, rows = rollout("--robot.joints=5", "--fps=2", "--duration=60", check=False)
    assert "the robot has 5 joints (observation.state), and the policy writes actions of 6" in result.stdout
    assert len(rows) == 0 and result.returncode != 0
