"""Checkpoints: folders or Hub repos with config.json, model.safetensors, vlm/ and the two processors; after
training with PEFT, adapter_model.safetensors and adapter_config.json take the place of the weights.

`find_checkpoint` reads one, once, and refuses files that could run code; `check_checkpoint` refuses what
would act wrongly."""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Self

import draccus
import torch
from huggingface_hub import hf_hub_download, snapshot_download
from lerobot.configs import PreTrainedConfig
from lerobot.utils.constants import ACTION
from safetensors.torch import load_file
from torch import Tensor, nn

from . import vlm
from .configuration_vla0 import VLA0Config, upgrade
from .dataset import STATISTICS, check_action_statistics, check_state_statistics
from .files import file_inside, not_found, read_json, reading

VLM_FOLDER = "vlm"  # config, tokenizer and image processor of the VLM
WEIGHTS = "model.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
# Arguments of `from_pretrained` that are handed to the Hub's client.
HUB_OPTIONS = ("force_download", "cache_dir", "local_files_only", "token")

# Steps of this package with the names of LeRobot's are saved by the name of their class.
# Version 0.1.0 had them in the modules task_stats and relative.
OWN_STEPS = [
    f"{__package__}.{module}.{step}_processor"
    for module in ("processor_vla0", "task_stats", "relative")
    for step in ("normalizer", "relative_actions")
]
ANY = object()  # for a setting that does not change what integers mean
Statistics = dict[str, dict[str, Tensor]]  # {feature: {"min": (D,), "max": (D,)}}


@dataclass(frozen=True)
class Checkpoint:
    """What was read of a folder or Hub repo: everything but the weights."""

    kind: Literal["policy", "adapter", "vlm"]  # "vlm": a model as Transformers writes it, without a policy
    path: str  # as the user wrote it
    revision: str | None  # of a Hub repo
    folder: Path  # on this machine; of a VLM on the Hub, it holds config.json only
    config: VLA0Config | None = None  # None for a VLM
    statistics: dict[str, Statistics] = field(default_factory=dict)  # of the processors, by file name
    base: Self | None = None  # of an adapter


def _find_config(path: str | Path, **hub: Any) -> Path:
    """config.json of a folder, whether it is there or not, or of a Hub repo, downloaded."""
    if Path(path).is_dir():
        return Path(path) / "config.json"
    try:
        return Path(hf_hub_download(str(path), "config.json", **hub))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(not_found(path, error)) from error


def find_checkpoint(path: str | Path, *, weights: bool = True, **hub: Any) -> Checkpoint:
    """Reads what a folder or Hub repo holds, and for an adapter its base. All but VLMs are downloaded.

    Args:
        weights: download the weights, too; otherwise, of the tensors, only the processors' statistics.
        hub: revision, token, cache_dir, ..., as `hf_hub_download` takes them.
    """
    file, revision = _find_config(path, **hub), hub.get("revision")
    saved, folder = read_json(file), file.parent
    if "model_type" in saved and "type" not in saved:
        return Checkpoint("vlm", str(path), revision, folder)
    if saved.get("type") != "vla0":
        raise ValueError(f"{path} holds a policy of type {saved.get('type')!r}, not vla0.")
    if not Path(path).is_dir():
        tensors = "*.safetensors" if weights else "policy_*.safetensors"
        folder = Path(snapshot_download(str(path), allow_patterns=["*.json", tensors], **hub))
        if revision is not None:
            # lerobot-eval 0.6.1 takes the processors of the newest commit, whatever revision it is asked for.
            with suppress(OSError):  # no network: LeRobot cannot read them either
                find_checkpoint(path, weights=False, **{**hub, "revision": None})
    config = draccus.decode(VLA0Config, upgrade({k: v for k, v in saved.items() if k != "type"}))
    files = [name for name in (PREPROCESSOR, POSTPROCESSOR) if (folder / name).is_file()]
    statistics = {name: _read_processor(folder / name, config) for name in files}
    policy = Checkpoint("policy", str(path), revision, folder, config, statistics)
    if not (folder / ADAPTER_CONFIG).is_file():
        return policy
    adapter = read_adapter_config(folder / ADAPTER_CONFIG)
    try:
        hub["revision"] = adapter.get("revision")
        base = find_checkpoint(adapter["base_model_name_or_path"], weights=weights, **hub)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the base of the adapter {path} is not there: {error} If it has moved, correct "
            f"base_model_name_or_path in {ADAPTER_CONFIG}."
        ) from error
    return replace(policy, kind="adapter", base=base)


