"""Constrained decoding of a causal LM under a grammar. Knows tokens and logits; nothing of text, actions,
images.

The definition of VLA-0 decoding here: at each step the argmax of the model's logits over the tokens that the
grammar allows (ties: lowest token id). No repetition penalty and no sampling, whatever the model's
`generation_config` says.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .grammar import IntegerGrammar


class Decoded(NamedTuple):
    integers: Tensor  # (R, count) int64; -1 from `count` integers on that were not asked for
    tokens: Tensor  # (R, T) int64 token ids, rows that ended early filled with the end token
    passes: int  # forward passes of the model, the prompt's included


@torch.inference_mode()
def decode(
    logits: Tensor,
    step: Callable[[Tensor], Tensor],
    grammar: IntegerGrammar,
    *,
    count: int | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Decoded:
    """Writes integers row by row until every row has `count` of them.

    Args:
        logits: (R, 12) logits of the grammar's symbols after the prompt.
        step: next token of each row, (R, 1) token ids → logits after it, (R, 1, 12). Extends its own KV
            cache.
        grammar: what may be written.
        count: integers needed; fewer than `grammar.count` stops early. None writes the whole text.
        temperature: 0 takes the argmax, above 0 samples from softmax(logits / temperature) over allowed
            symbols.
        generator: of the sampling, on the logits' device.
    """
    needed = grammar.count if count is None else count
    if not 1 <= needed <= grammar.count:
        raise ValueError(f"count must be in 1..{grammar.count}, got {needed}.")
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}.")
    state, tokens, passes = grammar.start(len(logits)), [], 1
    while True:
        masked = logits.float().masked_fill(~grammar.allowed(state), -torch.inf)
        if temperature > 0:
            symbol = torch.multinomial((masked / temperature).softmax(-1), 1, generator=generator)[:, 0]
        else:
            symbol = masked.argmax(-1)
        state = grammar.advance(state, symbol)
        tokens.append(grammar.token_ids[symbol])
        if bool((state.index >= needed).all()):
            return Decoded(state.integers, torch.stack(tokens, 1), passes)
        logits = step(tokens[-1][:, None])[:, -1]
        passes += 1
