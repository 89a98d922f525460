"""From an observation to a chunk of actions, with the VLM in this process; and what is remembered of each
environment between two chunks. `server.ServerDecoder` has the same `decode`, with the VLM behind HTTP."""

import threading
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .. import vlm
from ..configuration_vla0 import VLA0Config
from ..dataset import to_data_set_bins
from ..examples import ExampleMaker, Observation
from . import engine
from .drafting import Drafter, initial_rates
from .kv_cache import KVCache
from .rtc import Committed
from .session import WIDTHS, DecodingSession, RowByRowSession, acting_model, encode_prefix

# Several threads may act; each waits for the others. One lock for the process, since a policy with a lock of
# its own could not be copied or pickled.
LOCK = threading.RLock()

# Per kind of device: longest draft in tokens; tokens of a pass over all rows; and the cost of one more
# drafted token, relative to what an accepted one saves, for one row. On two CPU cores each further token of a
# pass took 3 % of the time of the first (`bench decode`, 0.5 billion parameters), and an accepted one saves
# about a fifth of a pass. On a GPU a pass of few tokens takes as long as reading the weights. The cost grows
# with the number of rows, up to MAX_TOKEN_COST, where the device computes at its full rate.
DRAFTS = {"cpu": (31, 64, 0.15), "cuda": (63, 512, 0.02)}
MAX_TOKEN_COST = 0.6


@dataclass
class Plan:
    """One environment's episode: queued actions, and what the next chunk builds on. Belongs to the code that
    executes the actions, which begins each episode with a new one."""

    actions: deque[Tensor] = field(default_factory=deque)  # (D,) bins each
    # Chunks to average, (≤ H, D) each, newest first; all begin at the first timestep of the newest.
    chunks: list[Tensor] = field(default_factory=list)
    origin: Tensor | None = None  # (D,) the state that `chunks` are relative to, see `Observation.origin`
    # For drafts: the last answer's integers from the next answer's first timestep on, and at most two
    # timesteps before that.
    previous: list[int] = field(default_factory=list)
    history: list[int] = field(default_factory=list)

    def add(self, chunk: Tensor, origin: Tensor | None, config: VLA0Config) -> None:
        """Queues the first `n_action_steps` timesteps of a new chunk (steps, D), averaged with the same
        timesteps of earlier chunks (temporal ensembling: Zhao et al., ACT, 2023; weights of NVlabs/vla0)."""
        executed = config.n_action_steps
        older = [actions[executed:] for actions in self.chunks]
        if origin is not None and self.origin is not None:
            older = [actions + (self.origin - origin) for actions in older]
        self.chunks, self.origin = [chunk, *older][: config.ensemble_size], origin
        total, weights = torch.zeros_like(chunk), torch.zeros_like(chunk)
        for age, actions in enumerate(self.chunks):
            weight = config.ensemble_weight if age else 1.0
            total[: len(actions)] += weight * actions
            weights[: len(actions)] += weight
        self.actions.extend((total / weights)[:executed])