def _read_processor(file: Path, config: VLA0Config) -> Statistics:
    """The statistics of a saved processor. Refuses steps and settings that are not those of its config:
    LeRobot imports any class that a step names. Its scripts load the policy, and so come here, before."""
    expected, statistics = _expected_steps(config)[file.name], {}
    with reading(file):
        steps = read_json(file)["steps"]
        names = [_step_name(step) for step in steps]
        if names != list(expected):
            raise ValueError(
                f"{file} has the steps {names}, which could run code of whoever wrote it. It was not loaded: "
                f"with this config.json a processor of this package has {list(expected)}."
            )
        for step, (name, settings) in zip(steps, expected.items(), strict=True):
            _check_settings(step, settings, f"{file}: {name}")
            if step.get("state_file") is not None:
                state = file_inside(file.parent, step["state_file"], file)
                with reading(state):
                    tensors = load_file(state)
                for key, values in tensors.items():
                    feature, _, statistic = key.rpartition(".")
                    statistics.setdefault(feature, {})[statistic] = values
    return statistics


def _step_name(step: dict[str, Any]) -> str:
    """The name under which LeRobot finds a step: it takes `registry_name` if that is there."""
    if "registry_name" in step and "class" not in step:
        return step["registry_name"]
    named = " and ".join(str(step[key]) for key in ("registry_name", "class") if key in step)
    return named.rpartition(".")[2] if named in OWN_STEPS else named


