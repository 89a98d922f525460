"""The VLM: load it, build it empty, save what rebuilds it, feed it pictures and tokens. Knows nothing of
actions.

Everything that depends on the VLM's family (Qwen2.5-VL for now) stands in this file.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.initialization import no_init_weights

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


def load_vlm(
    vlm: str | Path, *, revision: str | None, dtype: str, attn_implementation: str | None
) -> tuple[nn.Module, Any]:
    """(model with pretrained weights, processor) from a Hub id or folder."""
    read_config(vlm, revision)
    model = AutoModelForImageTextToText.from_pretrained(
        vlm, revision=revision, dtype=DTYPES[dtype], attn_implementation=attn_implementation
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
            config, dtype=DTYPES[dtype], attn_implementation=attn_implementation
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
    image_processor = processor.image_processor
    # Transformers' own image processor, on tensors: it groups equal shapes and normalises and patchifies them
    # as one batch on their device.
    vision = image_processor(
        images=list(pictures.flatten(0, 1)), do_resize=False, device=pictures.device, return_tensors="pt"
    )
    return {
        "pixel_values": vision["pixel_values"],
        "image_grid_thw": vision["image_grid_thw"],
        "mm_token_type_ids": (input_ids == processor.image_token_id).int(),
    }


def hidden_states(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Last hidden states (B, T, hidden) of a full pass without a cache, for training."""
    return model.model(**inputs, use_cache=False).last_hidden_state


class PromptCache:
    """The VLM after a batch of left-padded prompts: the KV cache and what it takes to extend it.

    Only `token_ids` rows of the LM head are computed: 12 instead of 151,936.

    Attributes:
        logits: (B, len(token_ids)), after the prompts.
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor], token_ids: Tensor) -> None:
        self.language_model = model.model.language_model
        self.head = model.lm_head.weight[token_ids]
        output = model.model(**inputs, use_cache=True)
        self.cache = output.past_key_values
        self.mask = inputs["attention_mask"]
        # Multimodal RoPE: an image spans fewer positions than tokens, so text goes on at token count + delta
        # (<= 0).
        self.next_position = self.mask.sum(1, keepdim=True) + output.rope_deltas
        self.logits = self._head(output.last_hidden_state[:, -1])

    def _head(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.head).float()

    def extend(self, tokens: Tensor) -> Tensor:
        """Feeds `tokens` (B, k) → logits after each of them, (B, k, len(token_ids))."""
        k = tokens.shape[1]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), k)], dim=1)
        positions = self.next_position + torch.arange(k, device=tokens.device)
        self.next_position = self.next_position + k
        hidden = self.language_model(
            input_ids=tokens,
            position_ids=positions.expand(3, -1, -1),  # time, height and width advance together in text
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        return self._head(hidden)
