import re
from pathlib import Path

import pytest

from lerobot_vla0.libero.assets import prepare_libero
from lerobot_vla0.libero.instructions import goal_of, goals_in_scene
from lerobot_vla0.libero.suites import TASKS


@pytest.fixture(autouse=True)
def libero(throw_away) -> None:
    """LIBERO knows where its task files are; the assets are not looked at."""
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
        assert goal_of("libero_90", task_id, instruction) == [["close", f"{cabinet}_top_region"]]
        assert f"(close {cabinet}_top_region)" in task_file("libero_90", task_id).lower()


def test_instruction_without_a_goal():
    own, other = TASKS["libero_object"][0], "pick up the milk"
    with pytest.raises(ValueError) as caught:
        goal_of("libero_object", 0, other)
    message = str(caught.value)
    assert f"instruction={other!r} has no goal in the scene of libero_object, task 0" in message
    assert all(instruction in message for instruction in goals_in_scene("libero_object", 0))
    assert goal_of("libero_object", 0, own) == [["in", "alphabet_soup_1", "basket_1_contain_region"]]