class Decoder:
    """Decodes chunks of actions under the grammar.

    Args:
        config: of the policy.
        model: the VLM.
        examples: of the same config.
    """

    def __init__(self, config: VLA0Config, model: nn.Module, examples: ExampleMaker) -> None:
        self.config, self.model, self.examples = config, model, examples
        self.grammar, self.action_dim = examples.chat.grammar, examples.action_dim
        self.rates = initial_rates()  # acceptance rates of drafts, shared by all environments and episodes
        self._modules: list[nn.Module] = []
        self._acting_model: nn.Module | None = None
        self.release()
        # A bound method: in a copy of the model it belongs to the copy's decoder.
        vlm.language_model(model).register_load_state_dict_post_hook(self.release)

    def release(self, *_: object) -> None:
        """Drops what was computed from the weights, to free memory or because they change.

        The policy calls it when it changes between training and evaluation mode, moves to another device or
        loads weights. Code that changes weights or modules in evaluation mode has to call it.
        """
        # Compiled graphs belong to modules, and see other weights by themselves.
        modules = list(self.model.modules())
        if not self.config.compile_model or modules != self._modules:
            self._acting_model = None  # with prepacked weights only in evaluation mode
        self._modules = modules
        self._prefix: list[tuple[Tensor, Tensor]] | None = None  # from `encode_prefix`
        self._cache: KVCache | None = None  # with compile_model: CUDA graphs are recorded on its tensors

    @torch.no_grad()
    def decode(
        self, observation: Observation, steps: int, plans: list[Plan], committed: Committed | None = None
    ) -> Tensor:
        """The next timesteps as bins, float32 (R, steps, D).

        Args:
            observation: of R rows.
            steps: number of timesteps to decode, at most `chunk_size`.
            plans: one per row; only `previous` and `history` are read and changed.
            committed: with real-time chunking, the rest of the last chunk. Its first integers are prefixes of
                the answers, all others only drafts.
        """
        with LOCK:
            inputs = self.examples.acting_inputs(observation)
            dim, count = self.action_dim, steps * self.action_dim
            for row, plan in enumerate(plans):
                if committed is not None:
                    plan.previous, plan.history = committed.integers[row], []
                elif self.config.temperature > 0:
                    # Drafts change how many random numbers are drawn, and a sample depends on the seed alone.
                    plan.previous, plan.history = [], []
            decoded = engine.decode(
                self.session(inputs),
                self.grammar,
                len(plans),
                count=count,
                drafters=[self.drafter(plan, len(plans)) for plan in plans],
                prefixes=None if committed is None else committed.prefixes(count),
                temperature=self.config.temperature,
            )
            answers = [integers[:count] for integers in decoded.integers]
            executed = dim * min(steps, self.config.n_action_steps)
            for plan, answer in zip(plans, answers, strict=True):
                plan.history = (plan.history + answer[:executed])[-2 * dim :]
                plan.previous = answer[executed:]
            bins = torch.tensor(answers, dtype=torch.float32, device=inputs["input_ids"].device)
            return to_data_set_bins(bins.view(-1, steps, dim), observation.task_range, self.config.num_bins)

    def drafter(self, plan: Plan, rows: int) -> Drafter:
        """Drafts one row's next answer, of `rows` that are decoded together."""
        length, tokens, cost = DRAFTS["cpu" if self.model.device.type == "cpu" else "cuda"]
        length, cost = min(length, max(1, tokens // rows)), min(MAX_TOKEN_COST, rows * cost)
        rates = None if self.config.temperature > 0 else self.rates
        return Drafter(self.grammar, self.action_dim, length, cost, rates, plan.previous, plan.history)

    def session(self, inputs: dict[str, Tensor]) -> engine.Model:
        """The VLM behind the prompts of `ExampleMaker.acting_inputs`."""
        token_ids, compiled = self.grammar.token_ids, self.config.compile_model
        training, has_session = self.model.training, vlm.has_decoding_session(self.model)
        if self._acting_model is None:
            self._acting_model = acting_model(self.model)
            if has_session and not training and not compiled and vlm.can_prepack(self._acting_model):
                vlm.prepack(vlm.language_model(self._acting_model))
        if not has_session:
            return RowByRowSession(self._acting_model, inputs, token_ids)
        prefix = self._prefix
        if prefix is None:
            shared = inputs["input_ids"][:1, : self.examples.chat.num_shared]
            prefix = encode_prefix(self._acting_model, shared)
            self._prefix = None if training else prefix
        if compiled and self._cache is None:
            self._cache = KVCache()
        return DecodingSession(
            self._acting_model,
            inputs,
            token_ids,
            room=self.grammar.max_tokens + WIDTHS[-1],
            prefix=prefix,
            cache=self._cache,
            compiled=compiled,
        )
