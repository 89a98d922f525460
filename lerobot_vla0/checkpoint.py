"""Checkpoints: what a path holds, and whether it is complete.

A checkpoint is a folder or a Hub repo with config.json, model.safetensors, vlm/ and the two processors; after
training with PEFT, adapter_model.safetensors and adapter_config.json take the place of the weights.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from lerobot.configs import PreTrainedConfig
from lerobot.utils.constants import (
    ACTION,
    POLICY_POSTPROCESSOR_DEFAULT_NAME,
    POLICY_PREPROCESSOR_DEFAULT_NAME,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .files import check_kinds, file_inside, not_found, read_json, reading
from .task_stats import STATISTICS, check_action_statistics, check_state_statistics

VLM_FOLDER = "vlm"  # config, tokenizer and image processor of the VLM
WEIGHTS = "model.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# The steps of the two processors by their names in LeRobot's registry, with the settings that are saved. One
# can be of this package, which is named by its class; those of RELATIVE_STEPS can be missing.
_NORMALIZER = {"eps", "features", "norm_map", "normalize_observation_keys"}
STEPS: dict[str, dict[str, set[str]]] = {
    f"{POLICY_PREPROCESSOR_DEFAULT_NAME}.json": {
        "rename_observations_processor": {"rename_map"},
        "to_batch_processor": set(),
        "device_processor": {"device", "float_dtype"},
        "relative_actions_processor": {"enabled", "exclude_joints", "action_names"},
        "normalizer_processor": _NORMALIZER,
        "vla0_action_encoder_processor": {"num_bins"},
    },
    f"{POLICY_POSTPROCESSOR_DEFAULT_NAME}.json": {
        "vla0_action_decoder_processor": {"num_bins"},
        "unnormalizer_processor": _NORMALIZER,
        "absolute_actions_processor": {"enabled"},
        "device_processor": {"device", "float_dtype"},
    },
}
RELATIVE_STEPS = ("relative_actions_processor", "absolute_actions_processor")
OWN_STEPS = [f"{__package__}.{module}.normalizer_processor" for module in ("task_stats", "relative")]
OWN_STEPS.append(f"{__package__}.relative.relative_actions_processor")
# LeRobot's normaliser takes it for the range of a dimension that is constant.
MAX_EPS = 1e-3
# Arguments of `from_pretrained` that are handed to the Hub's client.
HUB_OPTIONS = ("force_download", "cache_dir", "local_files_only", "token")


@contextmanager
def readable(file: str | Path) -> Iterator[None]:
    """Around loading weights: turns the loader's errors into one that names the file.

    Raises:
        ValueError: the file is truncated, or its tensors do not fit.
    """
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{file} could not be loaded ({str(error).splitlines()[0]}). The file is truncated or belongs to "
            "another model: copy or download it again."
        ) from error


@dataclass(frozen=True)
class Checkpoint:
    """What a path or Hub id holds."""

    kind: Literal["policy", "adapter", "vlm"]  # "vlm": a model as Transformers writes it, and no policy
    path: str  # as it was given
    revision: str | None  # of a Hub repo
    folder: Path  # on this machine; of a VLM on the Hub, it holds config.json only


def find_config(path: str | Path, **hub: Any) -> Path:
    """The config.json of a folder, whether it is there or not, or of a Hub repo, downloaded.

    Args:
        hub: revision, token, cache_dir, ..., as `hf_hub_download` takes them.

    Raises:
        FileNotFoundError: `path` is no folder, and no repo that can be read.
        ValueError: it is a folder that holds a pipe or a device.
    """
    if Path(path).is_dir():
        check_kinds(Path(path))
        return Path(path) / "config.json"
    try:
        return Path(hf_hub_download(str(path), "config.json", **hub))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(not_found(path, error)) from error


def find_checkpoint(path: str | Path, *, weights: bool = True, **hub: Any) -> Checkpoint:
    """Finds out what a folder or Hub repo holds, and downloads a policy's or adapter's files. Its processors
    are checked by `admit_processors`.

    Args:
        weights: download the weights, too; otherwise, of the tensors, only the processors' statistics.
        hub: revision, token, cache_dir, ..., as `hf_hub_download` takes them.

    Raises:
        FileNotFoundError: it is no folder, and no repo that can be read.
        ValueError: a file is damaged, it is a policy of another type, or its processors have a step that is
            not admitted.
    """
    local, file = Path(path).is_dir(), find_config(path, **hub)
    kind, folder = "policy", file.parent
    saved = read_json(file) if file.is_file() else {}
    if "model_type" in saved and "type" not in saved:
        kind = "vlm"
    elif saved.get("type", "vla0") != "vla0":
        raise ValueError(
            f"{path} holds a policy of type {saved['type']!r}, not vla0. Name a checkpoint of VLA-0, or the "
            "type that this one has."
        )
    elif not local:
        tensors = "*.safetensors" if weights else "policy_*.safetensors"
        folder = Path(snapshot_download(str(path), allow_patterns=["*.json", tensors], **hub))
        if hub.get("revision") is not None:
            # lerobot-eval 0.6.1 takes the processors of the newest commit, whatever revision it is given.
            for name in STEPS:
                with suppress(OSError):  # not there, or no network: LeRobot cannot read it either
                    admit_processors(
                        Path(hf_hub_download(str(path), name, **{**hub, "revision": None})).parent
                    )
    admit_processors(folder)
    if kind == "policy" and (folder / ADAPTER_CONFIG).is_file():
        kind = "adapter"
    return Checkpoint(kind, str(path), hub.get("revision"), folder)


def admit_processors(folder: Path) -> None:
    """Refuses processors with other steps or settings than this package saves: LeRobot imports any class that
    a step names, and calls it; some steps of its own registry load code or files. LeRobot's scripts load the
    policy first, and so come here before.

    Raises:
        ValueError: names the file and the step.
    """
    for name, admitted in STEPS.items():
        file = folder / name
        if not file.is_file():
            continue
        with reading(file):
            steps = read_json(file)["steps"]
            found = [_step_name(step) for step in steps]
            expected = {s: v for s, v in admitted.items() if s in found or s not in RELATIVE_STEPS}
            if found != list(expected):
                raise ValueError(
                    f"{file} has the steps {found}, which could run code of whoever wrote it. It was not "
                    f"loaded: a processor of this package has {list(expected)}."
                )
            for step, settings in zip(steps, expected.values(), strict=True):
                # `stats`, for example, would take the place of the statistics that are checked.
                unknown = sorted(step["config"].keys() - settings)
                if unknown or not step.keys() <= {"registry_name", "class", "config", "state_file"}:
                    raise ValueError(
                        f"{file}: the step {_step_name(step)!r} has settings that this package "
                        f"does not save ({', '.join(unknown or step)}). It was not loaded."
                    )
                if step.get("state_file") is not None:
                    file_inside(folder, step["state_file"], file)


def _step_name(step: dict[str, Any]) -> str:
    """The name under which LeRobot finds a step: it takes `registry_name` if that is there."""
    if "registry_name" in step and "class" not in step:
        return step["registry_name"]
    named = " and ".join(str(step[key]) for key in ("registry_name", "class") if key in step)
    return named.rpartition(".")[2] if named in OWN_STEPS else named


def check_checkpoint(
    folder: Path, saved: PreTrainedConfig, config: PreTrainedConfig, weights: bool = True
) -> None:
    """Refuses a folder that would load into a policy that acts wrongly.

    Args:
        folder: the checkpoint.
        saved: its own config.
        config: the one it is loaded with, with overrides and the features of the data set or environment.
        weights: whether they must be there.

    Raises:
        FileNotFoundError: weights, VLM config or the file of the statistics are missing.
        ValueError: the action dimension or `num_bins` differ from the checkpoint's, it names a server, or its
            processors differ from its config or lack statistics, or these cannot be used.
    """
    if saved.server is not None and config.server == saved.server:
        raise ValueError(
            f"{folder / 'config.json'} names server={saved.server!r}, which would see the pictures and the "
            "key, and move the robot. A checkpoint cannot choose one: set it to null there, and give yours "
            "with --policy.server."
        )
    for name in (*([WEIGHTS] if weights else []), f"{VLM_FOLDER}/config.json"):
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
    for name in ("num_bins", "action_norm", "use_relative_actions", "relative_exclude_joints"):
        was, now = getattr(saved, name), getattr(config, name)
        if was != now:
            raise ValueError(
                f"{name}={now!r} differs from the checkpoint's {was!r} ({folder}): the integers would mean "
                f"other actions. Leave {name} out."
            )
    # A postprocessor without statistics would hand normalised actions in [-1, 1] to the robot.
    postprocessor = folder / f"{POLICY_POSTPROCESSOR_DEFAULT_NAME}.json"
    if not postprocessor.is_file():
        logging.warning(
            f"{folder} holds weights only: {postprocessor.name} (statistics of the actions) is missing."
        )
        return
    actions = _statistics(postprocessor)
    check_action_statistics(saved, actions, str(postprocessor))
    _check_settings(saved, postprocessor)
    preprocessor = folder / f"{POLICY_PREPROCESSOR_DEFAULT_NAME}.json"
    if not preprocessor.is_file():
        return
    stats = _statistics(preprocessor)
    check_state_statistics(saved, stats, str(preprocessor))
    check_action_statistics(saved, stats, str(preprocessor))
    _check_settings(saved, preprocessor)
    for name in STATISTICS[saved.normalization_mapping["ACTION"]]:
        if not torch.equal(stats[ACTION][name], actions[ACTION][name]):
            raise ValueError(
                f"{preprocessor} and {postprocessor.name} have different {name} of {ACTION!r}: they are not "
                "of one training. Copy or download the whole checkpoint."
            )


def _check_settings(config: PreTrainedConfig, processor: Path) -> None:
    """Raises ValueError if a saved processor counts on other bins or another normalisation than the config,
    so that integers would mean other actions; or moves dimensions that were constant in training."""
    expected = {kind: config.normalization_mapping[kind].value for kind in ("ACTION", "STATE")}
    with reading(processor):
        steps = read_json(processor)["steps"]
        enabled = [step["config"].get("enabled") for step in steps if _step_name(step) in RELATIVE_STEPS]
        if enabled != [True] * config.use_relative_actions:
            raise ValueError(
                f"{processor}: enabled={enabled} of {' or '.join(RELATIVE_STEPS)} does not fit "
                f"use_relative_actions={config.use_relative_actions} of config.json. Copy or download the "
                "whole checkpoint."
            )
        for step in steps:
            name, settings = step.get("registry_name") or step.get("class", ""), step.get("config", {})
            differing = {}
            if name.startswith("vla0_action_"):
                differing = {"num_bins": (settings.get("num_bins", 1000), config.num_bins)}
            elif name.endswith(RELATIVE_STEPS[0]):
                wanted = {"exclude_joints": config.relative_exclude_joints}
                wanted["action_names"] = config.action_feature_names
                differing = {key: (settings.get(key), value) for key, value in wanted.items()}
            elif name.endswith("normalizer_processor"):
                norm_map = settings.get("norm_map", {})
                differing = {
                    f"norm_map[{kind!r}]": (norm_map.get(kind), mode) for kind, mode in expected.items()
                }
                eps = settings.get("eps", 0.0)
                if not isinstance(eps, int | float) or not 0 <= eps <= MAX_EPS:
                    raise ValueError(f"{processor}: eps={eps!r} of {name!r} must be in [0, {MAX_EPS:g}].")
            for field, (found, wanted) in differing.items():
                if found != wanted:
                    raise ValueError(
                        f"{processor}: {field}={found!r} of {name!r} differs from the {wanted!r} of "
                        "config.json. Copy or download the whole checkpoint."
                    )


def _statistics(processor: Path) -> dict[str, dict[str, Tensor]]:
    """Those of a saved processor's normaliser, {feature: {statistic: values}}."""
    folder, stats = processor.parent, {}
    with reading(processor):
        # LeRobot's step has a registry name; ours of `action_norm="task"` the name of its class.
        steps = [
            (step.get("registry_name") or step.get("class", ""), step.get("state_file"))
            for step in read_json(processor)["steps"]
        ]
    for name, state_file in steps:
        if not name.endswith("normalizer_processor") or state_file is None:
            continue
        if not (folder / state_file).is_file():
            raise FileNotFoundError(
                f"{folder / state_file} is missing: it holds the statistics that turn integers into robot "
                "commands. Copy or download the whole checkpoint."
            )
        with readable(folder / state_file), safe_open(folder / state_file, framework="pt") as state:
            for key in state.keys():  # noqa: SIM118 (not a dict)
                feature, _, statistic = key.rpartition(".")
                stats.setdefault(feature, {})[statistic] = state.get_tensor(key)
    return stats
