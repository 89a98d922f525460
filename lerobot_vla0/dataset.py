"""What a data set says of the policy's config and statistics, and faults in it that would train a wrong
policy.

Both trainers pass here before the first step, because LeRobot hands a new policy the metadata of its data
set.
Reads metadata and numbers, no images: seconds, also for large data sets.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from .configuration_vla0 import VLA0Config
from .files import reading

# The statistics of each task are entries `action.task.<instruction>` beside `action` in a data set's
# `meta.stats`. LeRobot treats them as its own: resuming keeps the checkpoint's, fine-tuning takes the new
# data set's.
PREFIX = f"{ACTION}.task."
# In a batch: (B, 2, D), the actions that the integers 0 and num_bins mean for each row's task, normalised by
# the data set's statistics (where those would be -1 and 1).
TASK_RANGE = "action_range"
# In a batch: (B, D), the state that relative actions are added to, normalised as they are. Only differences
# between two of them have a meaning; in dimensions that stay absolute there are none.
ORIGIN = "action_origin"
# The two statistics that become -1 and 1, by normalisation mode, and their quantiles.
STATISTICS = {
    NormalizationMode.MIN_MAX: ("min", "max"),
    NormalizationMode.QUANTILES: ("q01", "q99"),
    NormalizationMode.QUANTILE10: ("q10", "q90"),
}
QUANTILES = {"min": 0.0, "max": 1.0, "q01": 0.01, "q99": 0.99, "q10": 0.1, "q90": 0.9}

Stats = dict[str, dict[str, Any]]


def read_metadata(repo_id: str, root: Path | str | None, **hub: Any) -> Any:
    """`LeRobotDatasetMetadata` of a data set in the folder `root`, or on the Hub (hub: revision,
    repo_type)."""
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata  # takes seconds

    with reading(root or repo_id):
        return LeRobotDatasetMetadata(repo_id, root=root, **hub)


def prepare_data(config: VLA0Config, meta: Any) -> None:
    """Takes the data set's shapes, names and only task into `config`, and checks tasks, numbers and
    statistics. `meta.stats`, which the processors get, is completed with the statistics of each task
    (`action_norm="task"`) or those of relative actions.

    Args:
        meta: a `LeRobotDatasetMetadata`. It does not say which episodes were chosen: all on disk are checked.
    """
    _take_features(config, meta)
    config.validate_features()
    _take_tasks(config, meta)
    frames = _read_frames(config, meta)
    _check_finite(frames, meta.root)
    if config.use_relative_actions:
        meta.stats = {**(meta.stats or {}), ACTION: _relative_statistics(config, frames)}
    where = str(meta.root / "meta/stats.json")
    check_action_statistics(config, meta.stats, where)
    check_state_statistics(config, meta.stats, where)
    if config.action_norm == "task":
        _add_task_statistics(config, meta, frames)


def _take_features(config: VLA0Config, meta: Any) -> None:
    """LeRobot leaves a checkpoint's `input_features` as they were in its first training, of whatever
    shape."""
    from lerobot.utils.feature_utils import dataset_to_policy_features

    data = dataset_to_policy_features(meta.features)
    inputs = {key: data.get(key, feature) for key, feature in config.input_features.items()}
    state = {key: data.get(key, inputs.get(key)) for key in [OBS_STATE] if config.needs_state}
    # A camera that is not in the data may be one that is renamed.
    cameras = {key: feature for key, feature in inputs.items() if feature.type is FeatureType.VISUAL}
    config.input_features = cameras | {key: feature for key, feature in state.items() if feature}
    names = meta.features.get(ACTION, {}).get("names")
    if isinstance(names, dict):  # older data have names in groups
        names = [name for group in names.values() for name in group]
    for candidate in (names, config.action_feature_names):
        if config.action_feature and candidate and len(candidate) == config.action_feature.shape[0]:
            config.action_feature_names = list(map(str, candidate))
            return
    config.action_feature_names = None


def _take_tasks(config: VLA0Config, meta: Any) -> None:
    """Refuses blank tasks. The default becomes the only task, or stays the one that the user chose."""
    tasks = [] if meta.tasks is None else list(meta.tasks.index)
    if not tasks or not all(task.strip() for task in tasks):
        own = enumerate(meta.episodes["tasks"])
        episodes = [episode for episode, tasks in own if not all(task.strip() for task in tasks)]
        if episodes or not tasks:
            raise ValueError(
                f"the data set {meta.root} has a blank task, or none, in the episodes {episodes or 'all'}: "
                "VLA-0 needs an instruction. Write it: lerobot-edit-dataset --operation.type=modify_tasks"
            )
    if config.default_task not in tasks:
        only = tasks[0] if len(tasks) == 1 else None
        if config.default_task is not None:
            logging.warning(
                f"default_task={config.default_task!r} is no task of the data set ({tasks[:3]}): it becomes "
                f"{only!r}."
            )
        config.default_task = only


def _read_frames(config: VLA0Config, meta: Any) -> dict[str, np.ndarray]:
    """Columns of all frames on disk: indices (N,), actions (N, D), and states (N, S) if they are used; {} of
    streamed data."""
    sizes = {ACTION: config.action_feature.shape[0]}
    if config.needs_state:
        sizes[OBS_STATE] = config.robot_state_feature.shape[0]
    columns = ["episode_index", "frame_index", "task_index", *sizes]
    files = sorted((meta.root / "data").glob("*/*.parquet"))
    # A state that is renamed later has another name here.
    tables = [pq.read_table(f, columns=[c for c in columns if c in pq.read_schema(f).names]) for f in files]
    if not tables:
        logging.info(f"{meta.root} holds no frames (streamed data): they are not checked before training.")
        return {}
    frames = {}
    for name in tables[0].column_names:
        arrays = [table[name].combine_chunks() for table in tables]
        if name in sizes:  # LeRobot stores vectors of one number as numbers
            flat = [array.flatten() if pa.types.is_nested(array.type) else array for array in arrays]
            shapes = [(len(array), sizes[name]) for array in arrays]
            pairs = zip(flat, shapes, strict=True)
            frames[name] = np.concatenate([a.to_numpy(zero_copy_only=False).reshape(s) for a, s in pairs])
        else:
            frames[name] = np.concatenate([array.to_numpy() for array in arrays])
    return frames


def _check_finite(frames: dict[str, np.ndarray], root: Path) -> None:
    for key in (ACTION, OBS_STATE):
        bad = ~np.isfinite(frames.get(key, np.zeros((0, 1))))
        if bad.any():
            row, dimension = np.argwhere(bad)[0]
            episodes = np.unique(frames["episode_index"][bad.any(1)]).tolist()
            raise ValueError(
                f"{root}: {key} is {frames[key][row, dimension]} in episode {frames['episode_index'][row]}, "
                f"frame {frames['frame_index'][row]}, dimension {dimension}. Repair it, or delete such "
                "episodes: lerobot-edit-dataset --operation.type=delete_episodes "
                f"--operation.episode_indices='{episodes}'"
            )


def _relative_statistics(config: VLA0Config, frames: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Statistics of actions minus the state at their chunk's beginning, by LeRobot's own helper."""
    # Imported here: acting does not need it, and it takes seconds.
    from lerobot.datasets.compute_stats import compute_relative_action_stats
    from lerobot.processor import RelativeActionsProcessorStep

    if OBS_STATE not in frames:
        raise ValueError(
            f"use_relative_actions=True reads {ACTION} and {OBS_STATE} of the frames on disk, which are not "
            "there (streamed, or renamed?). Download the data set, or set use_relative_actions=false."
        )
    names, excluded = config.action_feature_names, list(config.relative_exclude_joints)
    size = config.action_feature.shape[0]
    if excluded and all(RelativeActionsProcessorStep(True, excluded, names)._build_mask(size)):
        logging.warning(
            f"relative_exclude_joints={excluded} excludes none of the action's names {names}: all are "
            "relative."
        )
        # LeRobot's real-time chunking takes missing names from the robot, and would exclude by them.
        config.relative_exclude_joints = excluded = []
    action = {"shape": (size,), "names": names}
    try:
        return compute_relative_action_stats(frames, {ACTION: action}, config.chunk_size, excluded)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"use_relative_actions=True: no episode has the {config.chunk_size} frames of a chunk "
            f"({error}). Lower chunk_size."
        ) from error


