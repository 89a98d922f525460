"""A batch of prompts behind the VLM: feeds tokens and returns logits of the grammar's tokens.

`DecodingSession` runs Transformers' modules on our KV cache, in which rows have lengths of their own.
`RowByRowSession` does the same on Transformers' own cache, one row after the other, for VLMs whose attention
masks our cache does not have. Both implement `engine.Model`.
"""

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .. import vlm
from .kv_cache import ATTENTION, KVCache, Packed, forward_with_cache, replay

# With compile_model, the number of tokens per row is rounded up to one of WIDTHS, and the cache's size to a
# multiple of BLOCK, so that a few graphs serve all drafts and prompts. The last width is the most tokens of a
# pass: an accepted token, the longest draft, and a token that the grammar forces after it.
LONGEST_DRAFT = 63  # drafts on a GPU, see `decoder.DRAFTS`
WIDTHS = (1, 8, 16, 32, 2 + LONGEST_DRAFT)
BLOCK = 128
# Compiled graphs on a CPU, one for each width, cache size and number of rows. Beyond its default of 8 PyTorch
# would fall back to eager execution.
MAX_GRAPHS = 64


def acting_model(model: nn.Module) -> nn.Module:
    """The VLM in evaluation mode, with the attention of our cache, not compiled.

    Its modules are copies, so that `model` need not be changed back for training; they share weights, buffers
    and hooks with it.
    """
    twins: dict[int, Any] = {}

    def twin_of(module: nn.Module) -> nn.Module:
        if id(module) not in twins:
            twins[id(module)] = twin = copy.copy(module)
            children = {name: child and twin_of(child) for name, child in module._modules.items()}
            vars(twin).update(_modules=children, training=False)
            # Accelerate puts a function here that would run the original module.
            vars(twin).pop("forward", None)
            if hasattr(module, "config"):
                twin.config = twins.setdefault(id(module.config), copy.copy(module.config))
        return twins[id(module)]

    acting = twin_of(model)
    if vlm.has_decoding_session(model):
        vlm.language_model(acting).config._attn_implementation = ATTENTION
    return acting


