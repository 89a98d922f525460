"""Keys and values of a batch of sequences whose lengths differ, and the attention that reads them.

Transformers' caches append the same number of tokens to every row. In speculative decoding each row accepts a
draft of its own length, so here every token is written to a slot of its row, and a rejected draft is
overwritten by the tokens that follow.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

# Name under which Transformers finds `_attention`. Flash attention cannot be used instead: it takes no mask
# that differs from row to row.
ATTENTION = "vla0_rows"


class KVCache:
    """Keys and values of R rows, `size` slots each; passed to Transformers' language models as
    `past_key_values`."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []  # keys, values: (R, heads, size, head dim)
        self.rows = self.size = 0
        # Row and slot of each token that is written next, (R, k), or (1, T) if packed.
        self.owners: Tensor
        self.slots: Tensor
        self.used = 0  # number of leading slots that attention reads
        self.graphs: dict[Any, Any] = {}  # CUDA graphs that use `layers`, see `replay`

    @torch.inference_mode()  # the decoder runs in inference mode, and its tensors can only be changed in it
    def begin(self, rows: int, size: int, prefix: list[tuple[Tensor, Tensor]] | None) -> None:
        """Empties the cache for `rows` rows of `size` slots and writes `prefix` to the first slots of each.

        Tensors of the right size are used again, since CUDA graphs rely on their addresses. They are set to
        0: attention multiplies masked values by 0, and a NaN of the last chunk would stay one.
        """
        if (rows, size) != (self.rows, self.size):
            self.layers, self.rows, self.size, self.graphs = [], rows, size, {}
        self.prefix = prefix
        for layer, pair in enumerate(self.layers):
            for buffer in pair:
                buffer.zero_()
            self._write_prefix(pair, layer)

    def _write_prefix(self, pair: tuple[Tensor, Tensor], layer: int) -> None:
        if self.prefix is not None:
            for buffer, start in zip(pair, self.prefix[layer], strict=True):
                buffer[:, :, : start.shape[2]] = start

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple:
        """Writes the new tokens' keys and values, (R, heads, k, head dim) or packed (1, heads, T, head dim),
        and returns those of all used slots, (R, heads, used, head dim). Called by Transformers' attention
        layers."""
        if layer == len(self.layers):
            shape = self.rows, keys.shape[1], self.size, keys.shape[3]
            pair = keys.new_zeros(shape), keys.new_zeros(shape)
            self._write_prefix(pair, layer)
            self.layers.append(pair)
        for buffer, new in zip(self.layers[layer], (keys, values), strict=True):
            buffer[self.owners, :, self.slots] = new.transpose(1, 2)
        return tuple(buffer[:, :, : self.used] for buffer in self.layers[layer])

    def select(self, rows: list[int]) -> None:
        """Drops all other rows."""
        self.layers = [(keys[rows], values[rows]) for keys, values in self.layers]
        self.rows = len(rows)

    def get_seq_length(self, layer: int = 0) -> int:
        return self.used


class Packed(NamedTuple):
    """T tokens of R rows in one sequence, without padding, so that linear layers compute no padding."""

    owners: Tensor  # (T,) row of each token, in 0..R-1
    columns: Tensor  # (T,) its index among the row's tokens
    grid: Tensor  # (R, k) index in 0..T-1 of the token in each row and column; arbitrary where there is none


def _attention(
    module: nn.Module,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scaling: float,
    packed: Packed | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """A function of Transformers' AttentionInterface. `mask` is additive, (R, 1, heads per key-value head ×
    k, used); the other shapes are Transformers', or if packed (1, heads, T, head dim) → (1, T, heads, head
    dim).

    With grouped-query attention, Transformers repeats the keys for every head of a group. Here the queries of
    a group's heads are further queries of one head, so that keys are read once: with few new tokens, reading
    them takes most of the time (on a CPU with 16 rows of one token, 9 times less).
    """
    if packed is not None:
        queries = queries[0][:, packed.grid].transpose(0, 1)
    rows, heads, k, size = queries.shape
    queries = queries.reshape(rows, keys.shape[1], -1, size)
    out = nn.functional.scaled_dot_product_attention(queries, keys, values, mask, scale=scaling)
    out = out.reshape(rows, heads, k, size)
    return (out.transpose(1, 2) if packed is None else out[packed.owners, :, packed.columns][None]), None


AttentionInterface.register(ATTENTION, _attention)


def forward_with_cache(
    language_model: nn.Module,
    cache: KVCache,
    embeddings: Tensor,
    positions: Tensor,
    slots: Tensor,
    used: int,
    packed: Packed | None = None,
    **extra: Any,
) -> Tensor:
    """Runs the language model on new tokens and writes their keys and values to the cache.

    Args:
        language_model: of a `session.acting_model`, whose attention is ATTENTION.
        embeddings: (R, k, hidden), or packed (1, T, hidden).
        positions: (axes, R, k) of rotary embeddings; axes is 3 for multimodal RoPE, else 1.
        slots: (R, k) where the tokens are written; a token attends to the slots up to its own.
        used: number of slots in use, above every entry of `slots`.
        extra: further inputs of the language model.

    Returns:
        Last hidden states, of the shape of `embeddings`.
    """
    cache.slots, cache.used = slots, used
    cache.owners = torch.arange(len(slots), device=slots.device)[:, None]
    if packed is not None:
        cache.owners, slots = packed.owners[None], slots[0][packed.grid]
    # Slots after a token's own hold later tokens of the same draft, or rejected ones: they are masked.
    visible = torch.arange(used, device=slots.device) <= slots[..., None]  # (R, k, used)
    mask = torch.zeros(visible.shape, dtype=embeddings.dtype, device=visible.device)
    mask = mask.masked_fill(~visible, torch.finfo(mask.dtype).min)[:, None]
    config = language_model.config
    mask = mask.expand(-1, config.num_attention_heads // config.num_key_value_heads, -1, -1)
    return language_model(
        inputs_embeds=embeddings,
        position_ids=positions if len(positions) == 3 else positions[0],
        attention_mask=mask.flatten(1, 2)[:, None],
        past_key_values=cache,
        use_cache=True,
        packed=packed,
        **extra,
    ).last_hidden_state


def replay(step: Callable[..., Tensor], cache: KVCache, inputs: tuple[Tensor, ...]) -> Tensor:
    """`step(*inputs)` as a CUDA graph, recorded at the first call with tensors of these shapes.

    Args:
        step: reads and writes no other tensors than `inputs`, the cache's, and weights. None of these may
            move in memory while the cache is in use, and nothing may depend on values that only the CPU has.
        cache: holds the graphs, as long as its own tensors.
        inputs: on a GPU.

    Returns:
        A tensor that the next call overwrites.
    """
    shapes = tuple(tensor.shape for tensor in inputs)
    if shapes not in cache.graphs:
        cache.graphs[shapes] = _record(step, tuple(tensor.clone() for tensor in inputs), cache.graphs)
    graph, recorded_inputs, output = cache.graphs[shapes]
    for recorded, tensor in zip(recorded_inputs, inputs, strict=True):
        recorded.copy_(tensor)
    graph.replay()
    return output


def _record(step: Callable[..., Tensor], inputs: tuple[Tensor, ...], graphs: dict[Any, Any]) -> tuple:
    """(graph, its inputs, its output). All graphs of a cache run one after the other in one pool of
    memory."""
    # As PyTorch asks for (Semantics of CUDA Graphs): first without recording, on a stream of its own.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # libraries allocate their workspaces
            step(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    pool = next((graph.pool() for graph, *_ in graphs.values()), None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = step(*inputs)
    return graph, inputs, output
