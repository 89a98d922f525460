"""LeRobot processors of VLA-0. They handle numbers only: a processor is not told whether it runs in training,
where images are augmented.

    preprocessor:  rename → add batch axis → device → (subtract the state) → normalise → actions to integers
    postprocessor: integers to actions → un-normalise → (add the state) → CPU

The steps in brackets are there with `use_relative_actions`. All but the conversions to and from integers are
LeRobot's steps, or subclasses under their names, by which LeRobot's scripts override them.
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import FeatureType, PipelineFeatureType, PolicyFeature
from lerobot.lerobot_types import EnvTransition, PolicyAction, TransitionKey
from lerobot.processor import (
    AbsoluteActionsProcessorStep,
    NormalizerProcessorStep,
    PolicyActionProcessorStep,
    PolicyProcessorPipeline,
    ProcessorStep,
    ProcessorStepRegistry,
    RelativeActionsProcessorStep,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from .action_text import ActionCodec
from .configuration_vla0 import VLA0Config
from .dataset import (
    ORIGIN,
    PREFIX,
    TASK_RANGE,
    check_action_statistics,
    check_state_statistics,
    check_task_statistics,
)

_STATE = "action_origin_state"  # ORIGIN in the robot's units, (B, S), from one step to the next
# In a batch: (B,), share of each row's action values outside the range of the statistics. Its mean is logged.
ACTION_CLIPPED = "action_clipped"

Features = dict[PipelineFeatureType, dict[str, PolicyFeature]]
Processors = tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]],
    PolicyProcessorPipeline[PolicyAction, PolicyAction],
]

# Saved processors of version 0.1.0 name steps by these modules.
sys.modules[f"{__package__}.task_stats"] = sys.modules[f"{__package__}.relative"] = sys.modules[__name__]


@dataclass
@ProcessorStepRegistry.register(name="vla0_action_encoder_processor")
class VLA0ActionEncoderStep(ProcessorStep):
    """Normalised actions (B, H, D) in [-1, 1] → int64 bins 0..num_bins, and ACTION_CLIPPED. LeRobot's data
    have (B, H) where D is 1. Leaves a batch without actions, as in evaluation, as it is."""

    num_bins: int = 1000

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        action = transition.get(TransitionKey.ACTION)
        if action is None:
            return transition
        bins, clipped = ActionCodec(self.num_bins).encode(action[..., None] if action.ndim == 2 else action)
        extra = {**(transition.get(TransitionKey.COMPLEMENTARY_DATA) or {})}
        extra[ACTION_CLIPPED] = clipped.float().flatten(1).mean(1)  # (B,)
        return {**transition, TransitionKey.ACTION: bins, TransitionKey.COMPLEMENTARY_DATA: extra}

    def get_config(self) -> dict[str, Any]:
        return {"num_bins": self.num_bins}

    def transform_features(self, features: Features) -> Features:
        return features


@dataclass
@ProcessorStepRegistry.register(name="vla0_action_decoder_processor")
class VLA0ActionDecoderStep(PolicyActionProcessorStep):
    """Bins 0..num_bins, (B, D) or (B, H, D) → normalised actions in [-1, 1]."""

    num_bins: int = 1000

    def action(self, action: PolicyAction) -> PolicyAction:
        return ActionCodec(self.num_bins).decode(action)

    def get_config(self) -> dict[str, Any]:
        return {"num_bins": self.num_bins}

    def transform_features(self, features: Features) -> Features:
        return features


# LeRobot's scripts override these two steps by LeRobot's names for them; a step outside LeRobot's registry
# has the name of its class.
@dataclass
class relative_actions_processor(RelativeActionsProcessorStep):  # noqa: N801
    """LeRobot's step, which also puts the state into the batch, for the next step."""

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
    """LeRobot's normaliser, and what the policy needs to know of each row.

    With statistics of tasks (`action_norm="task"`), actions are normalised by those of their row's
    instruction,
    and TASK_RANGE is added to the batch: by it the policy maps the integers that it writes to the data set's
    range. The postprocessor could not: it gets actions only, whose instructions differ from row to row.
    Behind `relative_actions_processor`, adds ORIGIN to the batch.
    """

    _registry_name = None
    _unknown: set[str] = field(default_factory=set, init=False, repr=False)

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        raw, transition = transition.get(TransitionKey.ACTION), super().__call__(transition)
        extra = {**(transition.get(TransitionKey.COMPLEMENTARY_DATA) or {})}
        if any(key.startswith(PREFIX) for key in self._tensor_stats):
            if "task" not in extra:
                raise ValueError("action_norm='task' needs batch['task'], one instruction per row.")
            keys = [self._key(task) for task in np.atleast_1d(extra["task"]).tolist()]
            if raw is not None:
                rows = zip(raw, keys, strict=True)
                actions = [self._apply_transform(row, key, FeatureType.ACTION) for row, key in rows]
                transition[TransitionKey.ACTION] = torch.stack(actions)
            extra[TASK_RANGE] = torch.stack([self._range(key) for key in keys])
        if _STATE in extra:
            state, dim = extra.pop(_STATE), self.features[ACTION].shape[0]
            if state.shape[-1] < dim:
                raise ValueError(
                    f"the robot has {state.shape[-1]} joints ({OBS_STATE}), and the policy writes relative "
                    f"actions of {dim} dimensions. Use a robot with the joints of the training data."
                )
            extra[ORIGIN] = self._apply_transform(state[..., :dim].float(), ACTION, FeatureType.ACTION)
        return {**transition, TransitionKey.COMPLEMENTARY_DATA: extra}

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


