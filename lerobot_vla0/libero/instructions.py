"""Which instructions a scene of LIBERO allows besides that of its task: those of the suite's other tasks
whose objects stand in it. A policy that does the same whatever it is told has learned scenes, not words.
"""

from functools import cache
from typing import Any

# Predicates that must all hold, each with what it is about: [["in", "milk_1", "basket_1_contain_region"]].
Goal = list[list[str]]


@cache
def goals_in_scene(suite: str, task_id: int) -> dict[str, Goal]:
    """{instruction: goal} of a task's scene, the task's own first.

    Of several tasks with one instruction, or with one goal (all of libero_spatial put bowl 1 on the plate;
    where that bowl stands is what differs), the first counts. Needs LIBERO (`prepare_libero`).
    """
    tasks = _tasks(suite)
    own, scene = tasks[task_id]
    groups = (*scene["objects"].values(), *scene["fixtures"].values(), scene["regions"])
    things = {name for group in groups for name in group}
    goals = {own: scene["goal_state"]}
    for instruction, problem in tasks:
        goal = problem["goal_state"]
        if things.issuperset(name for _, *names in goal for name in names) and goal not in goals.values():
            goals.setdefault(instruction, goal)
    return goals


@cache
def _tasks(suite: str) -> list[tuple[str, dict[str, Any]]]:
    """(instruction, what LIBERO's file says of scene and goal) of each task; libero_90 has 90 files."""
    from lerobot.envs.libero import _get_suite
    from libero.libero.envs.bddl_utils import robosuite_parse_problem

    tasks = _get_suite(suite)
    files = map(tasks.get_task_bddl_file_path, range(tasks.n_tasks))
    return [(tasks.get_task(i).language, robosuite_parse_problem(file)) for i, file in enumerate(files)]


def goal_of(suite: str, task_id: int, instruction: str) -> Goal:
    """The goal of an instruction in a task's scene.

    Raises:
        ValueError: the scene does not allow it.
    """
    goals = goals_in_scene(suite, task_id)
    if instruction not in goals:
        known = "; ".join(goals)
        raise ValueError(
            f"instruction={instruction!r} has no goal in the scene of {suite}, task {task_id}. There, LIBERO "
            f"knows: {known}."
        )
    return goals[instruction]
