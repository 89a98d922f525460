"""The VLM behind a batch of prompts, for decoding: Transformers' own modules on a key-value cache whose rows
have lengths of their own, or, for models that this cannot feed, on Transformers' own cache row by row. Knows
tokens and positions; nothing of what is written."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache

from .. import backbone
from .prepack import Prepacked

# A compiled pass has one of these widths (tokens per row), so that a handful of graphs serve all drafts.
WIDTHS = (1, 8, 16, 32, 64)
# Compiled passes see the whole cache; its size is a multiple of this, so that prompts share graphs.
BLOCK = 128
# Widths, sizes of the cache and numbers of rows that are compiled for. PyTorch's own limit of 8 would be
# reached soon, and what comes then is not compiled.
GRAPHS = 64
# What Transformers calls the attention of passes. It takes any mask; flash attention takes none that differs
# from row to row.
ATTENTION = "vla0_rows"


class RowCache:
    """Keys and values in place: each row writes to slots of its own. Transformers' caches append the same
    number of tokens to every row; here rows accept drafts of different lengths, and rejected ones are simply
    overwritten."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.rows = self.size = 0
        self.owners: Tensor  # of the next tokens, as `slots`: whose they are
        self.slots: Tensor  # (R, k), or (1, T) of rows with different numbers of tokens: where they go
        self.used = 0  # slots that attention has to look at
        self.user: object = None

    @torch.inference_mode()  # as the decoder, which made the buffers
    def begin(self, rows: int, size: int, prefix: list[tuple[Tensor, Tensor]] | None) -> None:
        """Empties the cache and gives each row `size` slots, of which `prefix` fills the first. Buffers of
        the right size are kept: compiled graphs count on their addresses."""
        if (rows, size) != (self.rows, self.size):
            self.layers, self.rows, self.size = [], rows, size
        self.prefix = prefix
        for layer, pair in enumerate(self.layers):
            self._fill(pair, layer)

    def _fill(self, pair: tuple[Tensor, Tensor], layer: int) -> None:
        if self.prefix is not None:
            for buffer, start in zip(pair, self.prefix[layer], strict=True):
                buffer[:, :, : start.shape[2]] = start

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple:
        """(R, heads, k, size) or (1, heads, T, size) of the new tokens → (R, heads, used, size) of all."""
        if layer == len(self.layers):
            shape = self.rows, keys.shape[1], self.size, keys.shape[3]
            pair = keys.new_zeros(shape), keys.new_zeros(shape)
            self._fill(pair, layer)
            self.layers.append(pair)
        for buffer, new in zip(self.layers[layer], (keys, values), strict=True):
            buffer[self.owners, :, self.slots] = new.transpose(1, 2)
        return tuple(buffer[:, :, : self.used] for buffer in self.layers[layer])

    def take(self, rows: list[int]) -> None:
        """Keeps these rows only."""
        self.layers = [(keys[rows], values[rows]) for keys, values in self.layers]
        self.rows = len(rows)

    def get_seq_length(self, layer: int = 0) -> int:
        return self.used


