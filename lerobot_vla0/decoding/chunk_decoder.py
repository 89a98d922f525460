"""From an observation to timesteps of actions, with the VLM in this process; and what acting remembers of
each environment between two calls.

`server.ServerDecoder` has the same methods, with the VLM behind HTTP.
"""

import copy
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import backbone
from ..configuration_vla0 import VLA0Config
from ..examples import ExampleMaker, Observation
from ..task_stats import to_data_set_bins
from . import engine
from .drafting import AcceptanceRate, Drafter, initial_rates
from .ensembling import TemporalEnsembler
from .kv_cache import KVCache
from .prepack import can_prepack, prepack
from .rtc import LeftOver
from .session import WIDTHS, DecodingSession, RowByRowSession, acting_model, encode_prefix

# Per kind of device: longest draft in tokens; tokens of a pass over all rows; and the chance of being right
# below which one more drafted token costs more time than it saves, for one row. On two CPU cores each further
# token of a pass took 3 % of the time of the first (`bench decode`, 0.5 billion parameters), and a right one
# saves about a fifth of a pass. On a GPU a pass of few tokens takes as long as reading the weights. The cost
# grows with the number of rows, up to MAX_WORTH, where the device computes at its full rate.
DRAFTS = {"cpu": (31, 64, 0.15), "cuda": (63, 512, 0.02)}
MAX_WORTH = 0.6


@dataclass
class EpisodeState:
    """What is remembered of one environment during an episode."""

    actions: deque[Tensor]  # (D,) each: decoded, not yet executed
    ensembler: TemporalEnsembler
    drafter: Drafter | None  # drafts from the last chunk; affects speed only. None with a server
    origin: Tensor | None = None  # (D,) of the last look, see `Observation.origin`

    @classmethod
    def begin(cls, config: VLA0Config, drafter: Drafter | None) -> "EpisodeState":
        settings = config.ensemble_size, config.ensemble_weight, config.ensemble_exponential
        return cls(deque(), TemporalEnsembler(*settings), drafter)

    def add_chunk(self, chunk: Tensor, executed: int) -> None:
        """Averages a new chunk (steps, D) with earlier ones and queues its first `executed` timesteps."""
        self.actions.extend(self.ensembler.add(chunk, executed)[:executed])


def remember_look(episodes: list[EpisodeState], observation: Observation) -> None:
    """Called when these environments, one per row, are looked at for a new chunk. What ensembling remembers
    of relative actions becomes relative to the new state."""
    if observation.origin is None:
        return
    for episode, origin in zip(episodes, observation.origin, strict=True):
        if episode.origin is not None:
            moved = episode.origin - origin
            episode.ensembler.chunks = [chunk + moved for chunk in episode.ensembler.chunks]
        episode.origin = origin


def as_seen_now(actions: Tensor, episodes: list[EpisodeState], observation: Observation) -> Tensor:
    """Actions (R, D) of the last look at each row → the same commands, relative to the present state, which
    the postprocessor adds. Absolute ones as they are."""
    if observation.origin is None:
        return actions
    return actions + (torch.stack([episode.origin for episode in episodes]) - observation.origin)


