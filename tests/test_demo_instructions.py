import re
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from instructions import goals_in_scene, grasped, options_of, reached

from lerobot_vla0.libero.assets import prepare_libero
from lerobot_vla0.libero.suites import TASKS


@pytest.fixture(autouse=True)
def libero(throw_away) -> None:
    """LIBERO knows where its task files are."""
    prepare_libero("libero_object", "primitive")


def task_file(suite: str, task_id: int) -> str:
    """The text of LIBERO's description of a task."""
    from lerobot.envs.libero import _get_suite

    return Path(_get_suite(suite).get_task_bddl_file_path(task_id)).read_text()


@pytest.mark.parametrize(
    ("suite", "numbers"),
    [
        ("libero_object", [6] * 10),
        ("libero_goal", [10] * 10),
        ("libero_spatial", [1] * 10),
        ("libero_10", [3, 3, 1, 1, 1, 1, 1, 2, 2, 1]),
    ],
)
def test_suites(suite, numbers):
    for task_id, number in enumerate(numbers):
        goals = goals_in_scene(suite, task_id)
        assert len(goals) == number
        assert next(iter(goals)) == TASKS[suite][task_id]  # the own one comes first
        assert set(goals) <= set(TASKS[suite])
        assert len({str(goal) for goal in goals.values()}) == number


def test_objects_that_stand_in_the_scene():
    """In libero_object: exactly the instructions whose object the task file names."""
    for task_id in range(10):
        goals, text = goals_in_scene("libero_object", task_id), task_file("libero_object", task_id)
        for instruction in TASKS["libero_object"]:
            name = re.fullmatch("pick up the (.+) and place it in the basket", instruction)[1]
            thing = f"{name.replace(' ', '_')}_1"
            assert (instruction in goals) == (f"{thing} " in text), (task_id, instruction)
            if instruction in goals:
                assert goals[instruction] == [["in", thing, "basket_1_contain_region"]]


def test_own_goal_of_an_instruction_that_several_tasks_share():
    """Tasks 0 and 28 of libero_90 mean different cabinets: in both scenes, the own one's goal counts."""
    instruction = "close the top drawer of the cabinet"
    assert [i for i, text in enumerate(TASKS["libero_90"]) if text == instruction] == [0, 28]
    for task_id, cabinet in ((0, "wooden_cabinet_1"), (28, "white_cabinet_1")):
        assert goals_in_scene("libero_90", task_id)[instruction] == [["close", f"{cabinet}_top_region"]]


MILK = "pick up the milk and place it in the basket"  # task 7
BUTTER = "pick up the butter and place it in the basket"  # another of the objects in its scene


@pytest.mark.slow
def test_instruction_of_another_task(no_pictures):
    """Its goal counts in its episode, in single steps and in a chunk, which ends with the success; the own
    one counts again afterwards, in the same environment."""
    from expert import PickAndPlaceExpert

    settings = {"image_size": 32, "assets": "primitive", "task_id": 7, "init_state": 1}
    env = gymnasium.make("lerobot_vla0/Libero-v0", **settings).unwrapped
    try:
        _, info = env.reset(options=options_of(env, BUTTER))
        assert (info["task"], env.task, env.task_description, reached(env)) == (BUTTER, BUTTER, BUTTER, [])
        expert, actions, held, terminated = PickAndPlaceExpert(env.simulator), [], [], False
        while not terminated:
            actions.append(expert.act())
            last, reward, terminated, truncated, info = env.step(actions[-1])
            held = held or grasped(env)
            assert not truncated
        assert (reward, info["is_success"], info["task"]) == (1.0, True, BUTTER)
        assert reached(env) == held == [BUTTER]

        env.reset(options=options_of(env, BUTTER))
        again, _, terminated, _, info = env.step_chunk(np.array([*actions, np.zeros(7)]))
        assert terminated and info["is_success"] and info["steps"] == len(actions)
        assert np.array_equal(again["agent_pos"], last["agent_pos"])

        _, info = env.reset()
        assert info["task"] == env.task == MILK
        *_, terminated, _, info = env.step_chunk(np.array(actions))
        assert reached(env) == [BUTTER] and info["steps"] == len(actions)
        assert not terminated and not info["is_success"]
    finally:
        env.close()
