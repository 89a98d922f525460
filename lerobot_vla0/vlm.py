"""The VLM: load it, build it empty, save what rebuilds it, run its parts. Knows nothing of actions. What
depends on the VLM's family is in families.py."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.utils import cached_file, is_flash_attn_2_available

from .configuration_vla0 import DTYPES, VLA0Config
from .families import FAMILIES, family
from .files import read_json, reading, weight_files

# What `lerobot-vla0 export` puts before Qwen's chat template, since engines do not know the policy's setting.
VISION_ID_SET = {value: f"{{% set add_vision_id = {str(value).lower()} %}}" for value in (False, True)}


def load_processor(vlm: str | Path, revision: str | None = None) -> Any:
    """The VLM's processor at a Hub id or folder; of an exported one, without the add_vision_id set there."""
    processor = AutoProcessor.from_pretrained(vlm, revision=revision, trust_remote_code=False)
    for part in (processor, getattr(processor, "tokenizer", processor)):
        for line in VISION_ID_SET.values():
            if isinstance(part.chat_template, str):
                part.chat_template = part.chat_template.removeprefix(line)
    return processor


def read_config(vlm: str | Path, revision: str | None = None) -> Any:
    """Config of the VLM at a Hub id or folder, checked to be of a supported family. It says whether the head
    is tied to the embeddings, whichever version of Transformers wrote it."""
    config = AutoConfig.from_pretrained(vlm, revision=revision, trust_remote_code=False)
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"vlm={str(vlm)!r} is a {config.model_type!r} model. Supported are vision-language models of "
            f"type {', '.join(FAMILIES)}, for example Qwen/Qwen2.5-VL-3B-Instruct."
        )
    text = config.get_text_config()
    # The loss and the decoder compute logits as `hidden @ lm_head.weight`.
    if getattr(text, "final_logit_softcapping", None):
        raise ValueError(f"vlm={str(vlm)!r} with final_logit_softcapping is not supported.")
    # Transformers 5 reads tie_word_embeddings at the top level; version 4.57 wrote it in text_config only.
    saved, _ = PreTrainedConfig.get_config_dict(vlm, revision=revision)
    if "tie_word_embeddings" not in saved:
        tied = config.tie_word_embeddings or (saved.get("text_config") or {}).get("tie_word_embeddings")
        config.tie_word_embeddings = text.tie_word_embeddings = bool(tied) and not _stores_head(vlm, revision)
    return config


def _stores_head(vlm: str | Path, revision: str | None) -> bool:
    """Whether the weights at a Hub id or folder, if there are any, hold a head of their own."""
    errors = ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors")
    find, tensors = partial(cached_file, vlm, revision=revision, **dict.fromkeys(errors, False)), []
    if index := find("model.safetensors.index.json"):
        with reading(index):
            tensors = list(read_json(index)["weight_map"])
    elif weights := find("model.safetensors"):
        with reading(weights), safe_open(weights, framework="pt") as stored:
            tensors = list(stored.keys())
    return any(name.endswith("lm_head.weight") for name in tensors)


def _settings(dtype: str, attn_implementation: str | None) -> dict[str, Any]:
    if attn_implementation == "flash_attention_2" and not is_flash_attn_2_available():
        logging.warning("flash_attention_2 needs the package flash-attn and a GPU: using sdpa.")
        attn_implementation = "sdpa"  # the same result, slower
    return {"dtype": DTYPES[dtype], "attn_implementation": attn_implementation}


def load_vlm(
    vlm: str | Path, *, revision: str | None, dtype: str, attn_implementation: str | None
) -> tuple[nn.Module, Any]:
    """(model with pretrained weights, processor) from a Hub id or folder."""
    if Path(vlm).is_dir():
        weight_files(Path(vlm))  # refuses names of files elsewhere
    config, settings = read_config(vlm, revision), _settings(dtype, attn_implementation)
    model = AutoModelForImageTextToText.from_pretrained(
        vlm, config=config, revision=revision, trust_remote_code=False, **settings
    )
    return model, load_processor(vlm, revision)


def build_vlm(folder: Path, *, dtype: str, attn_implementation: str | None) -> tuple[nn.Module, Any]:
    """(model with *uninitialised* weights, processor) from the files that `save_vlm` wrote. Random
    initialisation of the 3B shape would take minutes, and the checkpoint's weights would overwrite it."""
    config, settings = read_config(folder), _settings(dtype, attn_implementation)
    with no_init_weights():
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False, **settings)
    model.tie_weights()
    return model.eval(), load_processor(folder)


def make_vlm(config: VLA0Config, folder: Path | None) -> tuple[nn.Module | None, Any]:
    """(the VLM that a policy's config asks for, on its device, None with `server`; the VLM's processor).

    Args:
        folder: build the VLM, without weights, from what `save_vlm` wrote there; None loads `config.vlm`.
    """
    settings = {"dtype": config.dtype, "attn_implementation": config.attn_implementation}
    if config.server is not None and folder is None:
        raise ValueError(f"server={config.server!r} needs a trained checkpoint: --policy.path=<checkpoint>")
    if config.server is not None:
        return None, load_processor(folder)
    if folder is None:
        model, processor = load_vlm(config.vlm, revision=config.vlm_revision, **settings)
    else:
        model, processor = build_vlm(folder, **settings)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.freeze_vision:
        for module in vision_modules(model):
            module.requires_grad_(False)
    if config.compile_model:
        # Only the language model: the vision encoder reads sizes on the CPU, which breaks the graph.
        language_model(model).compile(dynamic=True)
    if not has_decoding_session(model):
        logging.warning(f"{model.config.model_type}: acting decodes row by row, which takes more time.")
    # Rotary embeddings are float32 buffers whatever the weights are: move the device, never the dtype.
    return model.to(config.device), processor


