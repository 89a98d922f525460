"""The VLM: load it, build it empty, save what rebuilds it, feed it pictures and tokens. Knows nothing of
actions.

Everything that depends on the VLM's family stands in this file. A family that is not in FAMILIES is refused:
how it is shown a picture would be a guess.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
from transformers.initialization import no_init_weights
from transformers.utils import is_bitsandbytes_available, is_flash_attn_2_available


@dataclass(frozen=True)
class Family:
    """Where Transformers keeps a family's parts, by name below `model.model`."""

    text: str = "language_model"
    vision: tuple[str, ...] = ("vision_tower", "multi_modal_projector")
    # Gemma 3's pictures attend to themselves in both directions and most of its layers see a window only:
    # PromptCache has no such masks.
    prompt_cache: bool = True


# By `model_type`. All of these write numbers digit by digit.
FAMILIES = {
    "qwen2_5_vl": Family(vision=("visual",)),
    "qwen2_vl": Family(vision=("visual",)),
    "qwen3_vl": Family(vision=("visual",)),
    "smolvlm": Family(text="text_model", vision=("vision_model", "connector")),
    "internvl": Family(),
    "gemma3": Family(prompt_cache=False),
}
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
    # The loss and the decoder compute logits as `hidden @ lm_head.weight`.
    if getattr(config.get_text_config(), "final_logit_softcapping", None):
        raise ValueError(
            f"vlm={str(vlm)!r} squashes its logits (final_logit_softcapping), which the loss does not: "
            "such a model is not supported."
        )
    return config


def family(model: nn.Module) -> Family:
    return FAMILIES[model.config.model_type]


def language_model(model: nn.Module) -> nn.Module:
    """The decoder layers with their token embeddings, without the head."""
    return getattr(model.model, family(model).text)


def vision_modules(model: nn.Module) -> list[nn.Module]:
    """The vision encoder and what joins it to the language model."""
    return [getattr(model.model, name) for name in family(model).vision]


def has_prompt_cache(model: nn.Module) -> bool:
    """Whether `PromptCache` can decode with the model; `RowByRow` always can, more slowly."""
    layers = getattr(language_model(model).config, "layer_types", None) or ["full_attention"]
    return family(model).prompt_cache and set(layers) == {"full_attention"}


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
    config = read_config(vlm, revision)
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
            llm_int8_skip_modules=[f"model.{name}" for name in FAMILIES[config.model_type].vision]
            + ["lm_head"],
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


@dataclass(frozen=True)
class PictureRule:
    """Sizes of pictures, in pixels, that the VLM sees as they are; any other would be resized or refused."""

    multiple: int  # of which height and width are multiples
    square: bool = False
    fixed: int | None = None  # the only side