def encode_prefix(model: nn.Module, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values, (1, heads, P, head dim) per layer, of text tokens (1, P) that prompts begin with."""
    cache = KVCache()
    cache.begin(1, ids.shape[1], None)
    slots = torch.arange(ids.shape[1], device=ids.device)[None]
    embeddings = model.get_input_embeddings()(ids)
    axes = 3 if hasattr(model.model, "get_rope_index") else 1
    language_model = vlm.language_model(model)
    forward_with_cache(language_model, cache, embeddings, slots.expand(axes, -1, -1), slots, ids.shape[1])
    return cache.layers


def _step(
    language_model: nn.Module,
    cache: KVCache,
    used: int,
    head: Tensor,
    ids: Tensor,
    positions: Tensor,
    slots: Tensor,
    *packed: Tensor,
) -> Tensor:
    """Feeds packed tokens (1, T) → logits (T, 12)."""
    embeddings = language_model.embed_tokens(ids)
    hidden = forward_with_cache(language_model, cache, embeddings, positions, slots, used, Packed(*packed))
    return nn.functional.linear(hidden[0], head)


@cache
def _compiled_step() -> Callable[..., Tensor]:
    return torch.compile(_step, dynamic=False)


class DecodingSession:
    """An `engine.Model` for R prompts. Computes only the grammar's rows of the language model's head, 12
    instead of 151,936.

    Args:
        model: from `acting_model`.
        inputs: *right-padded* prompts (R, T) with `attention_mask`, and their pictures.
        token_ids: tokens whose logits are returned.
        room: largest number of tokens that will be fed after a prompt.
        prefix: from `encode_prefix`, of tokens that all prompts begin with; these are not fed again.
        cache: of an earlier session, whose tensors are used again; None makes a new one.
        compiled: run the passes after the prompt as CUDA graphs, which take a second each to record; on a CPU
            with torch.compile. Finished rows then stay in the cache.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        token_ids: list[int],
        room: int,
        prefix: list[tuple[Tensor, Tensor]] | None = None,
        cache: KVCache | None = None,
        compiled: bool = False,
    ) -> None:
        self.model, self.language_model = model, vlm.language_model(model)
        self.inputs, self.compiled = inputs, compiled
        self.head = model.lm_head.weight[token_ids]
        self.lengths = inputs["attention_mask"].sum(1)  # (R,) prompt and accepted tokens of each row
        self.skipped = prefix[0][0].shape[2] if prefix else 0
        self.rows = list(range(len(self.lengths)))  # rows in the cache; finished ones are taken out
        self.cache = KVCache() if cache is None else cache
        size = inputs["input_ids"].shape[1] + room
        self.cache.begin(len(self.rows), -(-size // BLOCK) * BLOCK if compiled else size, prefix)

    def start(self, drafts: list[list[int]]) -> np.ndarray:
        """Feeds the prompts, each followed by its draft; see `engine.Model.start`."""
        ids, device = self.inputs["input_ids"], self.head.device
        rows, width = len(ids), max(int(n) + len(d) for n, d in zip(self.lengths, drafts, strict=True))
        tokens = ids.new_zeros(rows, max(width, ids.shape[1]))
        tokens[:, : ids.shape[1]] = ids
        positions, self.delta = vlm.prompt_positions(self.model, self.inputs)
        self.axes = len(positions)
        slots = torch.arange(tokens.shape[1], device=device).expand(rows, -1)
        # Positions of the prompt's own tokens, then those of text, where all axes count together.
        all_positions = (slots + self.delta).expand(self.axes, -1, -1).clone()
        all_positions[:, :, : ids.shape[1]] = torch.where(
            self.inputs["attention_mask"].bool(), positions, all_positions[:, :, : ids.shape[1]]
        )
        for row, draft in enumerate(drafts):
            n = int(self.lengths[row])
            tokens[row, n : n + len(draft)] = torch.tensor(draft, dtype=tokens.dtype, device=device)
        embeddings, extra = vlm.embed_prompts(self.model, self.inputs, tokens)
        new = slice(self.skipped, None)
        extra = {key: value[:, new] if isinstance(value, Tensor) else value for key, value in extra.items()}
        new_inputs = embeddings[:, new], all_positions[..., new], slots[:, new]
        hidden = forward_with_cache(self.language_model, self.cache, *new_inputs, slots.shape[1], **extra)
        # Each row's last prompt token, and its drafted ones.
        columns = torch.arange(1 + max(map(len, drafts)), device=device)
        columns = (columns + self.lengths[:, None] - 1 - self.skipped).clamp(max=hidden.shape[1] - 1)
        hidden = hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[2]))
        return _to_numpy(nn.functional.linear(hidden, self.head))

    def extend(self, accepted: list[int], tokens: list[list[int]]) -> np.ndarray:
        """Feeds the next tokens of each row; see `engine.Model.extend`."""
        device = self.head.device
        self.lengths = self.lengths + torch.tensor(accepted, device=device)
        unfinished = [row for row in self.rows if tokens[row]]
        # Taking rows out copies the cache, which pays when every further pass gets clearly smaller.
        if len(unfinished) <= 0.75 * len(self.rows) and not self.compiled:
            self.cache.select([self.rows.index(row) for row in unfinished])
            self.rows = unfinished
        fed = [tokens[row] for row in self.rows]
        width = max(map(len, fed))
        if self.compiled:
            width = next(w for w in WIDTHS if w >= width)
            fed = [row + [0] * (width - len(row)) for row in fed]
        counts = torch.tensor([len(row) for row in fed])
        filled = torch.arange(width) < counts[:, None]  # (R, width)
        owners, columns = (index.to(device) for index in filled.nonzero(as_tuple=True))
        grid = (filled.flatten().cumsum(0) - 1).clamp(min=0).view_as(filled).to(device)
        packed = Packed(owners, columns, grid)
        ids = torch.tensor([[token for row in fed for token in row]], device=device)
        rows = torch.tensor(self.rows, device=device)[owners]
        slots = (self.lengths[rows] + columns)[None]
        positions = (slots + self.delta[rows, 0]).expand(self.axes, -1, -1)
        used = self.cache.size if self.compiled else int(slots.max()) + 1
        # A CUDA graph reads the tensors of its recording: this session's own are copied to those.
        lasting = self.language_model, self.cache, used
        tensors = self.head, ids, positions, slots, *packed
        if self.compiled and device.type == "cuda":
            logits = replay(partial(_step, *lasting), self.cache, tensors)
        elif self.compiled:
            with torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS):
                logits = _compiled_step()(*lasting, *tensors)
        else:
            logits = _step(*lasting, *tensors)
        result = np.zeros((len(tokens), width, logits.shape[-1]), dtype=np.float32)
        result[rows.cpu().numpy(), columns.cpu().numpy()] = _to_numpy(logits)
        return result