def _add_task_statistics(config: VLA0Config, meta: Any, frames: dict[str, np.ndarray]) -> None:
    if not frames:
        raise ValueError(
            "action_norm='task' reads the actions of the frames on disk, and there are none (streamed data). "
            "Download the data set, or set action_norm='dataset'."
        )
    names = STATISTICS[config.normalization_mapping["ACTION"]]
    low, high = (np.asarray(meta.stats[ACTION][name], np.float64) for name in names)
    spans = []
    for task, index in meta.tasks["task_index"].items():
        own = frames[ACTION][frames["task_index"] == index]
        if len(own):  # where only some episodes were downloaded, a task may have no frames
            edges = [np.quantile(own, QUANTILES[name], axis=0).astype(np.float32) for name in names]
            meta.stats[PREFIX + task] = dict(zip(names, edges, strict=True))
            spans.append((edges[1] - edges[0]) / np.where(high > low, high - low, np.inf))
    logging.info(
        f"action_norm=task: of the integers 0..{config.num_bins}, the actions of a task would span "
        f"{np.round(config.num_bins * np.mean(spans, 0)).astype(int).tolist()} by dimension under the data "
        f"set's range (mean of {len(spans)} tasks); under their own range they span all."
    )


def check_action_statistics(config: VLA0Config, stats: Stats | None, where: str) -> None:
    """Raises ValueError if the statistics that un-normalise actions, of the data set or of a task, are
    missing or
    cannot be used: a robot would get numbers in [-1, 1], or inf, as commands."""
    needed, stats = STATISTICS[config.normalization_mapping["ACTION"]], stats or {}
    if missing := [name for name in needed if name not in stats.get(ACTION, {})]:
        raise ValueError(
            f"{where}: statistics {missing} of {ACTION!r} are missing, so integers cannot be turned into "
            "robot commands. They come from meta/stats.json of the data set (quantiles: LeRobot's "
            "augment_dataset_quantile_stats.py), or from the policy_postprocessor*.safetensors of a "
            "checkpoint."
        )
    for key in stats:
        if key == ACTION or key.startswith(PREFIX):
            _check_values(stats[key], needed, config.action_feature, f"{where}: {key!r}")


