from types import SimpleNamespace

import pytest

from lerobot_vla0.demo.expert import PickAndPlaceExpert


def test_refuses_tasks_it_cannot_do():
    problem = {"goal_state": [["open", "wooden_cabinet_1_middle_region"]]}
    env = SimpleNamespace(env=SimpleNamespace(parsed_problem=problem))
    with pytest.raises(ValueError, match="pick up X and place it in the basket"):
        PickAndPlaceExpert(env)


@pytest.mark.slow
def test_solves_every_task_of_libero_object(throw_away, no_pictures):
    """One init state of each of the ten tasks, without pictures, which the expert does not look at."""
    from lerobot.envs.utils import NEW_ROLLOUT_OPTION

    from lerobot_vla0.libero import VLA0LiberoEnv

    config = VLA0LiberoEnv(observation_height=16, observation_width=16, assets="primitive")
    solved = {}
    for task_id, env in config.create_envs(n_envs=1)["libero_object"].items():
        env.reset(seed=[7], options={NEW_ROLLOUT_OPTION: True})
        expert = PickAndPlaceExpert(env.envs[0].unwrapped._env)
        for _ in range(280):
            _, _, terminated, _, info = env.step(expert.act()[None])
            if terminated[0]:
                break
        solved[task_id] = bool(info["is_success"][0])
        env.close()
    assert sum(solved.values()) >= 9, solved
