"""Which episodes of a data set belong to a LIBERO suite, by the words of their tasks. Needs no LIBERO."""

import json
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files

# {suite: instruction of each task, in LIBERO's order}, from hf-libero 0.1.4's `libero.libero.benchmark`.
# libero_90 has 74 different ones (scenes repeat them). Two are in other suites, too: "turn on the stove"
# (libero_goal) and "pick up the book and place it in the back compartment of the caddy" (libero_10).
TASKS: dict[str, list[str]] = json.loads(files(__package__).joinpath("tasks.json").read_text())


def episodes_of_suites(suites: str, episode_tasks: Sequence[Sequence[str]]) -> list[int]:
    """Indices of the episodes all of whose tasks are in one of the suites.

    Args:
        suites: for example "libero_object", or several separated by commas.
        episode_tasks: the tasks of each episode, `LeRobotDatasetMetadata.episodes["tasks"]`.

    Raises:
        ValueError: an unknown suite, episodes without tasks, or none that belongs to the suites.
    """
    names = [name.strip() for name in suites.split(",") if name.strip()]
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names:
        raise ValueError(f"train_suite={suites!r} is not known. LIBERO's suites are {', '.join(TASKS)}.")
    if not any(any(tasks) for tasks in episode_tasks):
        raise ValueError(
            f"train_suite={suites!r} chooses episodes by their tasks, but this data set's episodes have none "
            "(meta/episodes, column tasks). Leave train_suite out, or choose with --dataset.episodes."
        )
    wanted = {task for name in names for task in TASKS[name]}
    episodes = [i for i, tasks in enumerate(episode_tasks) if len(tasks) and wanted.issuperset(tasks)]
    if episodes:
        return episodes
    found = Counter(
        suite
        for tasks in episode_tasks
        for suite in TASKS
        if len(tasks) and set(TASKS[suite]).issuperset(tasks)
    )
    if found:
        listed = ", ".join(f"{suite} ({count} episodes)" for suite, count in found.items())
        raise ValueError(f"train_suite={suites!r}: no episode is left. The data set holds {listed}.")
    examples = sorted({task for tasks in episode_tasks for task in tasks})
    raise ValueError(
        f"train_suite={suites!r}: the data set's tasks belong to no LIBERO suite: {examples[:3]}... "
        "Leave train_suite out."
    )
