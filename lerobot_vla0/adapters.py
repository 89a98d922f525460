"""PEFT adapters (LoRA) on the VLM: what is trained, what the adapter's base is, checking and merging.

An adapter checkpoint holds adapter_model.safetensors and adapter_config.json, which names its base: a VLA-0
checkpoint, or the VLM that the policy was made from.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from huggingface_hub import hf_hub_download
from lerobot.configs import PreTrainedConfig
from safetensors import safe_open
from torch import nn

from . import backbone
from .checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint, find_checkpoint, readable
from .configuration_vla0 import VLA0Config
from .files import read_json, reading


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


def check_trainable(config: VLA0Config) -> None:
    """Raises ValueError if the weights themselves would be trained and are quantised."""
    if config.load_in_4bit and not config.use_peft:
        raise ValueError(
            "load_in_4bit=True: weights of 4 bits cannot be trained themselves. Train an adapter on them "
            "(--peft.method_type=LORA), or set load_in_4bit=false."
        )


def default_targets(model: nn.Module) -> dict[str, str]:
    """Layers that get an adapter unless the user chooses: all linear layers of the language model, as in
    QLoRA (arXiv 2305.14314, section 4); none of the vision encoder."""
    return {
        "target_modules": rf".*{backbone.family(model).text}\.layers\.\d+\."
        r"(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
    }


def record_base(policy: nn.Module, wrapped: nn.Module) -> nn.Module:
    """Completes what LeRobot's `wrap_with_peft` made of a policy: checks the targets, and writes the base
    into the adapter's config. Returns `wrapped`.

    Raises:
        ValueError: the targets include the language model's head.
    """
    if type(policy.model.lm_head) is not nn.Linear:
        raise ValueError(
            "peft.target_modules (or full_training_modules) includes lm_head: acting computes a few rows "
            "of its own weights and would leave the adapter out. Choose layers below it; the default is "
            f"{default_targets(policy.model)['target_modules']!r}."
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


@dataclass(frozen=True)
class Source:
    """What `VLA0Policy.from_pretrained` loads."""

    base: Checkpoint  # a policy or a bare VLM
    config: VLA0Config
    adapter: str | None = None  # path or Hub id of an adapter of that base
    adapter_revision: str | None = None
    merge: bool = False  # merge the adapter into the base; otherwise LeRobot puts it on afterwards


def find_source(path: str, config: VLA0Config | None, revision: str | None = None, **hub: Any) -> Source:
    """Finds out what a path or Hub id holds, and for an adapter its base.

    LeRobot's `make_policy` loads an adapter's base by calling `from_pretrained` with the base and with the
    adapter's config; PEFT then puts the adapter on.

    Args:
        config: overrides the checkpoint's own; None takes that.
        hub: cache_dir, token, ..., as `find_checkpoint` takes them.

    Raises:
        FileNotFoundError: nothing is there, or an adapter's base is not.
        ImportError: an adapter, and peft is not installed.
        ValueError: a bare VLM without `config`, or an adapter with `config.server`.
    """
    if config is not None and config.use_peft and str(config.pretrained_path) not in (path, "None"):
        adapter = str(config.pretrained_path)
        # LeRobot loads the adapter's processors afterwards.
        find_checkpoint(adapter, weights=False, revision=config.pretrained_revision, **hub)
        source = Source(
            _find_base(adapter, path, revision, **hub), config, adapter, config.pretrained_revision
        )
    else:
        weights = config is None or config.server is None
        found = find_checkpoint(path, weights=weights, revision=revision, **hub)
        if config is None and found.kind == "vlm":
            raise ValueError(
                f"{path} holds a VLM and no policy. Train one: --policy.type=vla0 --policy.vlm={path}"
            )
        config = PreTrainedConfig.from_pretrained(found.folder) if config is None else config
        if found.kind != "adapter":
            return Source(found, config)
        import_peft()
        saved = read_adapter_config(found.folder / ADAPTER_CONFIG)
        base = _find_base(path, saved["base_model_name_or_path"], saved.get("revision"), **hub)
        # Merging into 4-bit weights would round what was learnt.
        source = Source(base, replace(config, load_in_4bit=False), str(found.folder), merge=True)
    if config.server is not None:
        raise ValueError(
            f"server={config.server!r} with the adapter {source.adapter}: merge it into its base first "
            "(lerobot-vla0 merge), and export and serve the result."
        )
    return source


def read_adapter_config(file: Path) -> dict[str, Any]:
    """adapter_config.json of a LoRA adapter. Other kinds of adapters, whose settings name further files and
    models to load, are refused.

    Raises:
        ValueError: it is damaged, or of another kind.
    """
    saved = read_json(file)
    if saved.get("peft_type") != "LORA" or saved.get("megatron_config"):
        kind = saved.get("peft_type")
        raise ValueError(f"{file}: peft_type is {kind!r}; it must be 'LORA', without megatron_config.")
    for name in ("base_model_name_or_path", "revision"):
        if not isinstance(saved.setdefault(name, None), str | None):
            raise ValueError(f"{file}: {name} is {saved[name]!r}; it must be a text.")
    return saved


def _find_base(adapter: str, base: str, revision: str | None, **hub: Any) -> Checkpoint:
    try:
        return find_checkpoint(base, revision=revision, **hub)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the base of the adapter {adapter} is not there: {error} If it has moved, correct "
            f"base_model_name_or_path in {ADAPTER_CONFIG}."
        ) from error


def apply_adapter(policy: nn.Module, source: Source) -> nn.Module:
    """Checks that the adapter of `source`, if there is one, fits the policy of its base, and merges it if
    asked for."""
    if source.adapter is not None:
        check_adapter(policy, source.adapter, source.base.path, revision=source.adapter_revision)
    if not source.merge:
        return policy
    policy = import_peft().PeftModel.from_pretrained(policy, source.adapter).merge_and_unload()
    policy.config.use_peft, policy.config.pretrained_path = False, None
    return policy.eval()


def check_adapter(policy: nn.Module, adapter: str | Path, base: str | Path, **hub: Any) -> None:
    """Refuses a LoRA adapter that was trained on another architecture than `policy`'s; PEFT itself only warns
    about layers that it cannot place.

    Raises:
        FileNotFoundError: the adapter's weights are missing.
        ValueError: a layer of the adapter is missing in the policy or has another size, its config asks for
            larger layers than its weights have, or a file is damaged.
    """
    file, config_file = (
        Path(adapter) / name if Path(adapter).is_dir() else Path(hf_hub_download(str(adapter), name, **hub))
        for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG)
    )
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {adapter} holds no adapter. Copy or download all of it.")
    config, largest = read_adapter_config(config_file), 0
    modules = dict(policy.named_modules())
    with readable(file), safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (not a dict)
            layer, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
            if part not in ("A.weight", "B.weight"):
                continue
            shape = tensors.get_slice(name).get_shape()  # (r, in) and (out, r)
            largest = max(largest, shape[0] if part == "A.weight" else 0)
            axis, size = (1, "in_features") if part == "A.weight" else (0, "out_features")
            expected = getattr(modules.get(layer), size, None)
            if expected != shape[axis]:
                there = "does not have" if layer not in modules else f"has with {size}={expected}"
                raise ValueError(
                    f"the adapter {adapter} does not fit its base {base}: it was trained on a model with a "
                    f"layer {layer} of {size}={shape[axis]}, which the base {there}. Correct "
                    f"base_model_name_or_path in {ADAPTER_CONFIG}, or put the right model there."
                )
    with reading(config_file):
        rank = max(config["r"], *config.get("rank_pattern", {}).values(), 1)
        if rank > largest:
            raise ValueError(
                f"{config_file} has layers of rank {rank}, and {file.name} of {largest} at most."
            )
