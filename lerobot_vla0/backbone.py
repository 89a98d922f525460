"""The VLM: load it, build it empty, save what rebuilds it, run its parts. Knows nothing of actions. What
depends on the VLM's family is in families.py."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import PreTrainedConfig as PolicyConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedConfig,
)
from transformers.initialization import no_init_weights
from transformers.utils import cached_file, is_bitsandbytes_available, is_flash_attn_2_available

from .config_types import DTYPES
from .families import FAMILIES, family
from .files import check_kinds, read_json, reading, weight_files

# What `lerobot-vla0 export` puts before Qwen's chat template, since engines do not know the policy's setting.
VISION_ID_SET = {value: f"{{% set add_vision_id = {str(value).lower()} %}}" for value in (False, True)}


@contextmanager
def _readable(vlm: str | Path) -> Iterator[None]:
    """Around what Transformers reads of a VLM's files. Where one is damaged it raises anything, and its
    tokenizers `Exception` itself."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"vlm={str(vlm)!r}: no vision-language model could be read there ({reason}). Give a Hugging Face "
            "Hub id, or a folder with the model's config.json, weights and processor; code that a model "
            "brings along is not run."
        ) from error


def load_processor(vlm: str | Path, revision: str | None = None) -> Any:
    """The VLM's processor at a Hub id or folder; of an exported one without the add_vision_id that was set.

    Raises:
        ImportError: it needs a package that is not installed.
        ValueError: a file of it is missing or damaged.
    """
    with _readable(vlm):
        processor = AutoProcessor.from_pretrained(vlm, revision=revision, trust_remote_code=False)
    for part in (processor, getattr(processor, "tokenizer", processor)):
        for line in VISION_ID_SET.values():
            if isinstance(part.chat_template, str):
                part.chat_template = part.chat_template.removeprefix(line)
    return processor


def read_config(vlm: str | Path, revision: str | None = None) -> Any:
    """Config of the VLM at a Hub id or folder, checked to be of a supported family. It says whether the head
    is tied to the embeddings, whichever version of Transformers wrote it.

    Raises:
        ValueError: nothing there, or not a supported vision-language model.
    """
    if Path(vlm).is_dir():
        check_kinds(Path(vlm))
    with _readable(vlm):
        config = AutoConfig.from_pretrained(vlm, revision=revision, trust_remote_code=False)
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
    _settle_tying(config, vlm, revision)
    return config


def _settle_tying(config: Any, vlm: str | Path, revision: str | None) -> None:
    """Decides `tie_word_embeddings` where config.json does not say it at the top level, the only place in
    which Transformers 5 looks; version 4.57 wrote it in `text_config` only. Of the fields that both can hold
    it is the only one that a model reads there."""
    saved, _ = PreTrainedConfig.get_config_dict(vlm, revision=revision)
    if "tie_word_embeddings" in saved:
        return
    tied = config.tie_word_embeddings or bool((saved.get("text_config") or {}).get("tie_word_embeddings"))
    config.tie_word_embeddings = tied and not _stores_head(vlm, revision)
    config.get_text_config().tie_word_embeddings = config.tie_word_embeddings


def _stores_head(vlm: str | Path, revision: str | None) -> bool:
    """Whether the weights at a Hub id or folder, if there are any, hold a head of their own."""
    for name in ("model.safetensors.index.json", "model.safetensors"):
        file = cached_file(
            vlm,
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if file is None:
            continue
        try:
            if name.endswith(".json"):
                with reading(file):
                    tensors = read_json(file)["weight_map"].keys()
            else:
                with safe_open(file, framework="pt") as stored:
                    tensors = stored.keys()
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or damaged: copy it again ({error}).") from error
        return any(tensor.endswith("lm_head.weight") for tensor in tensors)
    return False


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
    if Path(vlm).is_dir():
        weight_files(Path(vlm))  # refuses names of files elsewhere
    settings: dict[str, Any] = {
        "dtype": DTYPES[dtype],
        "attn_implementation": _attention(attn_implementation),
    }
    if load_in_4bit:
        if not is_bitsandbytes_available():
            raise ImportError(
                'load_in_4bit=True needs bitsandbytes: pip install "lerobot_policy_vla0[qlora]". Or set '
                "load_in_4bit=false."
            )
        # QLoRA's settings (arXiv 2305.14314, section 3). Not quantised are the vision encoder, which gets no
        # adapter that could correct the rounding, and the head, whose own weights are read when acting.
        kept = [f"model.{name}" for name in FAMILIES[config.model_type].vision]
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[dtype],
            llm_int8_skip_modules=[*kept, "lm_head"],
        )
    model = AutoModelForImageTextToText.from_pretrained(
        vlm, config=config, revision=revision, trust_remote_code=False, **settings
    )
    return model, load_processor(vlm, revision)


