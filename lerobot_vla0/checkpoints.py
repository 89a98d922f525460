"""What a checkpoint folder must hold: config.json, model.safetensors, vlm/ and the two processors."""

import json
import logging
from pathlib import Path

from lerobot.configs import PreTrainedConfig
from lerobot.utils.constants import POLICY_POSTPROCESSOR_DEFAULT_NAME
from safetensors import safe_open

from .processor_vla0 import check_action_statistics

VLM_FOLDER = "vlm"  # config, tokenizer and image processor of the VLM
WEIGHTS = "model.safetensors"


def check_checkpoint(folder: Path, saved: PreTrainedConfig, config: PreTrainedConfig) -> None:
    """Refuses a folder that would load into a policy that acts wrongly.

    Args:
        folder: the checkpoint.
        saved: its own config.
        config: the one it is loaded with, with overrides and the features of the data set or environment.

    Raises:
        FileNotFoundError: weights, VLM config or the file of the statistics are missing.
        ValueError: the action dimension or `num_bins` differ from the checkpoint's, or its statistics lack
            the action's range.
    """
    for name in (WEIGHTS, f"{VLM_FOLDER}/config.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} is no VLA-0 checkpoint: {name} is missing. Expected what `save_pretrained` writes "
                f"(config.json, {WEIGHTS}, {VLM_FOLDER}/, policy_preprocessor.json, "
                f"policy_postprocessor.json)."
            )
    if saved.action_feature is not None and config.action_feature is not None:
        was, now = saved.action_feature.shape[0], config.action_feature.shape[0]
        if was != now:
            raise ValueError(
                f"action has {now} dimensions here, but the checkpoint {folder} was trained with {was}. To "
                f"train for another robot, start from the VLM: --policy.type=vla0 --policy.vlm={saved.vlm}."
            )
    if saved.num_bins != config.num_bins:
        raise ValueError(
            f"num_bins={config.num_bins} differs from the checkpoint's {saved.num_bins} ({folder}): the "
            "model and its processors count on the latter. Leave num_bins out."
        )
    # A postprocessor without statistics would pass [-1, 1] on to the robot without a word.
    postprocessor = folder / f"{POLICY_POSTPROCESSOR_DEFAULT_NAME}.json"
    if not postprocessor.is_file():
        logging.warning(
            f"{folder} holds weights only: {postprocessor.name} (statistics of the actions) is missing."
        )
        return
    stats: dict[str, dict[str, bool]] = {}
    for step in json.loads(postprocessor.read_text())["steps"]:
        state_file = step.get("state_file")
        if step.get("registry_name") != "unnormalizer_processor" or state_file is None:
            continue
        if not (folder / state_file).is_file():
            raise FileNotFoundError(
                f"{folder / state_file} is missing: it holds the statistics that turn integers into robot "
                "commands. Copy or download the whole checkpoint."
            )
        with safe_open(folder / state_file, framework="pt") as state:
            for key in state.keys():  # noqa: SIM118 (not a dict)
                feature, _, statistic = key.rpartition(".")
                stats.setdefault(feature, {})[statistic] = True
    check_action_statistics(saved, stats, str(postprocessor))