def check_state_statistics(config: VLA0Config, stats: Stats | None, where: str) -> None:
    """Raises ValueError if the policy sees the state and its statistics are missing or cannot be used."""
    if not config.use_state:
        return
    needed, state = STATISTICS[config.normalization_mapping["STATE"]], (stats or {}).get(OBS_STATE, {})
    if not set(needed) <= state.keys():
        raise ValueError(f"{where}: use_state=True needs the statistics {needed} of {OBS_STATE}.")
    _check_values(state, needed, config.robot_state_feature, f"{where}: {OBS_STATE!r}")


def _check_values(
    statistics: dict[str, Any], needed: tuple[str, str], feature: PolicyFeature | None, where: str
) -> None:
    with np.errstate(over="ignore"):  # LeRobot's normaliser computes in float32, too
        low, high = (np.asarray(statistics[name]).astype(np.float32) for name in needed)
    size = feature.shape[0] if feature else low.size
    is_vector = low.shape[-1:] == high.shape[-1:] == (low.size,) == (high.size,) == (size,)
    if not (is_vector and np.isfinite([low, high, high - low]).all() and (low <= high).all()):
        raise ValueError(
            f"{where} has {needed[0]}={low.tolist()} and {needed[1]}={high.tolist()}: they must be vectors "
            f"of {size} finite numbers, the first not above the second. Compute them again: "
            "lerobot-edit-dataset --operation.type=recompute_stats"
        )


def check_task_statistics(stats: Stats) -> None:
    """Raises ValueError if there are no statistics of tasks among `stats`."""
    if not any(key.startswith(PREFIX) for key in stats):
        raise ValueError(
            "action_norm='task' needs the statistics of each task in dataset_stats. Making the policy adds "
            "them to dataset.meta.stats (VLA0Policy(config, dataset_meta=dataset.meta)): make it before "
            "its processors."
        )


def to_data_set_bins(integers: Tensor, task_range: Tensor | None, num_bins: int) -> Tensor:
    """Integers (R, T, D) as the model writes them → bins (R, T, D) of the data set's range, which the
    postprocessor knows; fractions where a task has a range of its own (R, 2, D), see TASK_RANGE."""
    if task_range is None:
        return integers
    low, high = ((task_range.float() + 1) / 2 * num_bins).to(integers.device)[:, None].unbind(2)
    return low + integers * ((high - low) / num_bins)


def to_task_bins(bins: Tensor, task_range: Tensor | None, num_bins: int) -> Tensor:
    """The inverse of `to_data_set_bins`, as fractions. Where a task's actions are constant, every bin means
    the same: num_bins / 2."""
    if task_range is None:
        return bins
    low, high = ((task_range.float() + 1) / 2 * num_bins).to(bins.device)[:, None].unbind(2)
    return torch.where(high > low, (bins - low) * (num_bins / (high - low)), num_bins / 2)
