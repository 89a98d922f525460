"""Qwen2.5-VL of any size with random weights and a small tokenizer, for measurements and small models without
a download; and what the benchmarks share. Architecture, chat template and the tokenisation of numbers are
those of Qwen2.5-VL."""

import json
import platform
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from lerobot.configs import FeatureType, PolicyFeature
from transformers import Qwen2_5_VLConfig

from ..configuration_vla0 import VLA0Config
from ..files import new_file
from ..modeling_vla0 import VLA0Policy
from ..vlm import load_processor

# Qwen has 0.02, at widths in the thousands. At a width of 128, 0.06 trained better in the same time.
INITIALIZER_RANGE = 0.06
# Qwen2.5-VL's processor with a byte-level BPE of 600 tokens, trained on VLA-0's prompt and LIBERO's
# instructions. Digits, the space and special tokens are split as in Qwen's.
PROCESSOR = Path(__file__).with_name("processor")


def make_processor() -> Any:
    """Qwen2.5-VL's processor around a small tokenizer."""
    return load_processor(PROCESSOR)


def make_config(processor: Any, text: dict[str, Any], vision: dict[str, Any]) -> Any:
    """Qwen2_5_VLConfig of these sizes, with the token ids of `make_processor`'s tokenizer."""
    token_id = processor.tokenizer.convert_tokens_to_ids
    head_dim = text["hidden_size"] // text["num_attention_heads"]
    # Multimodal RoPE splits half of a head's dimensions among time, height and width, 1 : 1.5 : 1.5 as in
    # Qwen2.5-VL.
    section = [head_dim // 8, head_dim * 3 // 16, head_dim * 3 // 16]
    return Qwen2_5_VLConfig(
        text_config={
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section},
            "tie_word_embeddings": True,
            "initializer_range": INITIALIZER_RANGE,
            "bos_token_id": token_id("<|endoftext|>"),
            "eos_token_id": token_id("<|im_end|>"),
            "pad_token_id": None,
            **text,
        },
        vision_config={
            "out_hidden_size": text["hidden_size"],
            "initializer_range": INITIALIZER_RANGE,
            **vision,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=True,
    )


TEXT_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
VISION_SIZES = ("depth", "hidden_size", "intermediate_size", "num_heads")
Shape = tuple[tuple[int, ...], tuple[int, ...]]
# {model: (TEXT_SIZES of the language model, VISION_SIZES of the vision encoder)}
SHAPES: dict[str, Shape] = {
    # Qwen2.5-VL-3B's config.json.
    "qwen2.5-vl-3b-random": ((2048, 11008, 36, 16, 151936), (32, 1280, 3420, 16)),
    # The language model of Qwen2.5-0.5B and a small vision encoder: what two CPU cores can decode with.
    "qwen2.5-0.5b-random": ((896, 4864, 24, 14, 151936), (4, 320, 1280, 4)),
    # What two CPU cores can train at batch 8. In a smaller model the vocabulary is a larger part of a step.
    "small-random": ((512, 2048, 8, 8, 151936), (4, 320, 1280, 4)),
}


def random_policy(shape: Shape, seed: int, **settings: Any) -> VLA0Policy:
    """A policy for LIBERO with random weights, in evaluation mode; `settings` are fields of `VLA0Config`."""
    image = PolicyFeature(FeatureType.VISUAL, (3, 256, 256))
    policy_config = VLA0Config(
        input_features={"observation.images.image": image, "observation.images.image2": image},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))},
        push_to_hub=False,
        **settings,
    )
    with TemporaryDirectory() as folder:
        processor = make_processor()
        text = dict(zip(TEXT_SIZES, shape[0], strict=True)) | {"num_key_value_heads": 2}
        vision = dict(zip(VISION_SIZES, shape[1], strict=True))
        # As in Qwen2.5-VL, every eighth layer attends to the whole picture; the last of fewer.
        vision["fullatt_block_indexes"] = list(range(7, vision["depth"], 8)) or [vision["depth"] - 1]
        vlm_config = make_config(processor, text, vision)
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


def check_names(option: str, names: list[str], known: Iterable[str]) -> None:
    if not names or not set(names).issubset(known):
        raise ValueError(f"{option}={names} must be some of {', '.join(known)}.")


def describe(policy: VLA0Policy) -> str:
    """Size and data type of the model, and the machine."""
    model = policy.model
    processor = f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else processor
    return f"{model.num_parameters() / 1e6:,.1f} million parameters, {model.dtype}, {machine}"


def write_results(file: Path, config: Any, machine: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Prints measurements, and writes them as JSON with the versions and settings they were made with."""
    print(f"{machine}\n{pd.DataFrame(rows).to_string(index=False, float_format='{:.4g}'.format)}")
    packages = ("lerobot_policy_vla0", "torch", "torchvision", "transformers")
    result = {
        "machine": machine,
        "versions": {name: version(name) for name in packages},
        "settings": json.loads(json.dumps(asdict(config), default=str)),
        "results": rows,
    }
    with new_file(file) as draft:
        draft.write_text(json.dumps(result, indent=2))
    print(f"Wrote {file}")
    return result
