"""PushT with LeRobot's own scripts, as processes: record, train with relative actions, evaluate."""

import json

import pytest
from conftest import ROOT, run_script

pytestmark = pytest.mark.slow
pytest.importorskip("gym_pusht")


def test_record_train_evaluate(tiny_vlm, process_env, tmp_path):
    data, run, out = tmp_path / "data", tmp_path / "run", tmp_path / "eval"
    run_script(
        "python", "-m", "lerobot_vla0.demo.record_gym", f"--out={data}", "--episodes=2", "--max_steps=12",
        "--noise=2", "--keep_failures=true",
        env=process_env,
    )  # fmt: skip
    info = json.loads((data / "meta/info.json").read_text())
    assert (info["fps"], info["total_episodes"], info["total_frames"]) == (10, 2, 24)
    assert info["features"]["observation.image"]["shape"] == [96, 96, 3]
    run_script(
        "lerobot-train", f"--config_path={ROOT}/configs/pusht_cpu.yaml", f"--dataset.root={data}",
        f"--policy.vlm={tiny_vlm}", "--batch_size=2", "--steps=5", "--save_freq=5", f"--output_dir={run}",
        env=process_env,
    )  # fmt: skip
    checkpoint = run / "checkpoints/last/pretrained_model"
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
