"""Statistics by which actions are normalised: which are needed, and, for `action_norm="task"`, those of each
instruction.

The latter are entries `action.task.<instruction>` beside `action` in a data set's `meta.stats`, which LeRobot
treats as its own: resuming keeps the checkpoint's, fine-tuning on another data set takes that one's.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature, PreTrainedConfig
from lerobot.lerobot_types import EnvTransition, TransitionKey
from lerobot.processor import NormalizerProcessorStep
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

PREFIX = f"{ACTION}.task."
# In a batch: (B, 2, D), the actions that the integers 0 and num_bins mean for each row's task, normalised by
# the data set's statistics (where those would be -1 and 1).
TASK_RANGE = "action_range"
# The two statistics that become -1 and 1, by normalisation mode.
STATISTICS = {
    NormalizationMode.MIN_MAX: ("min", "max"),
    NormalizationMode.QUANTILES: ("q01", "q99"),
    NormalizationMode.QUANTILE10: ("q10", "q90"),
}
QUANTILES = {"min": 0.0, "max": 1.0, "q01": 0.01, "q99": 0.99, "q10": 0.1, "q90": 0.9}


def check_action_statistics(
    config: PreTrainedConfig, stats: dict[str, dict[str, Any]] | None, where: str
) -> None:
    """Raises ValueError if the statistics that un-normalise actions, of the data set or of a task, are
    missing or cannot be used: a robot would get numbers in [-1, 1], or inf, as commands."""
    needed = STATISTICS[config.normalization_mapping["ACTION"]]
    found = sorted((stats or {}).get(ACTION, {}))
    missing = [name for name in needed if name not in found]
    if missing:
        raise ValueError(
            f"{where}: statistics {missing} of {ACTION!r} are missing (found: {found}), so integers cannot "
            "be turned into robot commands. They come from meta/stats.json of the data set that is trained "
            "on (quantiles: LeRobot's augment_dataset_quantile_stats.py adds them), or from "
            "policy_postprocessor*.safetensors of a trained checkpoint given with --policy.path."
        )
    for key in stats:
        if key == ACTION or key.startswith(PREFIX):
            check_values(stats[key], needed, config.action_feature, f"{where}: {key!r}")


def check_values(
    statistics: dict[str, Any], needed: tuple[str, str], feature: PolicyFeature | None, where: str
) -> None:
    """Raises ValueError unless the lower and the upper statistic and their difference are finite in float32,
    in which LeRobot's normaliser computes, in order, and vectors as long as the feature (None: of any
    length)."""
    low, high = (_vector(statistics[name], f"{where} has {name}") for name in needed)
    span = [(f"{needed[1]} - {needed[0]}", high - low)] if low.shape == high.shape else []
    for name, values in [*zip(needed, (low, high), strict=True), *span]:
        bad = (~values.float().isfinite()).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"{where} has {name}={values[bad[0]].item():.6g} in dimension {bad[0]}: it must be finite in "
                "float32. Repair or delete the episodes with such values, and compute the statistics again: "
                "lerobot-edit-dataset --operation.type=recompute_stats"
            )
    size = len(low) if feature is None else feature.shape[0]
    if len(low) != size or len(high) != size:
        raise ValueError(
            f"{where} has {len(low)} values of {needed[0]} and {len(high)} of {needed[1]}: there must be "
            f"{size}, one per dimension. Compute the statistics of this data set."
        )
    if (low > high).any():
        bad = (low > high).nonzero()[0].item()
        raise ValueError(
            f"{where} has {needed[0]}={low[bad].item():.6g} above {needed[1]}={high[bad].item():.6g} in "
            f"dimension {bad}. Compute the statistics again."
        )


def _vector(values: Any, where: str) -> Tensor:
    """float64 (D,). The normaliser would spread a matrix or a column over the batch."""
    try:
        tensor = torch.as_tensor(values)
        if tensor.is_complex() or (tensor.ndim > 1 and tensor.shape[-1] != tensor.numel()):
            raise ValueError(f"{tensor.dtype} of shape {tuple(tensor.shape)}")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{where} that is no vector of numbers ({error}). Compute the statistics again."
        ) from error
    return tensor.double().flatten()


def check_state_statistics(
    config: PreTrainedConfig, stats: dict[str, dict[str, Any]] | None, where: str
) -> None:
    """Raises ValueError if the policy uses the state and its statistics are missing or cannot be used."""
    if not config.use_state:
        return
    needed = STATISTICS[config.normalization_mapping["STATE"]]
    found = (stats or {}).get(OBS_STATE, {})
    if any(name not in found for name in needed):
        raise ValueError(
            f"{where}: use_state=True needs the statistics {needed} of {OBS_STATE}, found {sorted(found)}. "
            "Set use_state=false, or compute the data set's statistics."
        )
    check_values(found, needed, config.robot_state_feature, f"{where}: {OBS_STATE!r}")


def frame_files(meta: Any) -> list[Path]:
    """The parquet files of a data set's frames that are on disk: none of one that is streamed."""
    return sorted((meta.root / "data").glob("*/*.parquet"))


