"""What the benchmarks share: policies with random weights, checks of settings, tables and result files."""

import json
import platform
import textwrap
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from lerobot.configs import FeatureType, PolicyFeature

from ..configuration_vla0 import DTYPES, VLA0Config
from ..demo.tiny_vlm import make_config, make_processor
from ..files import new_file
from ..modeling_vla0 import VLA0Policy

SMALL_VISION = {
    "depth": 4, "hidden_size": 320, "intermediate_size": 1280, "num_heads": 4, "fullatt_block_indexes": [3],
}  # fmt: skip
# {model: sizes of language model and vision encoder}, as Transformers' configs of Qwen2.5-VL name them; what
# all have in common is in DEFAULTS.
DEFAULTS = {"vocab_size": 151936, "num_key_value_heads": 2}
SHAPES = {
    # Qwen2.5-VL-3B (its config.json on the Hub).
    "qwen2.5-vl-3b-random": (
        {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16},
        {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16},
    ),
    # The language model of Qwen2.5-0.5B and a small vision encoder: what two CPU cores can decode with.
    "qwen2.5-0.5b-random": (
        {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
        SMALL_VISION,
    ),
    # What two CPU cores can train at batch 8. In a smaller model the vocabulary is a larger part of a step.
    "small-random": (
        {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8},
        SMALL_VISION,
    ),
}
Shape = tuple[dict[str, Any], dict[str, Any]]


def random_policy(shape: Shape, seed: int, **settings: Any) -> VLA0Policy:
    """A policy for LIBERO with random weights, in evaluation mode.

    Args:
        shape: of the VLM, see SHAPES.
        seed: of the weights.
        settings: fields of `VLA0Config`.
    """
    image = PolicyFeature(FeatureType.VISUAL, (3, 256, 256))
    policy_config = VLA0Config(
        input_features={"observation.images.image": image, "observation.images.image2": image},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))},
        push_to_hub=False,
        **settings,
    )
    with TemporaryDirectory() as folder:
        processor = make_processor()
        vlm_config = make_config(processor, DEFAULTS | shape[0], shape[1])
        vlm_config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
        vlm_config.save_pretrained(folder)
        processor.save_pretrained(folder)
        policy = VLA0Policy(policy_config, vlm_folder=Path(folder)).eval()
    # Filled in place, on the device: Transformers' own initialisation takes minutes for three billion.
    torch.manual_seed(seed)
    for name, parameter in policy.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
        else:
            torch.nn.init.constant_(parameter, float("norm" in name))
    return policy


def choose_device(device: str | None) -> str:
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def synchronize(policy: VLA0Policy) -> None:
    """Waits until the GPU has done what was asked of it, before a clock is read."""
    if policy.model.device.type == "cuda":
        torch.cuda.synchronize()


def check_counts(config: Any, *fields: str) -> None:
    """Raises ValueError if a number is below 1."""
    for name in fields:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1.")


def check_machine(config: Any) -> None:
    """Raises ValueError for a `dtype`, `device` or `seed` that does not exist, before processes start."""
    if config.dtype is not None and config.dtype not in DTYPES:
        raise ValueError(f"dtype={config.dtype!r} is not one of {', '.join(DTYPES)}.")
    if config.seed < 0:
        raise ValueError(f"seed={config.seed} must be at least 0.")
    try:
        torch.empty(0, device=choose_device(config.device))
    except (RuntimeError, AssertionError) as error:  # the latter: PyTorch was built without it
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={config.device!r} is not there ({reason}).") from error


def check_names(field: str, given: list[str], known: dict[str, str]) -> None:
    """Raises ValueError if a name is not known, or there is none."""
    wrong = [name for name in given if name not in known]
    if not given:
        raise ValueError(f"{field}=[] names none of {', '.join(known)}.")
    if wrong:
        raise ValueError(f"{field}={wrong} are not among {', '.join(known)}.")


def describe(policy: VLA0Policy) -> str:
    """Size and data type of the model, and the machine."""
    device = policy.model.device
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    millions = policy.model.num_parameters() / 1e6
    return f"{millions:,.1f} million parameters, {str(policy.model.dtype).removeprefix('torch.')}, {where}"


def print_table(table: pd.DataFrame) -> None:
    """Prints the columns, of text, `mode` first."""
    text = table.set_index("mode").rename_axis(index=None, columns="mode").to_string()
    print(textwrap.indent(text, "  "))


def write_results(file: Path, config: Any, machine: str, rows: pd.DataFrame, **more: Any) -> dict[str, Any]:
    """Writes measurements, with the versions and settings they were made with, as JSON; returns the same."""
    packages = ("lerobot_policy_vla0", "torch", "torchvision", "transformers")
    result = {
        "machine": machine,
        "versions": {name: version(name) for name in packages},
        "settings": json.loads(json.dumps(asdict(config), default=str)),
        **more,
        "results": [
            {name: value for name, value in row.items() if pd.notna(value)} for row in rows.to_dict("records")
        ],
    }
    with new_file(file) as draft:
        draft.write_text(json.dumps(result, indent=2))
    return result
