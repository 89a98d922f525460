"""The VLM: load it, build it empty, save what rebuilds it, feed it pictures and tokens. Knows nothing of
actions.

Everything that depends on the VLM's family (Qwen2.5-VL for now) stands in this file.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
from transformers.initialization import no_init_weights
from transformers.utils import is_bitsandbytes_available

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
        vlm, revision=revision, dtype=DTYPES[dtype], attn_implementation=attn_implementation, **settings
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


def encode_prefix(model: nn.Module, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values, (1, heads, P, size) per layer, of text tokens (1, P) at the start of prompts."""
    cache = _RowCache(ids.shape[1], None)
    slots = torch.arange(ids.shape[1], device=ids.device)[None]
    _attend(
        model.model.language_model, cache, model.get_input_embeddings()(ids), slots.expand(3, -1, -1), slots
    )
    return cache.layers


def _attend(
    language_model: nn.Module, cache: "_RowCache", embeddings: Tensor, positions: Tensor, slots: Tensor
) -> Tensor:
    """Feeds embeddings (R, k, hidden) at `slots` (R, k) of the cache → last hidden states."""
    cache.slots, cache.used = slots, int(slots.max()) + 1
    # Every token sees the slots up to its own: what lies beyond a row's length is its own draft, or stale.
    seen = torch.arange(cache.used, device=slots.device) <= slots[..., None]  # (R, k, used)
    mask = torch.zeros(seen.shape, dtype=embeddings.dtype, device=seen.device)
    mask = mask.masked_fill(~seen, torch.finfo(mask.dtype).min)[:, None]
    # Flash attention takes no mask that differs from row to row; the loss in speed is small at these lengths.
    chosen = language_model.config._attn_implementation
    language_model.config._attn_implementation = "eager" if chosen == "eager" else "sdpa"
    try:
        # compile_model compiles for training; here lengths change from call to call, and each would be
        # compiled.
        with torch.compiler.set_stance("force_eager"):
            return language_model(
                inputs_embeds=embeddings,
                position_ids=positions,
                attention_mask={"full_attention": mask},
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
    finally:
        language_model.config._attn_implementation = chosen


class PromptCache:
    """The VLM behind a batch of prompts, as `decoding.Model`: Transformers' own modules on a KV cache whose
    rows have lengths of their own.

    Only `token_ids` rows of the LM head are computed: 12 instead of 151,936.

    Args:
        model: the VLM.
        inputs: of *right-padded* prompts, with `attention_mask`, and pictures.
        token_ids: of the grammar.
        room: tokens that will be fed behind the longest prompt at most.
        prefix: from `encode_prefix`, of tokens that all prompts begin with; they are not fed again.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        token_ids: list[int],
        room: int,
        prefix: list[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.vlm, self.language_model = model.model, model.model.language_model
        self.inputs = inputs
        self.head = model.lm_head.weight[token_ids]
        self.lengths = inputs["attention_mask"].sum(1)  # (R,) slots that hold for good
        self.skipped = prefix[0][0].shape[2] if prefix else 0
        self.cache = _RowCache(inputs["input_ids"].shape[1] + room, prefix)
        self.rows = list(range(len(self.lengths)))  # those in the cache; finished ones leave it

    def start(self, drafts: list[list[int]]) -> np.ndarray:
        ids, device = self.inputs["input_ids"], self.head.device
        rows, width = len(ids), max(int(n) + len(d) for n, d in zip(self.lengths, drafts, strict=True))
        tokens = ids.new_zeros(rows, max(width, ids.shape[1]))
        tokens[:, : ids.shape[1]] = ids
        positions, delta = self.vlm.get_rope_index(
            ids,
            mm_token_type_ids=self.inputs["mm_token_type_ids"],
            image_grid_thw=self.inputs["image_grid_thw"],
            attention_mask=self.inputs["attention_mask"],
        )
        # Multimodal RoPE: an image spans fewer positions than tokens, so text goes on at slot + delta (<= 0).
        self.delta = delta.view(rows, 1).to(device)
        slots = torch.arange(tokens.shape[1], device=device).expand(rows, -1)
        text_positions = (slots + self.delta).expand(3, -1, -1).clone()
        text_positions[:, :, : ids.shape[1]] = torch.where(
            self.inputs["attention_mask"].bool(), positions, text_positions[:, :, : ids.shape[1]]
        )
        for row, draft in enumerate(drafts):
            n = int(self.lengths[row])
            tokens[row, n : n + len(draft)] = torch.tensor(draft, dtype=tokens.dtype, device=device)
        embeddings = self.language_model.embed_tokens(tokens)
        pictures = self.vlm.get_image_features(self.inputs["pixel_values"], self.inputs["image_grid_thw"])
        is_picture = torch.zeros_like(tokens, dtype=torch.bool)
        is_picture[:, : ids.shape[1]] = self.inputs["mm_token_type_ids"].bool()
        embeddings[is_picture] = torch.cat(pictures.pooler_output).to(embeddings.dtype)
        new = slice(self.skipped, None)
        hidden = _attend(
            self.language_model, self.cache, embeddings[:, new], text_positions[..., new], slots[:, new]
        )
        places = (self.lengths[:, None] - 1 - self.skipped) + torch.arange(
            1 + max(map(len, drafts)), device=device
        )
        last = places.clamp(max=hidden.shape[1] - 1)[..., None].expand(-1, -1, hidden.shape[2])
        return self._logits(hidden.gather(1, last))

    def extend(self, kept: list[int], tokens: list[list[int]]) -> np.ndarray:
        device = self.head.device
        self.lengths = self.lengths + torch.tensor(kept, device=device)
        unfinished = [row for row in self.rows if tokens[row]]
        # Taking rows out of the cache copies it: worth it when it makes every further pass clearly smaller.
        if len(unfinished) <= 0.75 * len(self.rows):
            self.cache.take([self.rows.index(row) for row in unfinished])
            self.rows = unfinished
        width = max(map(len, tokens))
        ids = torch.tensor([tokens[r] + [0] * (width - len(tokens[r])) for r in self.rows], device=device)
        slots = self.lengths[self.rows, None] + torch.arange(width, device=device)
        # Time, height and width advance together in text.
        positions = (slots + self.delta[self.rows]).expand(3, -1, -1)
        embeddings = self.language_model.embed_tokens(ids)
        logits = self._logits(_attend(self.language_model, self.cache, embeddings, positions, slots))
        scattered = np.zeros((len(tokens), *logits.shape[1:]), dtype=logits.dtype)
        scattered[self.rows] = logits
        return scattered

    def _logits(self, hidden: Tensor) -> np.ndarray:
        return nn.functional.linear(hidden, self.head).float().cpu().numpy()


class _RowCache:
    """Keys and values in place: each row writes to slots of its own. Transformers' caches append the same
    number of tokens to every row; here rows accept drafts of different lengths, and rejected ones are simply
    overwritten."""

    def __init__(self, size: int, prefix: list[tuple[Tensor, Tensor]] | None) -> None:
        self.size, self.initial = size, prefix
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.slots: Tensor  # (R, k) where the next tokens go
        self.used = 0  # slots that attention has to look at

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple:
        """(R, heads, k, size) of the new tokens → of all slots in use."""
        rows, heads, _, size = keys.shape
        if layer == len(self.layers):
            pair = (
                keys.new_zeros(rows, heads, self.size, size),
                keys.new_zeros(rows, heads, self.size, size),
            )
            if self.initial is not None:
                for buffer, start in zip(pair, self.initial[layer], strict=True):
                    buffer[:, :, : start.shape[2]] = start
            self.layers.append(pair)
        batch = torch.arange(rows, device=keys.device)[:, None]
        for buffer, new in zip(self.layers[layer], (keys, values), strict=True):
            buffer[batch, :, self.slots] = new.transpose(1, 2)
        return tuple(buffer[:, :, : self.used] for buffer in self.layers[layer])

    def take(self, rows: list[int]) -> None:
        """Keeps these rows only."""
        self.layers = [(keys[rows], values[rows]) for keys, values in self.layers]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.used
