"""The VLM behind a batch of prompts, for decoding: Transformers' own modules on a key-value cache whose rows
have lengths of their own, or, for models that this cannot feed, on Transformers' own cache row by row. Knows
tokens and positions; nothing of what is written."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from . import backbone

# A compiled pass has one of these widths (tokens per row), so that a handful of graphs serve all drafts.
WIDTHS = (1, 8, 16, 32, 64)
# Compiled passes see the whole cache; its size is a multiple of this, so that prompts share graphs.
BLOCK = 128


class RowCache:
    """Keys and values in place: each row writes to slots of its own. Transformers' caches append the same
    number of tokens to every row; here rows accept drafts of different lengths, and rejected ones are simply
    overwritten."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.rows = self.size = 0
        self.slots: Tensor  # (R, k) where the next tokens go
        self.used = 0  # slots that attention has to look at
        self.user: object = None

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
        """(R, heads, k, size) of the new tokens → of all slots in use."""
        rows, heads, _, size = keys.shape
        if layer == len(self.layers):
            shape = rows, heads, self.size, size
            pair = keys.new_zeros(shape), keys.new_zeros(shape)
            self._fill(pair, layer)
            self.layers.append(pair)
        batch = torch.arange(rows, device=keys.device)[:, None]
        for buffer, new in zip(self.layers[layer], (keys, values), strict=True):
            buffer[batch, :, self.slots] = new.transpose(1, 2)
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


def _attend(
    language_model: nn.Module,
    cache: RowCache,
    embeddings: Tensor,
    positions: Tensor,
    slots: Tensor,
    used: int,
    **extra: Any,
) -> Tensor:
    """Feeds embeddings (R, k, hidden) at `slots` (R, k), all below `used`, with positions (axes, R, k) → last
    hidden states."""
    cache.slots, cache.used = slots, used
    # Every token sees the slots up to its own: what lies beyond a row's length is its own draft, or stale.
    seen = torch.arange(used, device=slots.device) <= slots[..., None]  # (R, k, used)
    mask = torch.zeros(seen.shape, dtype=embeddings.dtype, device=seen.device)
    mask = mask.masked_fill(~seen, torch.finfo(mask.dtype).min)[:, None]
    # Flash attention takes no mask that differs from row to row; the loss in speed is small at these lengths.
    chosen = language_model.config._attn_implementation
    language_model.config._attn_implementation = "eager" if chosen == "eager" else "sdpa"
    try:
        return language_model(
            inputs_embeds=embeddings,
            position_ids=positions if len(positions) == 3 else positions[0],
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **extra,
        ).last_hidden_state
    finally:
        language_model.config._attn_implementation = chosen


def _step(
    language_model: nn.Module,
    head: Tensor,
    cache: RowCache,
    ids: Tensor,
    positions: Tensor,
    slots: Tensor,
    used: int,
) -> Tensor:
    """Feeds tokens (R, k) → logits (R, k, 12)."""
    embeddings = language_model.embed_tokens(ids)
    return nn.functional.linear(_attend(language_model, cache, embeddings, positions, slots, used), head)


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
    ) -> None:
        self.model, self.language_model = model, backbone.language_model(model)
        self.inputs, self.compiled = inputs, compiled
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
        # compile_model compiles for training, too; here lengths change from call to call, and each would be
        # compiled.
        with torch.compiler.set_stance("force_eager"):
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
        width = max(map(len, tokens))
        if self.compiled:
            width = next(w for w in WIDTHS if w >= width)
        ids = torch.tensor([tokens[r] + [0] * (width - len(tokens[r])) for r in self.rows], device=device)
        slots = self.lengths[self.rows, None] + torch.arange(width, device=device)
        # Time, height and width advance together in text.
        positions = (slots + self.delta[self.rows]).expand(self.axes, -1, -1)
        feed = self.language_model, self.head, self.cache, ids, positions, slots
        if self.compiled:
            logits = _numpy(_compiled_step(device.type)(*feed, self.cache.size))
        else:
            with torch.compiler.set_stance("force_eager"):
                logits = _numpy(_step(*feed, int(slots.max()) + 1))
        scattered = np.zeros((len(tokens), *logits.shape[1:]), dtype=logits.dtype)
        scattered[self.rows] = logits
        return scattered


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
