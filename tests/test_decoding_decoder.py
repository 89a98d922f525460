"""Decoder and plan; prepacked weights; CUDA graphs with a stand-in (real ones: test_cuda.py)."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from conftest import make_batch, make_config, observation, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lerobot_vla0 import vlm
from lerobot_vla0.decoding import decoder, kv_cache, session
from lerobot_vla0.decoding.decoder import Plan
from lerobot_vla0.decoding.drafting import initial_rates
from lerobot_vla0.decoding.kv_cache import KVCache, replay
from lerobot_vla0.modeling_vla0 import VLA0Policy


@pytest.fixture
def batch(processors) -> dict:
    return observation(processors[0](make_batch(rows=2)))


def random_policy(tiny_vlm, **overrides) -> VLA0Policy:
    policy = VLA0Policy(make_config(tiny_vlm, **overrides)).eval()
    randomise(policy)
    return policy


def test_fewer_steps_are_the_beginning_of_the_chunk(policy, batch):
    observed, plans = policy.examples.check(batch), [Plan(), Plan()]
    chunk = policy.predict_action_chunk(batch)
    assert chunk.shape == (2, 8, 7)
    assert torch.equal(policy.decoder.decode(observed, 3, plans), chunk[:, :3])
    assert len(plans[0].previous) == 0 and len(plans[0].history) == 14


@pytest.mark.parametrize("change", ["load", "train", "dtype"])
def test_nothing_computed_from_old_weights_is_used(change, policy, batch, tiny_vlm):
    """Keys and values of the words before the first picture are computed once for all chunks."""
    policy.predict_action_chunk(batch)
    assert policy.decoder._prefix is not None
    if change == "load":
        policy.load_state_dict(random_policy(tiny_vlm).state_dict())
    elif change == "train":
        policy.train()
        policy.predict_action_chunk(batch)
        randomise(policy)
        policy.eval()
    else:
        policy.double()
    assert policy.decoder._prefix is None
    other = policy if change == "dtype" else random_policy(tiny_vlm)
    assert torch.equal(policy.predict_action_chunk(batch), other.predict_action_chunk(batch))


def test_a_copy_has_a_decoder_of_its_own(policy, batch):
    chunk = policy.predict_action_chunk(batch)
    other = copy.deepcopy(policy)
    assert other.decoder.model is other.model and pickle.dumps(policy)
    other.decoder.release()
    randomise(other)
    other.predict_action_chunk(batch)
    other.load_state_dict(other.state_dict())
    assert policy.decoder._prefix is not None and other.decoder._prefix is None
    assert not torch.equal(other.predict_action_chunk(batch), chunk)
    assert torch.equal(policy.predict_action_chunk(batch), chunk)


def test_acting_changes_no_training(policy, processors):
    """Gradients and mode, although acting runs in evaluation mode on attention of its own."""
    batch, gradients = processors[0](make_batch(rows=2)), []
    policy.train()
    policy.config.jitter, policy.config.action_mask_prob = [0.0] * 4, 0.0
    policy.config.crop_ratio = 1.0
    for _ in range(2):
        policy(batch)[0].backward()
        gradients.append([p.grad for p in policy.parameters() if p.grad is not None])
        policy.zero_grad()
        policy.predict_action_chunk(observation(batch))
        assert policy.training and all(module.training for module in policy.model.modules())
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("same", [True, False])  # one policy for all threads
def test_many_threads(same, tiny_vlm, processors):
    policies = [random_policy(tiny_vlm) for _ in range(1 if same else 4)] * (4 if same else 1)
    batches = [observation(processors[0](make_batch(rows=1 + seed % 2, seed=seed))) for seed in range(4)]
    expected = [policy.predict_action_chunk(batch) for policy, batch in zip(policies, batches, strict=True)]
    policies[0].decoder.release()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: policies[i % 4].predict_action_chunk(batches[i % 4]), range(8)))
    assert all(torch.equal(*pair) for pair in zip(results, expected * 2, strict=True))


def reference(chunks: list[np.ndarray], executed: int, size: int, weight: float) -> np.ndarray:
    """The newest chunk's average, spelled out: for each timestep, all chunks that contain it."""
    newest, (horizon, dim) = len(chunks) - 1, chunks[0].shape
    out = np.zeros((horizon, dim))
    for t in range(horizon):
        total = 0.0
        for age in range(min(size, len(chunks))):
            if t + age * executed < horizon:
                w = weight if age else 1.0
                out[t] += w * chunks[newest - age][t + age * executed]
                total += w
        out[t] /= total
    return out[:executed]


@settings(deadline=None, max_examples=40)
@given(
    calls=st.integers(1, 6),
    horizon=st.integers(1, 6),
    executed=st.integers(1, 6),
    size=st.integers(1, 8),
    weight=st.sampled_from([0.1, 0.5, 1.0]),
    relative=st.booleans(),
)
def test_ensembling_equals_the_reference(calls, horizon, executed, size, weight, relative):
    """Relative chunks are averaged as absolute ones."""
    executed = min(executed, horizon)
    settings = {"ensemble_size": size, "ensemble_weight": weight, "n_action_steps": executed}
    config = type("Config", (), settings)
    chunks, plan = [torch.rand(horizon, 3, dtype=torch.float64) for _ in range(calls)], Plan()
    for call, chunk in enumerate(chunks):
        origin = torch.rand(3, dtype=torch.float64) if relative else torch.zeros(3)
        plan.add(chunk - origin, origin if relative else None, config)
        actions = torch.stack([plan.actions.popleft() for _ in range(executed)]) + origin
        past = [c.numpy() for c in chunks[: call + 1]]
        assert np.allclose(actions.numpy(), reference(past, executed, size, weight)) and not plan.actions


