"""A data set before training: what the policy's config says of it, and faults that would end a run when they
are met, perhaps after hours. Reads metadata and numbers, no images: seconds, also for large data sets.

Both trainers pass here, because LeRobot gives a new policy the metadata of the data set. They do not include
which episodes were chosen: all that are on disk are checked.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from httpx import HTTPError
from lerobot.configs import FeatureType
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.utils.constants import ACTION, OBS_STATE
from lerobot.utils.feature_utils import dataset_to_policy_features

from .configuration_vla0 import VLA0Config
from .files import reading
from .relative import take_relative_statistics
from .task_stats import (
    STATISTICS,
    add_task_statistics,
    check_action_statistics,
    check_state_statistics,
    frame_files,
    vectors,
)


def read_metadata(repo_id: str, root: Path | str | None, **hub: Any) -> LeRobotDatasetMetadata:
    """LeRobot's metadata of a data set, downloaded if it is on the Hub.

    Args:
        root: folder of a local one, or to download to.
        hub: revision, repo_type.

    Raises:
        ValueError: it is neither there nor on the Hub, or damaged.
    """
    named = f"dataset.repo_id={repo_id!r}" if root is None else f"dataset.root={str(root)!r}"
    try:
        with reading(root or repo_id):
            return LeRobotDatasetMetadata(repo_id, root=root, **hub)
    except (OSError, ValueError, HTTPError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{named}: no data set could be read there ({reason}).") from error


def prepare_data(config: VLA0Config, meta: Any) -> None:
    """Takes the data set's shapes, and its task if there is one only, into `config`, and checks its tasks,
    actions, states and statistics. With `action_norm="task"`, adds the statistics of each task to
    `meta.stats`, which the processors get; with `use_relative_actions`, those of the action become those of
    relative ones.

    Args:
        meta: a `LeRobotDatasetMetadata`.

    Raises:
        ValueError: features that do not fit the config, a blank task, an action or a state that is used and
            not finite, statistics that are missing or cannot be used.
    """
    _take_features(config, meta.features)
    config.validate_features()
    _take_names(config, meta.features.get(ACTION, {}).get("names"))
    _check_tasks(meta)
    _take_default_task(config, _tasks(meta))
    files = frame_files(meta)
    if not files:
        logging.info(f"{meta.root} holds no frames (streamed data): they are not checked before training.")
    _check_frames(config, files)
    where = str(meta.root / "meta/stats.json")
    if config.use_relative_actions:
        take_relative_statistics(config, meta)
    check_action_statistics(config, meta.stats, where)
    check_state_statistics(config, meta.stats, where)
    if config.action_norm == "task":
        add_task_statistics(meta, STATISTICS[config.normalization_mapping["ACTION"]], config.num_bins)


def _take_features(config: VLA0Config, features: dict[str, dict]) -> None:
    """LeRobot leaves a checkpoint's `input_features` as they were in its first training, of whatever shape.
    A feature of other cameras' names is kept: it may be renamed. What is not looked at is left out."""
    data = dataset_to_policy_features(features)
    inputs = {key: data.get(key, feature) for key, feature in config.input_features.items()}
    state = {key: data.get(key, inputs.get(key)) for key in [OBS_STATE] if config.needs_state}
    cameras = {key: feature for key, feature in inputs.items() if feature.type is FeatureType.VISUAL}
    config.input_features = cameras | {key: feature for key, feature in state.items() if feature}


def _take_names(config: VLA0Config, names: Any) -> None:
    """Names of the action's dimensions, which older data have in groups; LeRobot takes the groups' names."""
    if isinstance(names, dict) and all(isinstance(group, list) for group in names.values()):
        names = [name for group in names.values() for name in group]
    dim = config.action_feature.shape[0]
    given = (list(map(str, x)) for x in (names, config.action_feature_names) if x and len(x) == dim)
    config.action_feature_names = next(given, None)


def _take_default_task(config: VLA0Config, tasks: list[str]) -> None:
    """The only task, or the one of several that the user chose. Another one is a mistake or comes from the
    checkpoint that is fine-tuned: the policy has not learned it."""
    if config.default_task in tasks:
        return
    taken = tasks[0] if len(tasks) == 1 else None
    if config.default_task is not None:
        logging.warning(
            f"default_task={config.default_task!r} is not a task of the data set ({tasks[:3]}): it becomes "
            f"{taken!r}."
        )
    config.default_task = taken


def _tasks(meta: Any) -> list[str]:
    return [] if meta.tasks is None else list(meta.tasks.index)


def _check_tasks(meta: Any) -> None:
    tasks = _tasks(meta)
    if not tasks:
        raise ValueError(
            f"the data set {meta.root} has no tasks: VLA-0 needs an instruction per episode. Add them: "
            "lerobot-edit-dataset --operation.type=modify_tasks --operation.new_task='...'"
        )
    if all(task.strip() for task in tasks):
        return
    of_episodes = enumerate(meta.episodes["tasks"])
    blank = [episode for episode, tasks in of_episodes if not all(task.strip() for task in tasks)]
    if blank:
        raise ValueError(
            f"the data set {meta.root} has a blank task in {_listed(blank)}: VLA-0 needs an instruction. "
            "Write it: lerobot-edit-dataset --operation.type=modify_tasks "
            f'--operation.episode_tasks=\'{{"{blank[0]}": "..."}}\''
        )


def _check_frames(config: VLA0Config, files: list[Path]) -> None:
    """Raises ValueError if an action, or a state that is used, is NaN or infinite."""
    first, episodes, frames = "", set(), 0
    sizes = {ACTION: config.action_feature.shape[0]}
    if config.needs_state:
        sizes[OBS_STATE] = config.robot_state_feature.shape[0]
    for file in files:
        # A state that is to be renamed has another name here.
        keys = [key for key in sizes if key in pq.read_schema(file).names]
        table = pq.read_table(file, columns=["episode_index", "frame_index", *keys])
        for key in keys:
            values = vectors(table, key, sizes[key])
            bad = ~np.isfinite(values)
            rows = np.flatnonzero(bad.any(1))
            if not len(rows):
                continue
            episode, frame = (table[name].to_numpy() for name in ("episode_index", "frame_index"))
            dimension = int(np.argmax(bad[rows[0]]))
            first = first or (
                f"{key} is {values[rows[0], dimension]} in episode {episode[rows[0]]}, frame "
                f"{frame[rows[0]]}, dimension {dimension}"
            )
            episodes |= set(episode[rows].tolist())
            frames += len(rows)
    if first:
        found = sorted(episodes)
        raise ValueError(
            f"{first}. {files[0].parents[2]} has {frames} such frames, in {_listed(found)}. Repair them, or "
            "delete the episodes: lerobot-edit-dataset --operation.type=delete_episodes "
            f"--operation.episode_indices='{found}'"
        )


def _listed(episodes: list[int]) -> str:
    more = f" and {len(episodes) - 10} more" if len(episodes) > 10 else ""
    return f"episode{'s' if len(episodes) > 1 else ''} {', '.join(map(str, episodes[:10]))}{more}"
