"""Which instructions a scene of LIBERO allows besides that of its task: those of the suite's other tasks
whose objects stand in it. A policy that does the same whatever it is told has learned scenes, not words.
"""

from functools import cache
from typing import Any

from lerobot_vla0.libero.env import LiberoEnv

# Predicates that must all hold, each with its objects: [["in", "milk_1", "basket_1_contain_region"]].
Goal = list[list[str]]


@cache
def goals_in_scene(suite: str, task_id: int) -> dict[str, Goal]:
    """{instruction: goal} of a task's scene, the task's own first.

    Of several tasks with one instruction, or with one goal (all of libero_spatial put bowl 1 on the plate;
    where that bowl stands differs), the first counts. Needs LIBERO (`prepare_libero`).
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
    """(instruction, LIBERO's description of scene and goal) of each task; libero_90 has 90 files."""
    from lerobot.envs.libero import _get_suite
    from libero.libero.envs.bddl_utils import robosuite_parse_problem

    tasks = _get_suite(suite)
    files = map(tasks.get_task_bddl_file_path, range(tasks.n_tasks))
    return [(tasks.get_task(i).language, robosuite_parse_problem(file)) for i, file in enumerate(files)]


def options_of(env: LiberoEnv, instruction: str) -> dict[str, Any]:
    """Options of `env.reset` for an episode with an instruction of `goals_in_scene`."""
    return {"instruction": instruction, "goal": goals_in_scene(env.suite, env.task_id)[instruction]}


def reached(env: LiberoEnv) -> list[str]:
    """Instructions of `goals_in_scene` whose goals hold now, whichever the episode has."""
    holds = env.simulator.env._eval_predicate
    goals = goals_in_scene(env.suite, env.task_id)
    return [instruction for instruction, goal in goals.items() if all(map(holds, goal))]


def grasped(env: LiberoEnv) -> list[str]:
    """Instructions of `goals_in_scene` that move an object which both fingers touch now, as robosuite
    defines a grasp."""
    robosuite = env.simulator.env
    gripper = robosuite.robots[0].gripper
    touched = [
        name for name, thing in robosuite.objects_dict.items() if robosuite._check_grasp(gripper, thing)
    ]
    goals = goals_in_scene(env.suite, env.task_id)
    # A predicate's first argument is what moves: "in milk_1 basket_1_contain_region".
    return [text for text, goal in goals.items() if any(moved in touched for _, moved, *_ in goal)]