class RowByRowSession:
    """An `engine.Model` for a VLM with attention masks of its own: its whole forward on Transformers' cache,
    one row after the other. Same logits as `DecodingSession`, in more time; same arguments."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor], token_ids: list[int]) -> None:
        self.model, self.inputs = model, inputs
        self.head = model.lm_head.weight[token_ids]
        self.lengths = inputs["attention_mask"].sum(1).tolist()
        # Without a config every layer keeps all of its keys, so that rejected drafts can be cut off.
        self.caches = [DynamicCache() for _ in self.lengths]

    def start(self, drafts: list[list[int]]) -> np.ndarray:
        """Feeds the prompts, each followed by its draft; see `engine.Model.start`."""
        rows = []
        for row, length in enumerate(self.lengths):
            # Every row has the same number of pictures, so each tensor splits evenly.
            inputs = {key: value.chunk(len(drafts))[row] for key, value in self.inputs.items()}
            rows.append(inputs | {key: inputs[key][:, :length] for key in ("input_ids", "token_type_ids")})
        return self._feed(rows, drafts, prompt_logits=1)

    def extend(self, accepted: list[int], tokens: list[list[int]]) -> np.ndarray:
        """Feeds the next tokens of each row; see `engine.Model.extend`."""
        for row, keys in enumerate(self.caches):
            self.lengths[row] += accepted[row]
            keys.crop(self.lengths[row])
        empty = self.inputs["input_ids"][:1, :0]
        return self._feed([{"input_ids": empty, "token_type_ids": empty}] * len(tokens), tokens)

    def _feed(
        self, rows: list[dict[str, Tensor]], tokens: list[list[int]], prompt_logits: int = 0
    ) -> np.ndarray:
        """Feeds each row's inputs and then its tokens → logits after the tokens, and after the
        `prompt_logits` last inputs."""
        logits = np.zeros((len(tokens), prompt_logits + max(map(len, tokens)), len(self.head)), np.float32)
        for row, (inputs, new) in enumerate(zip(rows, tokens, strict=True)):
            count = prompt_logits + len(new)
            if not count:  # a finished row
                continue
            ids = torch.tensor([new], dtype=torch.int64, device=self.head.device)
            more = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)}
            inputs = inputs | {key: torch.cat([inputs[key], value], 1) for key, value in more.items()}
            length = self.caches[row].get_seq_length() + inputs["input_ids"].shape[1]
            inputs["attention_mask"] = torch.ones(1, length, device=ids.device)
            hidden = self.model.model(**inputs, past_key_values=self.caches[row], use_cache=True)
            logits[row, :count] = _to_numpy(
                nn.functional.linear(hidden.last_hidden_state[0, -count:], self.head)
            )
        return logits


def _to_numpy(logits: Tensor) -> np.ndarray:
    return logits.float().cpu().numpy()
