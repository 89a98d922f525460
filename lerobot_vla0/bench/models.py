"""Policies with random weights of real shapes, and what both benchmarks say of a machine."""

import platform
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lerobot.configs import FeatureType, PolicyFeature

from ..configuration_vla0 import VLA0Config
from ..demo.tiny_vlm import make_config, make_processor
from ..modeling_vla0 import VLA0Policy

SHAPES = {
    # Qwen2.5-VL-3B (its config.json on the Hub).
    "qwen2.5-vl-3b-random": (
        {
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
            "num_attention_heads": 16, "num_key_value_heads": 2,
        },
        {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16},
    ),
    # The language model of Qwen2.5-0.5B behind a small vision encoder: what two CPU cores can still time.
    "qwen2.5-0.5b-random": (
        {
            "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
            "num_attention_heads": 14, "num_key_value_heads": 2,
        },
        {
            "depth": 4, "hidden_size": 320, "intermediate_size": 1280, "num_heads": 4,
            "fullatt_block_indexes": [3],
        },
    ),
}  # fmt: skip


def random_policy(config: Any, device: str) -> VLA0Policy:
    """A LIBERO policy of shape `config.model` in `config.dtype` (None: bfloat16), seeded by `config.seed`."""
    text, vision = SHAPES[config.model]
    image = PolicyFeature(FeatureType.VISUAL, (3, 256, 256))
    policy_config = VLA0Config(
        input_features={"observation.images.image": image, "observation.images.image2": image},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))},
        device=device,
        dtype=config.dtype or "bfloat16",
        push_to_hub=False,
    )
    with TemporaryDirectory() as folder:
        processor = make_processor()
        vlm_config = make_config(processor, text, vision)
        vlm_config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
        vlm_config.save_pretrained(folder)
        processor.save_pretrained(folder)
        policy = VLA0Policy(policy_config, vlm_folder=Path(folder)).eval()
    # Filled in place, on the device: Transformers' own initialisation takes minutes for three billion.
    torch.manual_seed(config.seed)
    for name, parameter in policy.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
        else:
            torch.nn.init.constant_(parameter, float("norm" in name))
    return policy


def synchronize(policy: VLA0Policy) -> None:
    if policy.model.device.type == "cuda":
        torch.cuda.synchronize()


def check_names(field_name: str, given: list[str], known: dict[str, str]) -> None:
    wrong = [name for name in given if name not in known]
    if wrong:
        raise ValueError(f"{field_name}={wrong} are not among {', '.join(known)}.")


def describe(policy: VLA0Policy) -> str:
    device = policy.model.device
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    millions = policy.model.num_parameters() / 1e6
    return f"{millions:,.1f} million parameters, {str(policy.model.dtype).removeprefix('torch.')}, {where}"