def _check_settings(step: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    saved = step["config"]
    unknown = saved.keys() - expected | step.keys() - {"registry_name", "class", "config", "state_file"}
    if unknown:  # `stats`, for example, would take the place of the statistics that are checked
        raise ValueError(f"{where} has settings that this package does not save: {sorted(unknown)}.")
    for name, value in expected.items():
        if value is not ANY and saved.get(name) != value:
            raise ValueError(f"{where}: {name}={saved.get(name)!r}, and config.json asks for {value!r}.")


def _expected_steps(config: VLA0Config) -> dict[str, dict[str, dict[str, Any]]]:
    """By file, the steps of the two processors, in order, and the values of their settings."""
    norm_map = {kind: mode.value for kind, mode in config.normalization_mapping.items()}
    normalizer = {"eps": 1e-8, "norm_map": norm_map, "features": ANY, "normalize_observation_keys": ANY}
    names, exclude = config.action_feature_names, config.relative_exclude_joints
    relative = {"enabled": True, "exclude_joints": exclude, "action_names": names}
    is_relative, device = config.use_relative_actions, {"device": ANY, "float_dtype": ANY}
    return {
        PREPROCESSOR: {
            "rename_observations_processor": {"rename_map": ANY},
            "to_batch_processor": {},
            "device_processor": device,
            **({"relative_actions_processor": relative} if is_relative else {}),
            "normalizer_processor": normalizer,
            "vla0_action_encoder_processor": {"num_bins": config.num_bins},
        },
        POSTPROCESSOR: {
            "vla0_action_decoder_processor": {"num_bins": config.num_bins},
            "unnormalizer_processor": normalizer,
            **({"absolute_actions_processor": {"enabled": True}} if is_relative else {}),
            "device_processor": device,
        },
    }


def check_checkpoint(checkpoint: Checkpoint, config: VLA0Config) -> None:
    """Refuses a checkpoint that would load into a policy that acts wrongly.

    Args:
        config: the one it is loaded with: its own, or with overrides and other features.
    """
    folder, saved = checkpoint.folder, checkpoint.config
    if saved.server is not None and config.server == saved.server:
        raise ValueError(
            f"{folder / 'config.json'} names server={saved.server!r}, which would see the pictures and move "
            "the robot. A checkpoint cannot choose one: give yours with --policy.server."
        )
    for name in (*([WEIGHTS] if config.server is None else []), f"{VLM_FOLDER}/config.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no VLA-0 checkpoint: {name} is missing.")
    if None not in (saved.action_feature, config.action_feature):
        dimensions, here = saved.action_feature.shape[0], config.action_feature.shape[0]
        if dimensions != here:
            raise ValueError(
                f"action has {here} dimensions here, but the checkpoint {folder} was trained with "
                f"{dimensions}. To train for another robot, start from the VLM: --policy.type=vla0."
            )
    for name in ("num_bins", "action_norm", "use_relative_actions", "relative_exclude_joints"):
        trained, value = getattr(saved, name), getattr(config, name)
        if trained != value:
            raise ValueError(
                f"{name}={value!r} differs from the checkpoint's {trained!r} ({folder}): the integers would "
                f"mean other actions. Leave {name} out."
            )
    if POSTPROCESSOR not in checkpoint.statistics:
        logging.warning(f"{folder} holds weights only: {POSTPROCESSOR} (statistics of actions) is missing.")
        return
    for name, statistics in checkpoint.statistics.items():
        check_action_statistics(saved, statistics, str(folder / name))
        if name == PREPROCESSOR:
            check_state_statistics(saved, statistics, str(folder / name))
    for name in STATISTICS[saved.normalization_mapping["ACTION"]]:
        first, *others = (statistics[ACTION][name] for statistics in checkpoint.statistics.values())
        if any(not torch.equal(first, other) for other in others):
            raise ValueError(f"{folder}: the two processors have different {name} of {ACTION!r}.")


def load_policy_config(
    path: str | Path, overrides: Sequence[str] = (), revision: str | None = None
) -> VLA0Config:
    """The config of a checkpoint folder or Hub repo, its `pretrained_path` set.

    Args:
        overrides: changed fields, as on a command line: "--device=cpu"; see `override_arguments`.
        revision: of a Hub repo.
    """
    folder = _find_config(path, revision=revision).parent
    config = PreTrainedConfig.from_pretrained(folder, cli_overrides=list(overrides))
    if not isinstance(config, VLA0Config):
        raise ValueError(f"{path} holds a policy of type {config.type!r}, not vla0.")
    config.pretrained_path = Path(path)
    return config


def override_arguments(values: Mapping[str, Any]) -> list[str]:
    """{field: value} as arguments of `PreTrainedConfig.from_pretrained`, which reads their values as JSON."""
    return [f"--{name}={json.dumps(value, default=draccus.encode)}" for name, value in values.items()]


# ------------------------------------------------------------------------------------------------- adapters


def read_adapter_config(file: Path) -> dict[str, Any]:
    """adapter_config.json of a LoRA adapter. Other kinds, whose settings name further files and models to
    load, are refused."""
    saved = read_json(file)
    if saved.get("peft_type") != "LORA" or saved.get("megatron_config"):
        raise ValueError(f"{file}: peft_type must be 'LORA', without megatron_config. It was not loaded.")
    return saved


def check_adapter(policy: nn.Module, adapter: Path, base: str | Path) -> None:
    """Refuses a LoRA adapter (a folder) that was trained on another architecture than `policy`'s: PEFT only
    warns about layers that it cannot place."""
    read_adapter_config(adapter / ADAPTER_CONFIG)
    file, modules = adapter / ADAPTER_WEIGHTS, dict(policy.named_modules())
    with reading(file):
        tensors = load_file(file)
    for name, tensor in tensors.items():
        layer, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
        if part not in ("A.weight", "B.weight"):
            continue
        axis, side = (1, "in_features") if part == "A.weight" else (0, "out_features")  # (r, in), (out, r)
        size, expected = tensor.shape[axis], getattr(modules.get(layer), side, None)
        if size != expected:
            raise ValueError(
                f"the adapter {adapter} does not fit its base {base}: {side} of its layer {layer} is {size}, "
                f"in the base {expected}. Correct base_model_name_or_path in {ADAPTER_CONFIG}."
            )


def merge_adapter(policy: nn.Module, adapter: Path) -> nn.Module:
    """The policy with the adapter folded into its weights."""
    policy = import_peft().PeftModel.from_pretrained(policy, adapter).merge_and_unload()
    policy.config.use_peft, policy.config.pretrained_path = False, None
    return policy.eval()


def import_peft() -> ModuleType:
    """The optional package peft."""
    try:
        import peft
    except ImportError as error:
        raise ImportError('adapters need peft: pip install "lerobot_policy_vla0[peft]"') from error
    return peft


def default_targets(model: nn.Module) -> dict[str, str]:
    """Layers that get an adapter unless the user chooses: all linear layers of the language model, as in
    QLoRA (arXiv 2305.14314, section 4); none of the vision encoder."""
    return {
        "target_modules": rf".*{vlm.family(model).text}\.layers\.\d+\."
        r"(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
    }


def record_base(policy: nn.Module, wrapped: nn.Module) -> nn.Module:
    """Completes what LeRobot's `wrap_with_peft` made of a policy: refuses an adapter of the head, and writes
    the base into the adapter's config. Returns `wrapped`."""
    if type(policy.model.lm_head) is not nn.Linear:
        raise ValueError(
            "peft.target_modules (or full_training_modules) includes lm_head: acting computes a few rows of "
            "its own weights and would leave the adapter out. Choose layers below it."
        )
    config, saved = policy.config, wrapped.active_peft_config
    if config.pretrained_path:
        base, saved.revision = str(config.pretrained_path), config.pretrained_revision
    else:
        base, saved.revision = config.vlm, config.vlm_revision
    # A relative path would mean another folder to a process that starts elsewhere.
    saved.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    trained, total = wrapped.get_nb_trainable_parameters()
    logging.info(f"PEFT trains {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %).")
    return wrapped
