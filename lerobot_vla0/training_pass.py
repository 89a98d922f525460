"""The VLM's pass over a training batch. All prompts begin with the same words, the system prompt: these are
fed once for the whole batch instead of once per row.
"""

from lerobot.configs import PreTrainedConfig
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import DynamicCache

from .backbone import embed_prompts, has_decoding_session, language_model, prompt_positions


def can_share_words(model: nn.Module, config: PreTrainedConfig) -> bool:
    """Whether `hidden_states` can feed the first words once. Not where layers are recomputed in the backward
    pass (Transformers then drops the cache that carries the words), compiled (it would be another graph) or
    sharded (FSDP expects one pass through a layer), nor with flash attention, with which it was not tried."""
    text = language_model(model)
    return (
        has_decoding_session(model)
        and text.config._attn_implementation in ("sdpa", "eager")
        and not (config.gradient_checkpointing or config.compile_model)
        and not isinstance(text.layers[0], FSDPModule | FullyShardedDataParallel)
    )


def hidden_states(model: nn.Module, inputs: dict[str, Tensor], shared: int = 0) -> Tensor:
    """Last hidden states of right-padded examples (B, T): (B, T, hidden), or (B, T - shared, hidden) where
    the first `shared` tokens, words that are the same in all rows, were fed in one row only.

    All rows attend to the keys and values of that one. The hidden states and gradients are those of a pass
    with the words in every row.
    """
    if not shared or len(inputs["input_ids"]) == 1:
        return model.model(**inputs, use_cache=False).last_hidden_state
    text, ids, cache = language_model(model), inputs["input_ids"], DynamicCache()
    positions, _ = prompt_positions(model, inputs)  # (axes, B, T)
    if len(positions) == 1:
        positions = positions[0]
    text(ids[:1, :shared], position_ids=positions[..., :1, :shared], past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        layer.keys, layer.values = (kept.expand(len(ids), -1, -1, -1) for kept in (layer.keys, layer.values))
    embeddings, extra = embed_prompts(model, inputs, ids[:, shared:])
    return text(
        inputs_embeds=embeddings,
        position_ids=positions[..., shared:],
        attention_mask=inputs["attention_mask"],
        past_key_values=cache,
        use_cache=True,
        **extra,
    ).last_hidden_state
