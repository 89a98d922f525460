import numpy as np
import pytest
from lerobot.envs.configs import EnvConfig

from lerobot_vla0.libero import VLA0LiberoEnv
from lerobot_vla0.libero.suites import MAX_STEPS


def test_is_registered_with_the_papers_settings():
    assert EnvConfig.get_choice_class("vla0_libero") is VLA0LiberoEnv
    config = VLA0LiberoEnv()
    assert (config.observation_height, config.observation_width, config.fps) == (256, 256, 20)
    assert MAX_STEPS == {
        "libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400,
    }  # fmt: skip


@pytest.mark.parametrize("task", ["libero_foo", "", "libero_object,libero_foo"])
def test_unknown_suite_lists_the_known(task):
    with pytest.raises(
        ValueError, match="Known: libero_spatial, libero_object, libero_goal, libero_10, libero_90"
    ):
        VLA0LiberoEnv(task=task)


@pytest.mark.slow
def test_an_environment_that_ends_early_waits(throw_away):
    """Two environments in one process: the one that has finished is frozen and does not use up an init
    state."""
    from lerobot.envs.utils import NEW_ROLLOUT_OPTION

    config = VLA0LiberoEnv(task_ids=[0], observation_height=16, observation_width=16, assets="primitive")
    env = config.create_envs(n_envs=2)["libero_object"][0]
    try:
        assert env.call("_max_episode_steps") == (280, 280)
        assert env.unwrapped.metadata["render_fps"] == 20
        env.reset(seed=[7, 7], options={NEW_ROLLOUT_OPTION: True})
        first = env.envs[0].unwrapped
        assert first.init_state_id == 2  # started from state 0, next is 0 + 2
        first._env.check_success = lambda: True
        for _ in range(4):
            observation, _, terminated, _, _ = env.step(np.zeros((2, 7), dtype=np.float32))
        assert terminated.tolist()[1] is False and first.init_state_id == 2
        assert observation["pixels"]["image"].shape == (2, 16, 16, 3)
    finally:
        env.close()