def vectors(table: pa.Table, key: str, dim: int) -> np.ndarray:
    """A column of N vectors as (N, dim); LeRobot stores vectors of one number as numbers.

    Raises:
        ValueError: vectors of another length, or none in a row.
    """
    array = table[key].combine_chunks()
    values = array.flatten() if pa.types.is_nested(array.type) else array
    if len(values) != len(array) * dim:
        raise ValueError(
            f"{key} of {len(array)} frames on disk holds {len(values)} numbers in all: there must be {dim} "
            "per frame. Record or convert the data set again."
        )
    return values.to_numpy(zero_copy_only=False).reshape(len(array), dim)


def add_task_statistics(meta: Any, names: tuple[str, str], num_bins: int) -> None:
    """Adds the statistics of each task to `meta.stats`, in one pass over the actions of the frames on disk.

    Logs how many of the integers 0..num_bins the actions of a task would span without them.

    Args:
        meta: a data set's `LeRobotDatasetMetadata`.
        names: the two statistics that actions are normalised by: ("min", "max") or quantiles.

    Raises:
        ValueError: no frames on disk (a streamed data set).
    """
    files = frame_files(meta)
    if not files:
        raise ValueError(
            f"action_norm='task' reads the actions of the data set, but {meta.root / 'data'} holds none (is "
            "it streamed?). Download the data set, or set action_norm='dataset'."
        )
    tables = [pq.read_table(file, columns=[ACTION, "task_index"]) for file in files]
    indices = np.concatenate([table["task_index"].to_numpy() for table in tables])
    dim = np.size(meta.stats[ACTION][names[0]])
    actions = np.concatenate([vectors(table, ACTION, dim) for table in tables])
    for task, index in meta.tasks["task_index"].items():
        own = actions[indices == index]
        if len(own):  # where only some episodes were downloaded, a task may have no frames
            meta.stats[PREFIX + task] = {
                name: np.quantile(own, QUANTILES[name], axis=0).astype(np.float32) for name in names
            }
    spans = spanned_bins(meta.stats, names, num_bins)
    logging.info(
        f"action_norm=task: of the integers 0..{num_bins}, the actions of a task would span "
        f"{np.round(spans.mean(0)).astype(int).tolist()} by dimension under the data set's range (mean of "
        f"{len(spans)} tasks); under their own range they span all."
    )


def spanned_bins(stats: dict[str, dict[str, Any]], names: tuple[str, str], num_bins: int) -> np.ndarray:
    """Integers of the data set's range that each task's actions span, (tasks, D) in 0..num_bins; 0 where the
    data set's actions are constant."""
    low, high = (np.asarray(stats[ACTION][name], np.float64) for name in names)
    tasks = [entry for key, entry in stats.items() if key.startswith(PREFIX)]
    own = np.stack([np.asarray(entry[names[1]]) - np.asarray(entry[names[0]]) for entry in tasks])
    return num_bins * own / np.where(high > low, high - low, np.inf)


