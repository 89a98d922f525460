"""The VLM: load it, build it empty, save what rebuilds it, feed it pictures and tokens. Knows nothing of
actions.

Everything that depends on the VLM's family (Qwen2.5-VL for now) stands in this file.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
from transformers.initialization import no_init_weights
from transformers.utils import is_bitsandbytes_available, is_flash_attn_2_available

FAMILIES = ("qwen2_5_vl",)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def read_config(vlm: str | Path, revision: str | None = None) -> Any:
    """Config of the VLM at a Hub id or folder, checked to be of a family that this package drives.

    Raises:
        ValueError: nothing there, or not a supported vision-language model.
    """
    try:
        config = AutoConfig.from_pretrained(vlm, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"vlm={str(vlm)!r}: no vision-language model could be read there ({str(error).splitlines()[0]}). "
            "Give a Hugging Face Hub id, or a folder with the model's config.json, weights and processor."
        ) from error
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"vlm={str(vlm)!r} is a {config.model_type!r} model. Supported are vision-language models of "
            f"type {', '.join(FAMILIES)}, for example Qwen/Qwen2.5-VL-3B-Instruct."
        )
    return config


def _attention(attn_implementation: str | None) -> str | None:
    """PyTorch's attention in place of a flash attention that is not there: the same result, slower."""
    if attn_implementation == "flash_attention_2" and not is_flash_attn_2_available():
        logging.warning(
            "attn_implementation=flash_attention_2 needs the package flash-attn and a GPU: using sdpa."
        )
        return "sdpa"
    return attn_implementation


def load_vlm(
    vlm: str | Path,
    *,
    revision: str | None,
    dtype: str,
    attn_implementation: str | None,
    load_in_4bit: bool = False,
) -> tuple[nn.Module, Any]:
    """(model with pretrained weights, processor) from a Hub id or folder.

    Raises:
        ImportError: `load_in_4bit` without bitsandbytes.
    """
    read_config(vlm, revision)
    settings: dict[str, Any] = {}
    if load_in_4bit:
        if not is_bitsandbytes_available():
            raise ImportError(
                'load_in_4bit=True needs bitsandbytes: pip install "lerobot_policy_vla0[qlora]". Or set '
                "load_in_4bit=false."
            )
        # QLoRA's settings (arXiv 2305.14314, section 3). The vision encoder gets no adapter that could make
        # up for the rounding, and the head's own weights are read when acting.
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[dtype],
            llm_int8_skip_modules=["model.visual", "lm_head"],
        )
    model = AutoModelForImageTextToText.from_pretrained(
        vlm,
        revision=revision,
        dtype=DTYPES[dtype],
        attn_implementation=_attention(attn_implementation),
        **settings,
    )
    return model, AutoProcessor.from_pretrained(vlm, revision=revision)


def build_vlm(folder: Path, *, dtype: str, attn_implementation: str | None) -> tuple[nn.Module, Any]:
    """(model with *uninitialised* weights, processor) from the files that `save_vlm` wrote.

    Random initialisation of the 3B shape would take minutes only to be overwritten by the checkpoint's
    weights.
    """
    config = read_config(folder)
    with no_init_weights():
        model = AutoModelForImageTextToText.from_config(
            config, dtype=DTYPES[dtype], attn_implementation=_attention(attn_implementation)
        )
    model.tie_weights()
    return model.eval(), AutoProcessor.from_pretrained(folder)


def save_vlm(model: nn.Module, processor: Any, folder: Path) -> None:
    """Writes the VLM's config, tokenizer and image processor, everything but the weights, as JSON."""
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    # Transformers writes the chat template to chat_template.jinja, which LeRobot's Hub push leaves out
    # (it uploads *.safetensors, *.json, *.yaml, *.md).
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "chat_template.json").write_text(
        json.dumps({"chat_template": processor.chat_template}, indent=2)
    )


def picture_multiple(processor: Any) -> int:
    """Height and width of a picture must be multiples of this (28 for Qwen2.5-VL), else it would be
    resized."""
    return processor.image_processor.patch_size * processor.image_processor.merge_size


def vision_inputs(processor: Any, pictures: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
    """Model inputs that accompany the tokens.

    Args:
        pictures: uint8 (B, N, 3, H, W), on the model's device; H and W are multiples of `picture_multiple`.
        input_ids: (B, T), with the image tokens of N pictures in each row.
    """
    settings, pictures = processor.image_processor, pictures.flatten(0, 1)
    patch, merge = settings.patch_size, settings.merge_size
    count, channels, height, width = pictures.shape
    rows, columns = height // patch, width // patch
    # What Transformers' image processor returns, to the bit, in a seventh of the time: cut into patches while
    # a pixel is one byte, in the order in which `merge` × `merge` neighbours become a token, then normalise.
    patches = pictures.view(
        count, channels, rows // merge, merge, patch, columns // merge, merge, patch
    ).permute(0, 2, 5, 3, 6, 1, 4, 7)
    pixels = patches.reshape(-1, channels, 1, patch * patch).float()
    mean, std = (
        torch.tensor(values, device=pixels.device).view(channels, 1, 1) * (1 / settings.rescale_factor)
        for values in (settings.image_mean, settings.image_std)
    )
    pixels = pixels.sub_(mean).div_(std)
    # A still picture is a video of `temporal_patch_size` equal frames.
    pixels = pixels.expand(-1, -1, settings.temporal_patch_size, -1)
    return {
        "pixel_values": pixels.reshape(len(pixels), -1),
        "image_grid_thw": torch.tensor([[1, rows, columns]], device=pixels.device).repeat(count, 1),
        "mm_token_type_ids": (input_ids == processor.image_token_id).int(),
    }


def hidden_states(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Last hidden states (B, T, hidden) of a full pass without a cache, for training."""
    return model.model(**inputs, use_cache=False).last_hidden_state
