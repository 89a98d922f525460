"""What a checkpoint folder must hold: config.json, model.safetensors, vlm/ and the two processors; or, after
training with PEFT, adapter_model.safetensors and adapter_config.json, which names the base, and the rest."""

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from huggingface_hub import hf_hub_download
from lerobot.configs import PreTrainedConfig
from lerobot.utils.constants import POLICY_POSTPROCESSOR_DEFAULT_NAME
from safetensors import safe_open
from torch import nn

from .processor_vla0 import check_action_statistics

VLM_FOLDER = "vlm"  # config, tokenizer and image processor of the VLM
WEIGHTS = "model.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when all is written, and is removed when that fails.

    Raises:
        FileExistsError: `out` exists and is not empty.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(
            f"out={str(out)!r} exists and is not empty. Choose another folder or remove it."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside `out`: a folder can be renamed on one file system only.
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-partial-", dir=out.parent))
    try:
        partial.chmod(0o755)  # mkdtemp's is for its owner alone
        yield partial
        partial.replace(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def import_peft() -> ModuleType:
    """The optional package peft.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError('adapters need peft: pip install "lerobot_policy_vla0[peft]"') from error
    return peft


def is_bare_vlm(path: str | Path, **hub: Any) -> bool:
    """Whether a folder or Hub repo holds a VLM as Transformers writes it, and no policy.

    Args:
        hub: revision, token, cache_dir, ..., as `hf_hub_download` takes them.

    Raises:
        FileNotFoundError: it is no folder, and no repo that can be read.
    """
    file = Path(path) / "config.json"
    if not Path(path).is_dir():
        try:
            file = Path(hf_hub_download(str(path), "config.json", **hub))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{str(path)!r} is neither a folder nor a Hub repo that can be read "
                f"({str(error).splitlines()[0]})."
            ) from error
    return file.is_file() and "model_type" in json.loads(file.read_text())


def check_adapter(policy: nn.Module, adapter: str | Path, base: str | Path, **hub: Any) -> None:
    """Refuses a LoRA adapter that was trained on another architecture than `policy`'s; PEFT itself only warns
    about layers that it cannot place.

    Raises:
        ValueError: a layer of the adapter is missing in the policy or has another size.
    """
    file = Path(adapter) / ADAPTER_WEIGHTS
    if not Path(adapter).is_dir():
        file = Path(hf_hub_download(str(adapter), ADAPTER_WEIGHTS, **hub))
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {adapter} holds no adapter. Copy or download all of it.")
    modules = dict(policy.named_modules())
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (not a dict)
            layer, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
            if part not in ("A.weight", "B.weight"):
                continue
            shape = tensors.get_slice(name).get_shape()  # (r, in) and (out, r)
            axis, size = (1, "in_features") if part == "A.weight" else (0, "out_features")
            expected = getattr(modules.get(layer), size, None)
            if expected != shape[axis]:
                there = "does not have" if layer not in modules else f"has with {size}={expected}"
                raise ValueError(
                    f"the adapter {adapter} does not fit its base {base}: it was trained on a model with a "
                    f"layer {layer} of {size}={shape[axis]}, which the base {there}. Correct "
                    f"base_model_name_or_path in {ADAPTER_CONFIG}, or put the right model there."
                )


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
        ValueError: the action dimension or `num_bins` differ from the checkpoint's, or its statistics lack
            the action's range.
    """
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
    if saved.num_bins != config.num_bins:
        raise ValueError(
            f"num_bins={config.num_bins} differs from the checkpoint's {saved.num_bins} ({folder}): the "
            "model and its processors count on the latter. Leave num_bins out."
        )
    if saved.action_norm != config.action_norm:
        raise ValueError(
            f"action_norm={config.action_norm!r} differs from the checkpoint's {saved.action_norm!r} "
            f"({folder}): the integers would mean other actions. Leave action_norm out."
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
