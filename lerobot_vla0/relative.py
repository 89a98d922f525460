"""Relative actions (`use_relative_actions`): the model writes how far to move from the robot's state.

LeRobot's steps subtract the state before actions are normalised, and add it to the commands again. What they
add is the newest state, but `select_action` also executes timesteps that were predicted some steps earlier,
from another state. So the steps here also put the state into the batch, in the units of the model's actions,
and the policy corrects what it returns by the difference between the two states.
"""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from lerobot.configs import FeatureType, PreTrainedConfig
from lerobot.lerobot_types import EnvTransition, TransitionKey
from lerobot.processor import NormalizerProcessorStep, RelativeActionsProcessorStep
from lerobot.utils.constants import ACTION, OBS_STATE

from .task_stats import frame_files, vectors

# In a batch: (B, D), the state that actions are relative to, normalised as they are. Only differences between
# two of them have a meaning; in dimensions that are absolute there are none.
ORIGIN = "action_origin"
_STATE = "action_origin_state"  # the same, (B, S), in the robot's units


# LeRobot's scripts change the settings of steps by these names. A step that is not in LeRobot's registry is
# found by the name of its class.
@dataclass
class relative_actions_processor(RelativeActionsProcessorStep):  # noqa: N801
    """LeRobot's step, which also keeps the state for the next one."""

    _registry_name = None

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        transition = super().__call__(transition)
        state = (transition.get(TransitionKey.OBSERVATION) or {}).get(OBS_STATE)
        if state is None or not self.enabled:
            return transition
        is_relative = torch.tensor(self._build_mask(state.shape[-1]), device=state.device)
        extra = transition.get(TransitionKey.COMPLEMENTARY_DATA) or {}
        extra = {**extra, _STATE: torch.where(is_relative, state, 0)}
        return {**transition, TransitionKey.COMPLEMENTARY_DATA: extra}


@dataclass
class normalizer_processor(NormalizerProcessorStep):  # noqa: N801
    """LeRobot's normaliser, which also adds ORIGIN to the batch."""

    _registry_name = None

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        transition = super().__call__(transition)
        extra = {**(transition.get(TransitionKey.COMPLEMENTARY_DATA) or {})}
        state = extra.pop(_STATE, None)
        if state is None:  # LeRobot's real-time chunking normalises actions alone
            return transition
        dim = self.features[ACTION].shape[0]
        if state.shape[-1] < dim:
            raise ValueError(
                f"the robot has {state.shape[-1]} joints ({OBS_STATE}), and the policy writes relative "
                f"actions of {dim} dimensions, which are added to them. Use a robot with the joints of the "
                "training data."
            )
        extra[ORIGIN] = self._apply_transform(state[..., :dim].float(), ACTION, FeatureType.ACTION)
        return {**transition, TransitionKey.COMPLEMENTARY_DATA: extra}


def take_relative_statistics(config: PreTrainedConfig, meta: Any) -> None:
    """Puts the statistics of relative actions, by LeRobot's own helper, in the place of the action's in
    `meta.stats`; `relative_exclude_joints` is emptied if it fits no dimension. They are those of
    `lerobot-edit-dataset --operation.type=recompute_stats --operation.relative_action=true`.

    Args:
        config: with `chunk_size`, and with the action's names if joints are to be excluded.
        meta: a data set's `LeRobotDatasetMetadata`.

    Raises:
        ValueError: no frames on disk (a streamed data set), frames without `observation.state`, or no episode
            as long as a chunk.
    """
    # Imported here: acting does not need it, and it takes seconds.
    from lerobot.datasets.compute_stats import compute_relative_action_stats

    files = frame_files(meta)
    if not files:
        raise ValueError(
            f"use_relative_actions=True reads actions and states of the data set, but {meta.root / 'data'} "
            "holds none (is it streamed?). Download the data set, or set use_relative_actions=false."
        )
    sizes = {ACTION: config.action_feature.shape[0], OBS_STATE: config.robot_state_feature.shape[0]}
    for file in files:
        names = pq.read_schema(file).names
        if OBS_STATE not in names:
            raise ValueError(
                f"use_relative_actions=True needs {OBS_STATE}, and {file} has {names}. Set "
                "use_relative_actions=false, or rename the state in the data set."
            )
    tables = [pq.read_table(file, columns=["episode_index", *sizes]) for file in files]
    columns = {key: np.concatenate([vectors(t, key, dim) for t in tables]) for key, dim in sizes.items()}
    columns["episode_index"] = np.concatenate([table["episode_index"].to_numpy() for table in tables])
    names, excluded = config.action_feature_names, list(config.relative_exclude_joints)
    step = RelativeActionsProcessorStep(True, excluded, names)
    if excluded and all(step._build_mask(sizes[ACTION])):
        logging.warning(
            f"relative_exclude_joints={excluded} excludes nothing: the action's names in the data set are "
            f"{names}. All dimensions are relative."
        )
        # LeRobot's real-time chunking takes missing names from the robot, and would exclude by them.
        config.relative_exclude_joints = excluded = []
    action = {"shape": (sizes[ACTION],), "names": names}
    try:
        statistics = compute_relative_action_stats(columns, {ACTION: action}, config.chunk_size, excluded)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"use_relative_actions=True: no episode of {meta.root} has the {config.chunk_size} frames of a "
            f"chunk ({error}). Lower chunk_size."
        ) from error
    meta.stats = {**(meta.stats or {}), ACTION: statistics}