def picture_rule(processor: Any) -> PictureRule:
    """What follows from the processor's settings: side of a patch times neighbours that become one token."""
    settings = processor.image_processor
    match type(processor).__name__:
        case "Gemma3Processor":  # positions of the vision encoder are not interpolated
            return PictureRule(settings.size["height"], square=True, fixed=settings.size["height"])
        case "InternVLProcessor":
            side = int(processor.image_seq_length**0.5)
            return PictureRule(settings.size["height"] // side, square=True)
        case "SmolVLMProcessor":
            side = int(processor.image_seq_len**0.5)
            return PictureRule(settings.max_image_size["longest_edge"] // side, square=True)
        case _:
            return PictureRule(settings.patch_size * settings.merge_size)


def picture_text(processor: Any, height: int, width: int) -> tuple[str, str]:
    """(what the chat template writes for a picture, what the processor puts in its place), the latter with as
    many image tokens as a picture of this size takes."""
    rule, token = picture_rule(processor), processor.image_token
    tokens = token * ((height // rule.multiple) * (width // rule.multiple))
    match type(processor).__name__:
        case "Gemma3Processor":
            return processor.boi_token, processor.full_image_sequence
        case "InternVLProcessor":
            return token, f"{processor.start_image_token}{tokens}{processor.end_image_token}"
        case "SmolVLMProcessor":  # as for a picture that is not split
            fake = processor.fake_image_token
            return token, f"{fake}{processor.global_image_token}{tokens}{fake}"
        case _:
            return token, tokens


def pin_picture_size(processor: Any, height: int, width: int) -> None:
    """Sets the processor so that whoever calls it with its defaults shows pictures of this size as they
    are."""
    settings, rule = processor.image_processor, picture_rule(processor)
    match type(processor).__name__:
        case "Gemma3Processor":
            pass
        case "InternVLProcessor":
            settings.size = {"height": height, "width": width}
            settings.crop_to_patches = False
            processor.image_seq_length = (height // rule.multiple) ** 2
        case "SmolVLMProcessor":
            settings.size = settings.max_image_size = {"longest_edge": height}
            settings.do_image_splitting = False
            processor.image_seq_len = (height // rule.multiple) ** 2
        case _:
            settings.size = {"shortest_edge": height * width, "longest_edge": height * width}


def vision_inputs(processor: Any, pictures: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
    """Model inputs that accompany the tokens: what Transformers' processor returns, to the bit (of
    its torchvision backend).

    Args:
        pictures: uint8 (B, N, 3, H, W), on the model's device; H and W as `picture_rule` wants them.
        input_ids: (B, T), with the image tokens of N pictures in each row.
    """
    is_picture = (input_ids == processor.image_token_id).int()
    match type(processor).__name__:
        case "Gemma3Processor":
            pixels = _normalise(processor, pictures.flatten(0, 1))
            return {"pixel_values": pixels, "token_type_ids": is_picture}
        case "InternVLProcessor":
            return {"pixel_values": _normalise(processor, pictures.flatten(0, 1))}
        case "SmolVLMProcessor":
            return {"pixel_values": _normalise(processor, pictures)}
        case _:
            return {**_qwen_patches(processor, pictures.flatten(0, 1)), "mm_token_type_ids": is_picture}


def _normalise(processor: Any, pixels: Tensor) -> Tensor:
    """uint8 or float 0..255 (..., 3, H, W) → float, by the processor's mean and deviation."""
    settings = processor.image_processor
    mean, std = (
        torch.tensor(values, device=pixels.device).view(3, 1, 1) * (1 / settings.rescale_factor)
        for values in (settings.image_mean, settings.image_std)
    )
    return pixels.float().sub_(mean).div_(std)


def _qwen_patches(processor: Any, pictures: Tensor) -> dict[str, Tensor]:
    settings = processor.image_processor
    patch, merge = settings.patch_size, settings.merge_size
    count, channels, height, width = pictures.shape
    rows, columns = height // patch, width // patch
    # In a seventh of the processor's time: cut into patches while a pixel is one byte, in the order in which
    # `merge` × `merge` neighbours become a token, then normalise.
    patches = pictures.view(
        count, channels, rows // merge, merge, patch, columns // merge, merge, patch
    ).permute(0, 2, 5, 3, 6, 1, 4, 7)
    pixels = _normalise(processor, patches.reshape(-1, channels, 1, patch * patch))
    # A still picture is a video of `temporal_patch_size` equal frames.
    pixels = pixels.expand(-1, -1, settings.temporal_patch_size, -1)
    return {
        "pixel_values": pixels.reshape(len(pixels), -1),
        "image_grid_thw": torch.tensor([[1, rows, columns]], device=pixels.device).repeat(count, 1),
    }


def hidden_states(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Last hidden states (B, T, hidden) of a full pass without a cache, for training."""
    return model.model(**inputs, use_cache=False).last_hidden_state


def prompt_positions(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Positions of right-padded prompts, (axes, R, T), and what to add to a token's place behind them, (R,
    1).

    Three axes for multimodal RoPE, where an image spans fewer positions than tokens (so the second is <= 0);
    one for everything else.
    """
    ids = inputs["input_ids"]
    if not hasattr(model.model, "get_rope_index"):
        positions = torch.arange(ids.shape[1], device=ids.device).expand(1, *ids.shape)
        return positions, ids.new_zeros(len(ids), 1)
    positions, delta = model.model.get_rope_index(
        ids,
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    return positions, delta.view(len(ids), 1).to(ids.device)


def embed_prompts(
    model: nn.Module, inputs: dict[str, Tensor], tokens: Tensor
) -> tuple[Tensor, dict[str, Any]]:
    """Tokens (R, T) that begin with the prompts of `inputs` → (embeddings (R, T, hidden) with the pictures in
    place, further inputs of the language model)."""
    embeddings = language_model(model).get_input_embeddings()(tokens)
    is_picture = tokens == model.config.image_token_id
    grid = {"image_grid_thw": inputs["image_grid_thw"]} if "image_grid_thw" in inputs else {}
    seen = model.model.get_image_features(inputs["pixel_values"], **grid)
    features = seen.pooler_output
    if isinstance(features, tuple | list):  # one tensor for each picture
        features = torch.cat(features)
    embeddings[is_picture] = features.reshape(-1, features.shape[-1]).to(embeddings.dtype)
    # Qwen3-VL adds features of earlier vision layers behind the first layers of the language model.
    deep = getattr(seen, "deepstack_features", None)
    extra = {"visual_pos_masks": is_picture, "deepstack_visual_embeds": deep} if deep else {}
    return embeddings, extra