def used_features(config: VLA0Config) -> dict[str, PolicyFeature]:
    """The cameras, the action, and the state if the model sees it: the features that are normalised. Others
    may have another shape where the policy acts than they had in training, or none."""
    features = {**config.input_features, **config.output_features}
    used = {*config.camera_keys, ACTION, *([OBS_STATE] if config.use_state else [])}
    return {key: feature for key, feature in features.items() if key in used}


def load_processors(config: VLA0Config, path: str | Path, revision: str | None = None) -> Processors:
    """Pre- and post-processor of a checkpoint, on `config.device`.

    Version 0.1.0 saved preprocessors that normalise all features; here only those are that are used."""
    # Imported here: these import this module.
    from lerobot.policies.factory import make_pre_post_processors

    from .checkpoint import find_checkpoint

    return make_pre_post_processors(
        config,
        # The folder, so that what is loaded is what was checked.
        pretrained_path=str(find_checkpoint(path, weights=False, revision=revision).folder),
        preprocessor_overrides={
            "device_processor": {"device": str(config.device)},
            "normalizer_processor": {"features": used_features(config)},
        },
    )


def make_vla0_pre_post_processors(
    config: VLA0Config, dataset_stats: dict[str, dict[str, Any]] | None = None
) -> Processors:
    """Pre- and post-processor of a fresh policy.

    Args:
        config: with `input_features` and `output_features` filled in.
        dataset_stats: per key, `min` and `max` (MIN_MAX) or quantiles, as in `LeRobotDataset.meta.stats`;
            with `action_norm="task"` as `dataset.prepare_data` completes them.
    """
    check_action_statistics(config, dataset_stats, "dataset_stats")
    check_state_statistics(config, dataset_stats, "dataset_stats")
    steps = make_default_policy_processor_steps(config, dataset_stats)
    normalize = steps.normalize
    normalize.features = used_features(config)
    if config.action_norm == "task":
        check_task_statistics(dataset_stats)
    if config.action_norm == "task" or config.use_relative_actions:
        normalize = normalizer_processor(normalize.features, normalize.norm_map, dataset_stats)
    input_steps = [steps.rename_observations, steps.add_batch_dim, steps.to_device]
    output_steps = [VLA0ActionDecoderStep(config.num_bins), steps.unnormalize]
    if config.use_relative_actions:
        to_relative = relative_actions_processor(
            True, list(config.relative_exclude_joints), config.action_feature_names
        )
        input_steps.append(to_relative)
        output_steps.append(AbsoluteActionsProcessorStep(True, to_relative))
    return make_policy_processor_pipelines(
        input_steps=[*input_steps, normalize, VLA0ActionEncoderStep(config.num_bins)],
        output_steps=[*output_steps, steps.to_cpu],
    )