def save_vlm(model: nn.Module, processor: Any, folder: Path) -> None:
    """Writes the VLM's config, tokenizer and image processor, everything but the weights, as JSON."""
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    # Transformers writes chat_template.jinja, which LeRobot's push to the Hub leaves out.
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    template = {"chat_template": processor.chat_template}
    (folder / "chat_template.json").write_text(json.dumps(template, indent=2))


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
    """(positions of right-padded prompts, (axes, R, T); what to add to the index of a token behind them, (R,
    1)). Three axes for multimodal RoPE, where an image spans fewer positions than tokens; otherwise one."""
    ids = inputs["input_ids"]
    if not hasattr(model.model, "get_rope_index"):
        positions = torch.arange(ids.shape[1], device=ids.device).expand(1, *ids.shape)
        return positions, ids.new_zeros(len(ids), 1)
    names = ("mm_token_type_ids", "image_grid_thw", "attention_mask")
    positions, delta = model.model.get_rope_index(ids, **{name: inputs[name] for name in names})
    return positions, delta.view(len(ids), 1).to(ids.device)


def embed_prompts(model: nn.Module, inputs: dict[str, Tensor], tokens: Tensor) -> tuple[Tensor, dict]:
    """Tokens (R, T) with all pictures of `inputs` → (embeddings (R, T, hidden) with the pictures in them,
    further inputs of the language model)."""
    embeddings = language_model(model).get_input_embeddings()(tokens)
    is_picture = tokens == model.config.image_token_id
    grid = {"image_grid_thw": inputs["image_grid_thw"]} if "image_grid_thw" in inputs else {}
    output = model.model.get_image_features(inputs["pixel_values"], **grid)
    features = output.pooler_output
    if isinstance(features, tuple | list):  # one tensor for each picture
        features = torch.cat(features)
    embeddings[is_picture] = features.reshape(-1, features.shape[-1]).to(embeddings.dtype)
    # Qwen3-VL adds features of earlier vision layers behind the first layers of the language model.
    deep = getattr(output, "deepstack_features", None)
    extra = {"visual_pos_masks": is_picture, "deepstack_visual_embeds": deep} if deep else {}
    return embeddings, extra


def can_share_words(model: nn.Module, config: VLA0Config) -> bool:
    """Whether `hidden_states` can feed the system prompt once. Not where layers are recomputed in the
    backward pass (Transformers then drops the cache), compiled or sharded, nor with flash attention
    (untested)."""
    text = language_model(model)
    return (
        has_decoding_session(model)
        and text.config._attn_implementation in ("sdpa", "eager")
        and not (config.gradient_checkpointing or config.compile_model)
        and not isinstance(text.layers[0], FSDPModule | FullyShardedDataParallel)
    )


def hidden_states(model: nn.Module, inputs: dict[str, Tensor], shared: int = 0) -> Tensor:
    """Last hidden states of right-padded examples (B, T): (B, T, hidden), or (B, T - shared, hidden) where
    the first `shared` tokens, equal in all rows, were fed in one row, to whose keys and values all attend.
    Same hidden states and gradients."""
    ids, text, cache = inputs["input_ids"], language_model(model), DynamicCache()
    if not shared or len(ids) == 1:
        return model.model(**inputs, use_cache=False).last_hidden_state
    positions, _ = prompt_positions(model, inputs)  # (axes, B, T)
    positions = positions[0] if len(positions) == 1 else positions
    text(ids[:1, :shared], position_ids=positions[..., :1, :shared], past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        layer.keys, layer.values = (t.expand(len(ids), -1, -1, -1) for t in (layer.keys, layer.values))
    embeddings, extra = embed_prompts(model, inputs, ids[:, shared:])
    return text(
        inputs_embeds=embeddings,
        position_ids=positions[..., shared:],
        attention_mask=inputs["attention_mask"],
        past_key_values=cache,
        use_cache=True,
        **extra,
    ).last_hidden_state


def can_prepack(model: nn.Module) -> bool:
    """Whether the model computes in bfloat16 on a CPU with bfloat16 instructions."""
    weight, mkldnn = next(model.parameters()), torch.ops.mkldnn
    bfloat16_on_cpu = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    if not bfloat16_on_cpu or not torch.backends.mkldnn.is_available():
        return False
    # Not tested on ARM, where PyTorch uses the Arm Compute Library (ACL) instead of oneDNN's own kernels.
    return mkldnn._is_mkldnn_bf16_supported() and not mkldnn._is_mkldnn_acl_supported()


def prepack(module: nn.Module) -> int:
    """Makes the linear layers of a module compute with copies of their weights in oneDNN's own layout, with
    bit-identical results, without gradients. The weights must not change afterwards; the copies need as much
    memory. Returns how many layers it has converted."""
    linears = [m for m in module.modules() if type(m) is nn.Linear]
    for linear in linears:
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        linear.forward = partial(_linear, packed, linear.bias)
    return len(linears)


def _linear(packed: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], "")