def encode_prefix(model: nn.Module, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values, (1, heads, P, size) per layer, of text tokens (1, P) at the start of prompts."""
    cache = RowCache()
    cache.begin(1, ids.shape[1], None)
    slots = torch.arange(ids.shape[1], device=ids.device)[None]
    embeddings = model.get_input_embeddings()(ids)
    axes = 3 if hasattr(model.model, "get_rope_index") else 1
    language_model = backbone.language_model(model)
    _attend(language_model, cache, embeddings, slots.expand(axes, -1, -1), slots, ids.shape[1])
    return cache.layers


class Packed(NamedTuple):
    """T tokens of R rows, as many of each as it has: linear layers, most of the work, see no padding."""

    owners: Tensor  # (T,) in 0..R-1
    columns: Tensor  # (T,) which of the row's
    grid: Tensor  # (R, k) the token of each row and column; any where there is none


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
    """For Transformers' modules: queries (R, heads, k, size) or packed (1, heads, T, size), keys and values
    (R, groups, used, size), mask (R, 1, heads of a group × k, used) → (R, k, heads, size) or (1, T, heads,
    size).

    Heads of a group count as further queries of one head. Transformers repeats the keys for each head; with
    the few queries of a pass, fetching them is what takes the time (on a CPU, 16 rows of one token: 9 times).
    """
    if packed is not None:
        queries = queries[0][:, packed.grid].transpose(0, 1)
    rows, heads, k, size = queries.shape
    queries = queries.reshape(rows, keys.shape[1], -1, size)
    out = nn.functional.scaled_dot_product_attention(queries, keys, values, mask, scale=scaling)
    out = out.reshape(rows, heads, k, size)
    return (out.transpose(1, 2) if packed is None else out[packed.owners, :, packed.columns][None]), None


AttentionInterface.register(ATTENTION, _attention)


def _attend(
    language_model: nn.Module,
    cache: RowCache,
    embeddings: Tensor,
    positions: Tensor,
    slots: Tensor,
    used: int,
    packed: Packed | None = None,
    **extra: Any,
) -> Tensor:
    """Feeds embeddings (R, k, hidden) at `slots` (R, k), all below `used`, with positions (axes, R, k) → last
    hidden states. Packed, (1, T) stands for (R, k)."""
    cache.slots, cache.used = slots, used
    cache.owners = torch.arange(len(slots), device=slots.device)[:, None]
    if packed is not None:
        cache.owners, slots = packed.owners[None], slots[0][packed.grid]
    # Every token sees the slots up to its own: what lies beyond a row's length is its own draft, or stale.
    seen = torch.arange(used, device=slots.device) <= slots[..., None]  # (R, k, used)
    mask = torch.zeros(seen.shape, dtype=embeddings.dtype, device=seen.device)
    mask = mask.masked_fill(~seen, torch.finfo(mask.dtype).min)[:, None]
    config = language_model.config
    mask = mask.expand(-1, config.num_attention_heads // config.num_key_value_heads, -1, -1)
    chosen, config._attn_implementation = config._attn_implementation, ATTENTION
    try:
        return language_model(
            inputs_embeds=embeddings,
            position_ids=positions if len(positions) == 3 else positions[0],
            attention_mask=mask.flatten(1, 2)[:, None],
            past_key_values=cache,
            use_cache=True,
            packed=packed,
            **extra,
        ).last_hidden_state
    finally:
        config._attn_implementation = chosen


def _step(
    language_model: nn.Module,
    head: Tensor,
    cache: RowCache,
    ids: Tensor,
    positions: Tensor,
    slots: Tensor,
    packed: Packed,
    used: int,
) -> Tensor:
    """Feeds packed tokens (1, T) → logits (T, 12)."""
    embeddings = language_model.embed_tokens(ids)
    hidden = _attend(language_model, cache, embeddings, positions, slots, used, packed)
    return nn.functional.linear(hidden[0], head)


@cache
def _compiled_step(device: str) -> Callable[..., Tensor]:
    # On a GPU as CUDA graphs: launching a thousand small kernels takes longer than they do.
    return torch.compile(_step, dynamic=False, mode="reduce-overhead" if device == "cuda" else None)


class PromptCache:
    """A batch of prompts as `decoding.Model`.

    Only `token_ids` rows of the LM head are computed: 12 instead of 151,936.

    Args:
        model: the VLM.
        inputs: of *right-padded* prompts, with `attention_mask`, and pictures.
        token_ids: of the grammar.
        room: tokens that will be fed behind the longest prompt at most.
        prefix: from `encode_prefix`, of tokens that all prompts begin with; they are not fed again.
        buffers: to use again; None makes new ones.
        compiled: torch.compile the passes behind the prompt, in which all rows then stay to the end.
        prepacked: of the language model, for passes that are not compiled.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        token_ids: list[int],
        room: int,
        prefix: list[tuple[Tensor, Tensor]] | None = None,
        buffers: RowCache | None = None,
        compiled: bool = False,
        prepacked: Prepacked | None = None,
    ) -> None:
        self.model, self.language_model = model, backbone.language_model(model)
        self.inputs, self.compiled, self.prepacked = inputs, compiled, prepacked
        self.head = model.lm_head.weight[token_ids]
        self.lengths = inputs["attention_mask"].sum(1)  # (R,) slots that hold for good
        self.skipped = prefix[0][0].shape[2] if prefix else 0
        self.rows = list(range(len(self.lengths)))  # those in the cache; finished ones leave it
        self.cache = RowCache() if buffers is None else buffers
        self.cache.user = self
        size = inputs["input_ids"].shape[1] + room
        self.cache.begin(len(self.rows), -(-size // BLOCK) * BLOCK if compiled else size, prefix)

    def start(self, drafts: list[list[int]]) -> np.ndarray:
        ids, device = self.inputs["input_ids"], self.head.device
        rows, width = len(ids), max(int(n) + len(d) for n, d in zip(self.lengths, drafts, strict=True))
        tokens = ids.new_zeros(rows, max(width, ids.shape[1]))
        tokens[:, : ids.shape[1]] = ids
        positions, self.delta = backbone.prompt_positions(self.model, self.inputs)
        slots = torch.arange(tokens.shape[1], device=device).expand(rows, -1)
        text_positions = (slots + self.delta).expand(len(positions), -1, -1).clone()
        text_positions[:, :, : ids.shape[1]] = torch.where(
            self.inputs["attention_mask"].bool(), positions, text_positions[:, :, : ids.shape[1]]
        )
        self.axes = len(positions)
        for row, draft in enumerate(drafts):
            n = int(self.lengths[row])
            tokens[row, n : n + len(draft)] = torch.tensor(draft, dtype=tokens.dtype, device=device)
        embeddings, extra = backbone.embed_prompts(self.model, self.inputs, tokens)
        new = slice(self.skipped, None)
        with self._eagerly():
            hidden = _attend(
                self.language_model,
                self.cache,
                embeddings[:, new],
                text_positions[..., new],
                slots[:, new],
                slots.shape[1],
                **{
                    key: value[:, new] if isinstance(value, Tensor) else value for key, value in extra.items()
                },
            )
        if self.compiled:
            for buffer in sum(self.cache.layers, ()):
                torch._dynamo.mark_static_address(buffer)  # CUDA graphs write to it in place
        places = (self.lengths[:, None] - 1 - self.skipped) + torch.arange(
            1 + max(map(len, drafts)), device=device
        )
        last = places.clamp(max=hidden.shape[1] - 1)[..., None].expand(-1, -1, hidden.shape[2])
        return _numpy(nn.functional.linear(hidden.gather(1, last), self.head))

    @contextmanager
    def _eagerly(self) -> Iterator[None]:
        # compile_model compiles for training, too; here lengths change from call to call, and each would be
        # compiled.
        with (
            torch.compiler.set_stance("force_eager"),
            nullcontext() if self.prepacked is None else self.prepacked.use(),
        ):
            yield

    def extend(self, kept: list[int], tokens: list[list[int]]) -> np.ndarray:
        if self.cache.user is not self:
            raise RuntimeError(
                "another chunk was begun before this one was finished, and with compile_model=True both use "
                "one cache. Finish or drop a stream before the next call, or set compile_model=False."
            )
        device = self.head.device
        self.lengths = self.lengths + torch.tensor(kept, device=device)
        unfinished = [row for row in self.rows if tokens[row]]
        # Taking rows out of the cache copies it: worth it when it makes every further pass clearly smaller.
        if len(unfinished) <= 0.75 * len(self.rows) and not self.compiled:
            self.cache.take([self.rows.index(row) for row in unfinished])
            self.rows = unfinished
        fed = [tokens[row] for row in self.rows]
        width = max(map(len, fed))
        if self.compiled:
            width = next(w for w in WIDTHS if w >= width)
            fed = [row + [0] * (width - len(row)) for row in fed]
        counts = torch.tensor([len(row) for row in fed])
        filled = torch.arange(width) < counts[:, None]
        owners, columns = (index.to(device) for index in filled.nonzero(as_tuple=True))
        grid = (filled.flatten().cumsum(0) - 1).clamp(min=0).view_as(filled).to(device)
        ids = torch.tensor([[token for row in fed for token in row]], device=device)
        rows = torch.tensor(self.rows, device=device)[owners]
        slots = (self.lengths[rows] + columns)[None]
        # Time, height and width advance together in text.
        positions = (slots + self.delta[rows, 0]).expand(self.axes, -1, -1)
        packed = Packed(owners, columns, grid)
        feed = self.language_model, self.head, self.cache, ids, positions, slots, packed
        if self.compiled:
            with torch._dynamo.config.patch(recompile_limit=GRAPHS):
                logits = _numpy(_compiled_step(device.type)(*feed, self.cache.size))
        else:
            with self._eagerly():
                logits = _numpy(_step(*feed, int(slots.max()) + 1))
        result = np.zeros((len(tokens), width, logits.shape[-1]), dtype=logits.dtype)
        result[rows.cpu().numpy(), columns.cpu().numpy()] = logits
        return result


class RowByRow:
    """A batch of prompts as `decoding.Model`, for a VLM with masks of its own: its whole forward on
    Transformers' cache, one row after the other. Same logits as `PromptCache`, in more time.

    Args:
        model: the VLM.
        inputs: of *right-padded* prompts, with `attention_mask`, and pictures.
        token_ids: of the grammar.
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor], token_ids: list[int]) -> None:
        self.model, self.inputs = model, inputs
        self.head = model.lm_head.weight[token_ids]
        self.lengths = inputs["attention_mask"].sum(1).tolist()
        # Without a config every layer keeps all of its keys, so that rejected drafts can be cut off.
        self.caches = [DynamicCache() for _ in self.lengths]

    def start(self, drafts: list[list[int]]) -> np.ndarray:
        # Every row has the same number of pictures, so each tensor splits evenly.
        rows = [
            {key: value.chunk(len(drafts))[row] for key, value in self.inputs.items()}
            for row in range(len(drafts))
        ]
        for inputs, length in zip(rows, self.lengths, strict=True):
            for key in ("input_ids", "token_type_ids"):
                inputs[key] = inputs[key][:, :length]
        return self._feed(rows, drafts, keep=1)

    def extend(self, kept: list[int], tokens: list[list[int]]) -> np.ndarray:
        for row, keys in enumerate(self.caches):
            self.lengths[row] += kept[row]
            keys.crop(self.lengths[row])
        empty = self.inputs["input_ids"][:1, :0]
        rows = [{"input_ids": empty, "token_type_ids": empty} for _ in tokens]
        return self._feed(rows, tokens, keep=0)

    def _feed(self, rows: list[dict[str, Tensor]], tokens: list[list[int]], keep: int) -> np.ndarray:
        """Feeds each row's inputs and the tokens behind them → logits after the tokens, and after the `keep`
        last inputs."""
        width = keep + max(map(len, tokens))
        logits = np.zeros((len(tokens), width, len(self.head)), dtype=np.float32)
        for row, (inputs, new) in enumerate(zip(rows, tokens, strict=True)):
            if not keep + len(new):
                continue
            more = torch.tensor([new], dtype=torch.int64, device=self.head.device)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
            inputs["token_type_ids"] = torch.cat([inputs["token_type_ids"], torch.zeros_like(more)], 1)
            inputs["attention_mask"] = torch.ones(
                1, self.caches[row].get_seq_length() + inputs["input_ids"].shape[1], device=more.device
            )
            hidden = self.model.model(**inputs, past_key_values=self.caches[row], use_cache=True)
            last = hidden.last_hidden_state[0, -(keep + len(new)) :]
            logits[row, : len(last)] = _numpy(nn.functional.linear(last, self.head))
        return logits


def _numpy(logits: Tensor) -> np.ndarray:
    return logits.float().cpu().numpy()