def check_task_statistics(stats: dict[str, Any]) -> None:
    """Raises ValueError if there are no statistics of tasks among `stats`."""
    if not any(key.startswith(PREFIX) for key in stats):
        raise ValueError(
            "action_norm='task' needs the statistics of each task in dataset_stats. They are added to "
            "dataset.meta.stats when the policy is made (by make_policy(config, ds_meta=dataset.meta) or "
            "VLA0Policy(config, dataset_meta=dataset.meta)): make the policy first, then its processors."
        )


# LeRobot's scripts give new statistics to the step named "normalizer_processor". A step that is not in
# LeRobot's registry is found by the name of its class, hence this name.
@dataclass
class normalizer_processor(NormalizerProcessorStep):  # noqa: N801
    """LeRobot's normaliser, except that actions are normalised by the statistics of their row's instruction.
    An instruction without statistics takes those of the data set, with one warning.

    Adds TASK_RANGE to the batch. With it the policy maps the integers that it writes to the data set's range.
    The postprocessor could not: it gets actions only, whose instructions may differ from row to row and may
    have changed since they were predicted.
    """

    _registry_name = None
    _unknown: set[str] = field(default_factory=set, init=False, repr=False)

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        raw, transition = transition.get(TransitionKey.ACTION), super().__call__(transition)
        extra = transition.get(TransitionKey.COMPLEMENTARY_DATA) or {}
        if "task" not in extra:
            raise ValueError(
                "action_norm='task' needs the instruction: add batch['task'] = [instruction, ...] before the "
                "preprocessor."
            )
        tasks = [extra["task"]] if isinstance(extra["task"], str) else extra["task"]
        keys = [self._key(task) for task in tasks]
        if raw is not None:
            rows = [
                self._apply_transform(row, key, FeatureType.ACTION)
                for row, key in zip(raw, keys, strict=True)
            ]
            transition[TransitionKey.ACTION] = torch.stack(rows)
        ranges = torch.stack([self._range(key) for key in keys])
        return {**transition, TransitionKey.COMPLEMENTARY_DATA: {**extra, TASK_RANGE: ranges}}

    def _key(self, task: str) -> str:
        if PREFIX + task in self._tensor_stats:
            return PREFIX + task
        if task not in self._unknown:
            self._unknown.add(task)
            logging.warning(
                f"no action statistics of the task {task!r}: those of the whole data set are used."
            )
        return ACTION

    def _range(self, key: str) -> Tensor:
        """(2, D): see TASK_RANGE."""
        statistic = next(iter(self._tensor_stats[key].values()))
        edges = statistic.new_tensor([[-1.0], [1.0]]).expand(2, self.features[ACTION].shape[0])
        if key == ACTION:
            return edges
        actions = self._apply_transform(edges, key, FeatureType.ACTION, inverse=True)
        return self._apply_transform(actions, ACTION, FeatureType.ACTION)


def to_data_set_bins(integers: Tensor, task_range: Tensor | None, num_bins: int) -> Tensor:
    """Integers as the model writes them → bins of the data set's range, which the postprocessor knows.

    Args:
        integers: (R, D).
        task_range: (R, 2, D), see TASK_RANGE; None (`action_norm="dataset"`) returns `integers`.

    Returns:
        (R, D), fractions where a task has a range of its own.
    """
    if task_range is None:
        return integers
    low, high = ((task_range.float() + 1) / 2 * num_bins).to(integers.device).unbind(1)
    return low + integers * ((high - low) / num_bins)


def to_task_bins(bins: Tensor, task_range: Tensor | None, num_bins: int) -> Tensor:
    """The inverse of `to_data_set_bins`, as fractions: (R, T, D) → (R, T, D). Where a task's actions are
    constant, every bin means the same: num_bins / 2."""
    if task_range is None:
        return bins
    low, high = ((task_range.float() + 1) / 2 * num_bins).to(bins.device)[:, None].unbind(2)
    return torch.where(high > low, (bins - low) * (num_bins / (high - low)), num_bins / 2)
