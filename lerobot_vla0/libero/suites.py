"""LIBERO's suites: tasks, step limits, initial states, and which episodes of a data set belong to a suite.

Needs neither LIBERO nor a simulator.
"""

import json
from collections.abc import Sequence
from importlib.resources import files

# {suite: instruction of each task, in LIBERO's order}, from hf-libero 0.1.4's `libero.libero.benchmark`.
# Several scenes of libero_90 share an instruction; libero_goal and libero_10 share one with it, too.
TASKS: dict[str, list[str]] = json.loads(files(__package__).joinpath("tasks.json").read_text())
# Step limits of the paper's evaluation; LeRobot's own differ in libero_spatial (280).
MAX_STEPS = {
    "libero_spatial": 220,  # longest training demo has 193 steps
    "libero_object": 280,  # longest training demo has 254 steps
    "libero_goal": 300,  # longest training demo has 270 steps
    "libero_10": 520,  # longest training demo has 505 steps
    "libero_90": 400,  # longest training demo has 373 steps
}
NUM_INIT_STATES = 50  # stored initial states per task


def split_suites(suites: str) -> list[str]:
    """Suite names from one string, separated by commas."""
    return [suite.strip() for suite in suites.split(",") if suite.strip()]


def check_task_ids(suite: str, task_ids: list[int] | None) -> None:
    """Raises ValueError for a suite or task ids that LIBERO does not have, and for no task id or the same
    twice."""
    if suite not in MAX_STEPS:
        raise ValueError(f"unknown LIBERO suite {suite!r}. Known: {', '.join(MAX_STEPS)}.")
    if task_ids is not None and (not task_ids or len(set(task_ids)) < len(task_ids)):
        raise ValueError(f"tasks={task_ids} must name at least one task, and each once.")
    unknown = [task for task in task_ids or [] if not 0 <= task < len(TASKS[suite])]
    if unknown:
        raise ValueError(f"{suite} has the tasks 0..{len(TASKS[suite]) - 1}, not {unknown}.")


def check_init_states(episodes: int, first: int) -> None:
    """Raises ValueError unless `episodes` episodes can start from an initial state each, from `first` on."""
    if episodes < 1 or not 0 <= first <= NUM_INIT_STATES - episodes:
        states = f"initial states in 0..{NUM_INIT_STATES - 1}"
        raise ValueError(f"episodes={episodes}, first_init_state={first}: at least 1 episode, and {states}.")


def episodes_of_suites(suites: str, episode_tasks: Sequence[Sequence[str]]) -> list[int]:
    """Indices of the episodes whose tasks all belong to these suites; ValueError if there are none.

    Args:
        suites: for example "libero_object", or several separated by commas.
        episode_tasks: the tasks of each episode, `LeRobotDatasetMetadata.episodes["tasks"]`.
    """
    names = split_suites(suites)
    if not names or not set(names).issubset(TASKS):
        raise ValueError(f"train_suite={suites!r} is not known. LIBERO's suites are {', '.join(TASKS)}.")
    instructions = {task for name in names for task in TASKS[name]}
    episodes = [i for i, tasks in enumerate(episode_tasks) if len(tasks) and instructions.issuperset(tasks)]
    if not episodes:
        examples = sorted({task for tasks in episode_tasks for task in tasks})[:3]
        raise ValueError(
            f"train_suite={suites!r}: no episode of the data set has tasks of these suites only; its tasks "
            f"are {examples}... Leave train_suite out, or choose with --dataset.episodes."
        )
    return episodes
