"""LeRobot processors of VLA-0. They handle numbers only; text and images are made by the policy, because a
processor is not told whether it runs in training, where images are augmented.

    preprocessor:  rename → add batch axis → device → (subtract the state) → normalise → actions to integers
    postprocessor: integers to actions → un-normalise → (add the state) → CPU

The steps in brackets are there with `use_relative_actions`. All but the conversions to and from integers are
LeRobot's steps (or, with it and with `action_norm="task"`, subclasses of them), under the names by which its
scripts override them. The saved state is all they need.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lerobot.configs import PipelineFeatureType, PolicyFeature
from lerobot.lerobot_types import EnvTransition, PolicyAction, TransitionKey
from lerobot.processor import (
    AbsoluteActionsProcessorStep,
    PolicyActionProcessorStep,
    PolicyProcessorPipeline,
    ProcessorStep,
    ProcessorStepRegistry,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)
from lerobot.utils.constants import ACTION, OBS_STATE

from .action_codec import ActionCodec
from .configuration_vla0 import VLA0Config

# In a batch: (B,), share of each row's action values outside the range of the statistics. Its mean is logged.
ACTION_CLIPPED = "action_clipped"

Features = dict[PipelineFeatureType, dict[str, PolicyFeature]]


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


def used_features(config: VLA0Config) -> dict[str, PolicyFeature]:
    """The cameras, the action, and the state if it is shown: the features that are normalised. Others may
    have another shape where the policy acts than they had in training, or none."""
    features = {**config.input_features, **config.output_features}
    used = {*config.camera_keys, ACTION, *([OBS_STATE] if config.use_state else [])}
    return {key: feature for key, feature in features.items() if key in used}


def load_processors(
    config: VLA0Config, path: str | Path, revision: str | None = None
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]],
    PolicyProcessorPipeline[PolicyAction, PolicyAction],
]:
    """Pre- and post-processor of a checkpoint, on `config.device`. Earlier versions of this package saved
    preprocessors that normalise all features; here, as in new checkpoints, only those are that are used.

    Raises:
        FileNotFoundError: they are not there.
        ValueError: they are refused by `checkpoint.admit_processors`.
    """
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
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]],
    PolicyProcessorPipeline[PolicyAction, PolicyAction],
]:
    """Pre- and post-processor of a fresh policy.

    Args:
        config: with `input_features` and `output_features` filled in.
        dataset_stats: per key, `min` and `max` (MIN_MAX) or quantiles, as in `LeRobotDataset.meta.stats`;
            with `action_norm="task"` also those of `task_stats.add_task_statistics`.

    Raises:
        ValueError: statistics of the action, of tasks, or of the state if it is used, are missing, not
            finite, or of another length.
    """
    # Imported here: task_stats imports lerobot.processor, and the import of that registers this module.
    from . import relative
    from .task_stats import (
        check_action_statistics,
        check_state_statistics,
        check_task_statistics,
        normalizer_processor,
    )

    check_action_statistics(config, dataset_stats, "dataset_stats")
    check_state_statistics(config, dataset_stats, "dataset_stats")
    steps = make_default_policy_processor_steps(config, dataset_stats)
    normalize = steps.normalize
    normalize.features = used_features(config)
    if config.action_norm == "task":
        check_task_statistics(dataset_stats)
        normalize = normalizer_processor(normalize.features, normalize.norm_map, dataset_stats)
    input_steps = [steps.rename_observations, steps.add_batch_dim, steps.to_device]
    output_steps = [VLA0ActionDecoderStep(config.num_bins), steps.unnormalize]
    if config.use_relative_actions:
        to_relative = relative.relative_actions_processor(
            True, list(config.relative_exclude_joints), config.action_feature_names
        )
        input_steps.append(to_relative)
        output_steps.append(AbsoluteActionsProcessorStep(True, to_relative))
        normalize = relative.normalizer_processor(normalize.features, normalize.norm_map, dataset_stats)
    return make_policy_processor_pipelines(
        input_steps=[*input_steps, normalize, VLA0ActionEncoderStep(config.num_bins)],
        output_steps=[*output_steps, steps.to_cpu],
    )