def build_vlm(folder: Path, *, dtype: str, attn_implementation: str | None) -> tuple[nn.Module, Any]:
    """(model with *uninitialised* weights, processor) from the files that `save_vlm` wrote.

    Random initialisation of the 3B shape would take minutes, and the checkpoint's weights would overwrite it.
    """
    config, attention = read_config(folder), _attention(attn_implementation)
    with _readable(folder), no_init_weights():
        model = AutoModelForImageTextToText.from_config(
            config, dtype=DTYPES[dtype], attn_implementation=attention, trust_remote_code=False
        )
    model.tie_weights()
    return model.eval(), load_processor(folder)


def make_vlm(config: PolicyConfig, folder: Path | None) -> tuple[nn.Module | None, Any]:
    """(the VLM that a policy's config asks for, on its device, None with `server`; the VLM's processor).

    Args:
        folder: build the VLM, without weights, from what `save_vlm` wrote there; None loads `config.vlm`.

    Raises:
        ValueError: `load_in_4bit` with a folder, or `server` without one.
    """
    if config.server is not None:
        if folder is None:
            raise ValueError(
                f"server={config.server!r} is for acting with a trained checkpoint, which is the export that "
                "the server has: give it with --policy.path, or leave server out."
            )
        return None, load_processor(folder)
    load = {"dtype": config.dtype, "attn_implementation": config.attn_implementation}
    if folder is None:
        quantised = config.load_in_4bit
        model, processor = load_vlm(config.vlm, revision=config.vlm_revision, load_in_4bit=quantised, **load)
    elif config.load_in_4bit:
        raise ValueError(
            "load_in_4bit=True starts from a VLM, not from a VLA-0 checkpoint. Set load_in_4bit=false."
        )
    else:
        model, processor = build_vlm(folder, **load)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.freeze_vision:
        for module in vision_modules(model):
            module.requires_grad_(False)
    if config.compile_model:
        # Only the language model: the vision encoder reads sizes on the CPU, which breaks the graph.
        language_model(model).compile(dynamic=True)
    if not has_decoding_session(model):
        logging.warning(
            f"{model.config.model_type}: acting decodes row by row on Transformers' own cache, the same "
            "actions in more time than with the other VLMs (see --help of vlm)."
        )
    # Rotary embeddings are float32 buffers whatever the weights are: move the device, never the dtype.
    return model.to(config.device), processor


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


def language_model(model: nn.Module) -> nn.Module:
    """The decoder layers with their token embeddings, without the head."""
    return getattr(model.model, family(model).text)


def vision_modules(model: nn.Module) -> list[nn.Module]:
    """The vision encoder and what joins it to the language model."""
    return [getattr(model.model, name) for name in family(model).vision]


def block_name(model: nn.Module) -> str:
    """Class name of the language model's layers, the unit that FSDP shards."""
    return type(language_model(model).layers[0]).__name__


def has_decoding_session(model: nn.Module) -> bool:
    """Whether `DecodingSession` can decode with the model; `RowByRowSession` always can, more slowly."""
    layers = getattr(language_model(model).config, "layer_types", None) or ["full_attention"]
    return family(model).has_session and set(layers) == {"full_attention"}


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
    """Tokens (R, T) with all pictures of `inputs` → (embeddings (R, T, hidden) with the pictures in place,
    further inputs of the language model)."""
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
