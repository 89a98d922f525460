"""ALOHA with LeRobot's own scripts, as processes: record, train, evaluate."""

import json
import os

import pytest
from conftest import record_gym, run_script, train_recipe

pytestmark = pytest.mark.slow
pytest.importorskip("gym_aloha")


def test_record_train_evaluate(tiny_vlm, process_env, tmp_path):
    data, run, out = tmp_path / "data", tmp_path / "run", tmp_path / "eval"
    # The recorder finds a way to render; LeRobot's script must be told.
    info = record_gym(data, "--env=aloha", "--max_steps=10", env=process_env)
    env = {**process_env, "MUJOCO_GL": os.environ["MUJOCO_GL"]}
    assert (info["fps"], info["total_episodes"], info["total_frames"]) == (50, 2, 20)
    assert info["features"]["observation.images.top"]["shape"] == [480, 640, 3]
    checkpoint = train_recipe("aloha_cpu", data, tiny_vlm, run, env)
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["action_feature_names"][13] == "right_gripper"
    assert config["default_task"] == "transfer_cube"
    result = run_script(
        "lerobot-eval", f"--policy.path={checkpoint}", "--env.type=aloha", "--env.task=AlohaTransferCube-v0",
        "--env.episode_length=8", "--eval.n_episodes=1", "--eval.batch_size=1", f"--output_dir={out}",
        env=env,
    )  # fmt: skip
    # The environment gives its name for the task, which is the data set's.
    assert "no instruction" not in result.stdout
    (task,) = json.loads((out / "eval_info.json").read_text())["per_task"]
    assert task["metrics"]["successes"] == [False] and 0 <= task["metrics"]["max_rewards"][0] < 4