# prepacked weights


def linear(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 200, bias=False), nn.SiLU(), nn.Linear(200, 40)).to(dtype)


needs_bf16 = pytest.mark.skipif(not vlm.can_prepack(linear()), reason="this CPU has no bfloat16 instructions")


@needs_bf16
@pytest.mark.parametrize("shape", [(1, 1, 96), (4, 16, 96), (1, 257, 96)])
def test_prepacked_layers_are_the_same_to_the_bit(shape):
    model, inputs = linear(), torch.randn(shape).bfloat16()
    assert not vlm.can_prepack(linear(torch.float32))
    with torch.inference_mode():
        expected = model(inputs)
        assert vlm.prepack(model) == 2
        assert torch.equal(model(inputs), expected)
        model[0].weight.zero_()  # proves that copies are used
        assert torch.equal(model(inputs), expected)


@needs_bf16
def test_prepacking_changes_no_action_and_notices_new_weights(tiny_vlm, batch, monkeypatch):
    policy, plain, other = (VLA0Policy(make_config(tiny_vlm, dtype="bfloat16")).eval() for _ in range(3))
    randomise(other)
    actions = policy.predict_action_chunk(batch)
    assert "forward" in vars(vlm.language_model(policy.decoder._acting_model).layers[0].mlp.up_proj)
    assert not any("forward" in vars(module) for module in policy.modules())
    policy.load_state_dict(other.state_dict())  # in place, and without train()
    policy.reset()
    policy.decoder.rates = initial_rates()  # other drafts would make other passes, which round differently
    new_actions = policy.predict_action_chunk(batch)
    monkeypatch.setattr(vlm, "can_prepack", lambda model: False)
    assert torch.equal(plain.predict_action_chunk(batch), actions)
    assert torch.equal(other.predict_action_chunk(batch), new_actions)
    assert not torch.equal(new_actions, actions)


# CUDA graphs: a recording that runs its function again stands in for a graph


class FakeGraph:
    """Runs on the tensors that it was recorded with, and writes the result where it was then."""

    def __init__(self, step, inputs) -> None:
        self.step, self.inputs, self.output = step, inputs, step(*inputs)

    def replay(self) -> None:
        self.output.copy_(self.step(*self.inputs))


@pytest.fixture
def recorded(monkeypatch) -> list[tuple]:
    """Shapes of the inputs of each recording."""
    shapes = []

    def record(step, inputs, graphs):
        shapes.append(tuple(tensor.shape for tensor in inputs))
        graph = FakeGraph(step, inputs)
        return graph, inputs, graph.output

    monkeypatch.setattr(kv_cache, "_record", record)
    return shapes


def test_records_once_per_shape_and_cache(recorded):
    cache = KVCache()
    for slots, recordings in ((128, 2), (128, 2), (256, 4)):  # of other tensors in the end
        cache.begin(1, slots, None)
        for size in (2, 3, 2, 3):
            a, b = torch.rand(size), torch.rand(size)
            assert torch.equal(replay(torch.add, cache, (a, b)), a + b)
            assert torch.equal(replay(torch.add, cache, (b, b)), b + b)
        assert len(recorded) == recordings


@torch.no_grad()
def test_chunks_of_graphs_are_those_of_eager_passes(tiny_vlm, processors, recorded, monkeypatch):
    """With the longest drafts against none, several rows, and new weights in between."""
    monkeypatch.setattr(session, "_compiled_step", lambda: _replayed)
    eager, graphs = (VLA0Policy(make_config(tiny_vlm, compile_model=value)).eval() for value in (False, True))
    for seed in (1, 2):
        for policy in (eager, graphs):
            randomise(policy, seed)
            policy.decoder.release()
        for rows in (2, 1, 2):
            batch = processors[0](observation(make_batch(rows=rows, seed=rows)))
            chunks = []
            for policy, length in ((eager, 0), (graphs, session.LONGEST_DRAFT)):
                monkeypatch.setattr(decoder, "DRAFTS", {"cpu": (length, 512, 0.0)})
                chunks.append(policy.predict_action_chunk(batch))
            assert torch.equal(*chunks)
    widths = {grid[1] for *_, grid in recorded}  # the last input is `Packed.grid`, (R, width)
    assert session.WIDTHS[-1] in widths


def _replayed(*arguments):
    """As `DecodingSession.extend` calls it on a GPU."""
    lasting, tensors = arguments[:3], arguments[3:]
    assert [type(argument) for argument in lasting[1:]] == [KVCache, int]
    assert all(isinstance(argument, torch.Tensor) for argument in tensors)
    return replay(partial(session._step, *lasting), lasting[1], tensors)
