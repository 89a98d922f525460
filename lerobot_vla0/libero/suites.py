"""LIBERO's suites: tasks, step limits, initial states, and which episodes of a data set belong to a suite.

Needs neither LIBERO nor a simulator.
"""

import json
from collections.abc import Sequence
from importlib.resources import files

# {suite: instruction of each task, in LIBERO's order}, from hf-libero 0.1.4's `libero.libero.benchmark`.
# libero_90 has 74 different instructions (several scenes share one). Two of them occur in other suites, too:
# "turn on the stove" (libero_goal) and "pick up the book and place it in the back compartment of the caddy"
# (libero_10).
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
    """Raises ValueError, listing what exists, for a suite or task ids that LIBERO does not have, and for no
    task id or the same twice."""
    if suite not in MAX_STEPS:
        raise ValueError(f"unknown LIBERO suite {suite!r}. Known: {', '.join(MAX_STEPS)}.")
    if task_ids is not None and (not task_ids or len(set(task_ids)) < len(task_ids)):
        raise ValueError(f"tasks={task_ids} must name at least one task, and each once.")
    unknown = [task for task in task_ids or [] if not 0 <= task < len(TASKS[suite])]
    if unknown:
        raise ValueError(f"{suite} has the tasks 0..{len(TASKS[suite]) - 1}, not {unknown}.")


def check_init_states(episodes: int, first: int) -> None:
    """Of a command that plays `episodes` episodes, from stored initial state `first` on.

    Raises:
        ValueError: no episode, or a state that is not stored.
    """
    if episodes < 1 or not 0 <= first <= NUM_INIT_STATES - episodes:
        raise ValueError(
            f"episodes={episodes}, first_init_state={first}: at least 1 episode, and initial states in "
            f"0..{NUM_INIT_STATES - 1}."
        )


def episodes_of_suites(suites: str, episode_tasks: Sequence[Sequence[str]]) -> list[int]:
    """Indices of the episodes whose tasks all belong to the given suites.

    Args:
        suites: for example "libero_object", or several separated by commas.
        episode_tasks: the tasks of each episode, `LeRobotDatasetMetadata.episodes["tasks"]`.

    Raises:
        ValueError: an unknown suite, episodes without tasks, or no episode that belongs to the suites.
    """
    names = split_suites(suites)
    if not names or not set(names).issubset(TASKS):
        raise ValueError(f"train_suite={suites!r} is not known. LIBERO's suites are {', '.join(TASKS)}.")
    if not any(any(tasks) for tasks in episode_tasks):
        raise ValueError(
            f"train_suite={suites!r} chooses episodes by their tasks, but this data set's episodes have none "
            "(meta/episodes, column tasks). Leave train_suite out, or choose with --dataset.episodes."
        )

    def episodes_within(instructions: set[str]) -> list[int]:
        return [i for i, tasks in enumerate(episode_tasks) if len(tasks) and instructions.issuperset(tasks)]

    episodes = episodes_within({task for name in names for task in TASKS[name]})
    if episodes:
        return episodes
    counts = {suite: len(episodes_within(set(instructions))) for suite, instructions in TASKS.items()}
    present = ", ".join(f"{suite} ({count} episodes)" for suite, count in counts.items() if count)
    if present:
        raise ValueError(f"train_suite={suites!r}: no episode is left. The data set holds {present}.")
    examples = sorted({task for tasks in episode_tasks for task in tasks})
    raise ValueError(
        f"train_suite={suites!r}: the data set's tasks belong to no LIBERO suite: {examples[:3]}... "
        "Leave train_suite out."
    )
