"""The planner, in gym-pusht without pictures."""

import numpy as np
import pytest

from lerobot_vla0.demo import push_planner as module


def test_contacts_are_on_the_outline_and_normals_point_outside():
    def distance(points):
        return module.PushPlanner._distance(points, np.zeros(3))

    assert np.allclose(np.linalg.norm(module.NORMALS, axis=1), 1)
    assert np.allclose(distance(module.CONTACTS), 0)
    # Where the agent's centre is when it touches there, and nowhere nearer.
    assert np.allclose(distance(module.CONTACTS + module.RADIUS * module.NORMALS), module.RADIUS)
    assert np.allclose(distance(module.CONTACTS - 2 * module.NORMALS), 0)


@pytest.fixture
def env():
    gymnasium = pytest.importorskip("gymnasium")
    pytest.importorskip("gym_pusht")
    env = gymnasium.make("gym_pusht/PushT-v0", obs_type="state", max_episode_steps=300)
    yield env
    env.close()


def test_the_copy_predicts_what_a_push_does(env):
    """From rest, at the middle of the bar, towards the goal, where the T would need 60 pixels."""
    env.reset(seed=0)
    scene = env.unwrapped
    x, y, angle = scene.goal_pose
    along = np.array([-np.sin(angle), np.cos(angle)])
    scene.block.angle = angle
    scene.block.position = tuple(np.array([x, y]) - 60 * along)
    scene.agent.position = tuple(np.array([x, y]) - 80 * along)
    scene.space.reindex_shapes_for_body(scene.block)
    planner = module.PushPlanner(scene)
    pose = np.array([*scene.block.position, scene.block.angle])
    before = planner._error(pose[:2], pose[2])
    gains = planner._try(np.array(scene.agent.position), (0, 0), pose, along, 16.0)
    assert np.isfinite(gains[:8]).all() and gains.max() > 50
    for gain in gains[np.isfinite(gains)]:
        env.step(np.array(scene.agent.position) + 16 * along)
        assert gain == pytest.approx(before - planner._error(scene.block.position, scene.block.angle), abs=3)


def test_what_it_does_depends_on_the_state_only(env):
    env.reset(seed=3)
    planner = module.PushPlanner(env.unwrapped)
    for _ in range(12):
        action = planner.act()
        assert np.array_equal(action, module.PushPlanner(env.unwrapped).act())
        env.step(action)


@pytest.mark.slow
def test_solves_pusht(env):
    for seed in (0, 5):
        env.reset(seed=seed)
        planner = module.PushPlanner(env.unwrapped)
        ended = any(env.step(planner.act())[2] for _ in range(300))
        assert ended, seed