class Lock:
    """A lock for `with`, which a thread may take again. Unlike Python's, it can be copied: as a new one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type["Lock"], tuple[()]]:
        return Lock, ()


def episode_rows(rows: Any, count: int) -> list[int]:
    """Rows of a batch of environments, as indices.

    Args:
        rows: indices (a sequence, an array or a tensor), or a boolean mask (count,).
        count: of the environments; 0 if it is not known yet.

    Raises:
        ValueError: other values, an index out of 0..count - 1, or a mask of another length.
    """
    given = np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows)
    is_mask = given.dtype == bool
    if given.ndim != 1 or (given.size and not is_mask and given.dtype.kind not in "iu"):
        raise ValueError(f"rows={rows!r} must be a list or array of indices, or a boolean mask.")
    if is_mask and count and len(given) != count:
        raise ValueError(f"rows={rows!r} is a mask of {len(given)} rows, and there are {count} environments.")
    indices = np.flatnonzero(given).tolist() if is_mask else given.tolist()
    wrong = [row for row in indices if row < 0 or (count and row >= count)]
    if wrong:
        last = f"0..{count - 1}" if count else "0 and above"
        raise ValueError(f"rows={rows!r}: {wrong} are not there; the environments are {last}.")
    return indices


@dataclass
class Kept:
    """What is made of the VLM for acting, and kept until its weights change."""

    model: nn.Module | None = None  # from `acting_model`, with prepacked weights only in evaluation mode
    prefix: list[tuple[Tensor, Tensor]] | None = None  # from `encode_prefix`, only in evaluation mode


class ChunkDecoder:
    """Decodes chunks of actions under the grammar. Several threads may decode at once, also while the model
    is being trained: nothing that they share is changed meanwhile, but for the weights.

    Args:
        config: of the policy.
        model: the VLM.
        examples: of the same config.
    """

    def __init__(self, config: VLA0Config, model: nn.Module, examples: ExampleMaker) -> None:
        self.config, self.model, self.examples = config, model, examples
        self.grammar, self.action_dim = examples.chat.grammar, examples.action_dim
        self.rates = initial_rates()  # of drafts; shared by all environments and episodes
        self._kept, self._modules = Kept(), []
        self.release()
        backbone.language_model(model).register_load_state_dict_post_hook(self._weights_loaded)

    def release(self) -> None:
        """Drops what was computed from the weights, to free memory or because they change.

        Called by the policy when it changes between training and evaluation mode, moves to another device or
        loads weights. Whoever changes weights or modules in evaluation mode has to call it.
        """
        # Compiled graphs belong to modules, and see other weights by themselves.
        modules = list(self.model.modules())
        same = self.config.compile_model and modules == self._modules
        self._kept, self._modules = Kept(self._kept.model if same else None), modules
        # With compile_model: caches that no chunk uses at present, with the CUDA graphs recorded on them.
        self._caches: list[KVCache] = []

    def _weights_loaded(self, *_: object) -> None:
        self.release()

    def require_weights(self) -> None:
        """Nothing to refuse: the weights are here, the policy can be trained and saved."""

    def new_episodes(self, rows: int) -> list[EpisodeState]:
        """States of `rows` environments that act together."""
        return [EpisodeState.begin(self.config, self.make_drafter(rows, self.rates)) for _ in range(rows)]

    def make_drafter(self, rows: int = 1, rates: dict[str, AcceptanceRate] | None = None) -> Drafter:
        """A drafter for one of `rows` rows that are decoded together, as `config.draft_length` asks for."""
        length, worth = self.config.draft_length, 0.0
        if length is None:
            length, tokens, worth = DRAFTS["cpu" if self.model.device.type == "cpu" else "cuda"]
            length = min(length, max(1, tokens // rows))
        return Drafter(self.grammar, self.action_dim, length, min(MAX_WORTH, rows * worth), rates)

    @torch.no_grad()
    def decode_chunk(
        self,
        observation: Observation,
        steps: int,
        episodes: list[EpisodeState],
        left_over: LeftOver | None = None,
    ) -> Iterator[Tensor]:
        """Yields timestep after timestep, bins (R, D) as float32, each as soon as every row has written it.

        Args:
            observation: of R rows.
            steps: number of timesteps to decode, at most `chunk_size`.
            episodes: one per row.
            left_over: what is still to be executed of the last chunk; the answers begin with its committed
                integers. The others only serve as drafts.
        """
        inputs = self.examples.acting_inputs(observation)
        if self.config.temperature > 0:
            # Drafts change how many random numbers are drawn: with those of an earlier chunk, a sample would
            # not depend on the seed alone.
            drafters = [self.make_drafter(len(episodes)) for _ in episodes]
        else:
            # Copies, because two chunks may be decoded at once.
            drafters = [copy.copy(episode.drafter) for episode in episodes]
        for row, drafter in enumerate(drafters):
            drafter.start()
            if left_over is not None:
                drafter.expect(left_over.integers[row])
        dim, yielded = self.action_dim, 0
        with self.cache() as cache:
            for decoded in engine.decode_stream(
                self.session(inputs, cache),
                self.grammar,
                len(drafters),
                count=steps * dim,
                drafters=drafters,
                prefixes=None if left_over is None else left_over.prefixes(steps * dim),
                temperature=self.config.temperature,
            ):
                integers = decoded.integers
                while yielded < steps and all(len(row) >= (yielded + 1) * dim for row in integers):
                    step = [row[yielded * dim : (yielded + 1) * dim] for row in integers]
                    bins = torch.tensor(step, dtype=torch.float32, device=inputs["input_ids"].device)
                    yield to_data_set_bins(bins, observation.task_range, self.config.num_bins)
                    yielded += 1
        for episode, drafter, answer in zip(episodes, drafters, integers, strict=True):
            drafter.remember(answer[: steps * dim], executed=min(steps, self.config.n_action_steps))
            episode.drafter = drafter

    @contextmanager
    def cache(self) -> Iterator[KVCache]:
        """A cache for `session` that nobody else uses meanwhile."""
        caches = self._caches  # `release` begins another list
        try:
            cache = caches.pop()
        except IndexError:  # all are in use
            cache = KVCache()
        try:
            yield cache
        finally:
            caches.append(cache)

    def session(self, inputs: dict[str, Tensor], cache: KVCache | None = None) -> engine.Model:
        """The VLM behind the prompts of `ExampleMaker.acting_inputs`.

        Args:
            cache: with compile_model, of an earlier session that has ended; None makes a new one.
        """
        token_ids = self.grammar.token_ids
        # In this order: another thread that starts training changes the mode before it drops `_kept`.
        kept, compiled = self._kept, self.config.compile_model
        training, has_session = self.model.training, backbone.has_decoding_session(self.model)
        if kept.model is None:
            model = acting_model(self.model)
            if has_session and not training and not compiled and can_prepack(model):
                prepack(backbone.language_model(model))
            kept.model = model
        if not has_session:
            return RowByRowSession(kept.model, inputs, token_ids)
        prefix = kept.prefix
        if prefix is None:
            prefix = encode_prefix(kept.model, inputs["input_ids"][:1, : self.examples.chat.num_shared])
            kept.prefix = None if training else prefix
        return DecodingSession(
            kept.model,
            inputs,
            token_ids,
            room=self.grammar.max_tokens + WIDTHS[-1],
            prefix=prefix,
            buffers=cache if compiled else None,
            compiled=compiled,
        )
