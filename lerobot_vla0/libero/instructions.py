"""Which instructions a scene of LIBERO allows besides that of its task: those of the suite's other tasks
whose objects stand in it. A policy that does the same whatever it is told has learned scenes, not words.
"""

from functools import cache

# Predicates that must all hold, each with what it is about: [["in", "milk_1", "basket_1_contain_region"]].
Goal = list[list[str]]


@cache
def goals_in_scene(suite: str, task_id: int) -> dict[str, Goal]:
    """{instruction: goal} of a task's scene, the task's own first.

    Of several tasks with one instruction, or with one goal (all of libero_spatial put bowl 1 on the plate;
    where that bowl stands is what differs), the first counts. Needs LIBERO (`prepare_libero`).
    """
    from lerobot.envs.libero import _get_suite
    from libero.libero.envs.bddl_utils import robosuite_parse_problem

    tasks = _get_suite(suite)
    scene = robosuite_parse_problem(tasks.get_task_bddl_file_path(task_id))
    groups = (*scene["objects"].values(), *scene["fixtures"].values(), scene["regions"])
    things = {name for group in groups for name in group}
    goals = {tasks.get_task(task_id).language: scene["goal_state"]}
    for other in range(tasks.n_tasks):
        goal = robosuite_parse_problem(tasks.get_task_bddl_file_path(other))["goal_state"]
        if things.issuperset(name for _, *names in goal for name in names) and goal not in goals.values():
            goals.setdefault(tasks.get_task(other).language, goal)
    return goals


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
