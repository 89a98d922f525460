"""PushT with LeRobot's own scripts, as processes: record, train with relative actions, evaluate."""

import json

import pytest
from conftest import record_gym, run_script, train_recipe

pytestmark = pytest.mark.slow
pytest.importorskip("gym_pusht")


def test_record_train_evaluate(tiny_vlm, process_env, tmp_path):
    data, run, out = tmp_path / "data", tmp_path / "run", tmp_path / "eval"
    info = record_gym(data, "--max_steps=12", "--noise=2", env=process_env)
    assert (info["fps"], info["total_episodes"], info["total_frames"]) == (10, 2, 24)
    assert info["features"]["observation.image"]["shape"] == [96, 96, 3]
    checkpoint = train_recipe("pusht_cpu", data, tiny_vlm, run, process_env)
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["use_relative_actions"] and config["action_feature_names"] == ["x", "y"]
    assert config["default_task"].startswith("Push the T")
    result = run_script(
        "lerobot-eval", f"--policy.path={checkpoint}", "--env.type=pusht", "--env.episode_length=6",
        "--eval.n_episodes=2", "--eval.batch_size=2", "--eval.use_async_envs=false", f"--output_dir={out}",
        env=process_env,
    )  # fmt: skip
    assert f"default_task={config['default_task']!r}" in result.stdout
    (task,) = json.loads((out / "eval_info.json").read_text())["per_task"]
    assert len(task["metrics"]["max_rewards"]) == 2 and not any(task["metrics"]["successes"])
