import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lerobot_vla0.ensembling import TemporalEnsembler


def reference(chunks: list[np.ndarray], executed: int, size: int, weight: float, exponential: bool):
    """The newest chunk's average, spelled out: for each timestep, everyone who says something of it."""
    newest, (horizon, dim) = len(chunks) - 1, chunks[0].shape
    out = np.zeros((horizon, dim))
    for t in range(horizon):
        total = 0.0
        for age in range(min(size, len(chunks))):
            place = t + age * executed
            if place < horizon:
                w = 1.0 if age == 0 else weight**age if exponential else weight
                out[t] += w * chunks[newest - age][place]
                total += w
        out[t] /= total
    return out


@settings(deadline=None, max_examples=60)
@given(
    calls=st.integers(1, 6),
    horizon=st.integers(1, 6),
    executed=st.integers(1, 6),
    size=st.integers(2, 8),
    weight=st.sampled_from([0.1, 0.5, 1.0]),
    exponential=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_the_reference(calls, horizon, executed, size, weight, exponential, seed):
    executed = min(executed, horizon)
    generator = torch.Generator().manual_seed(seed)
    chunks = [torch.rand(2, horizon, 3, generator=generator, dtype=torch.float64) for _ in range(calls)]
    ensembler = TemporalEnsembler(size, weight, exponential)
    for call, chunk in enumerate(chunks):
        average = ensembler.add(chunk, executed)
        for row in range(2):
            past = [c[row].numpy() for c in chunks[: call + 1]]
            expected = reference(past, executed, size, weight, exponential)
            assert np.allclose(average[row].numpy(), expected)


def test_reset_of_one_environment_does_not_touch_another():
    one, two = torch.rand(2, 4, 3), torch.rand(2, 4, 3)
    both, some = TemporalEnsembler(8), TemporalEnsembler(8)
    for ensembler in (both, some):
        ensembler.add(one, executed=1)
    some.reset(rows=[1])
    untouched, after = both.add(two, executed=1), some.add(two, executed=1)
    assert torch.equal(after[0], untouched[0])
    assert torch.equal(after[1], two[1]) and not torch.allclose(untouched[1], two[1])
    some.reset()
    assert torch.equal(some.add(one, executed=1), one)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_batch_of_another_size_starts_afresh(rows):
    ensembler = TemporalEnsembler(8)
    ensembler.add(torch.rand(2, 4, 3), executed=1)
    chunk = torch.rand(rows, 4, 3)
    assert torch.equal(ensembler.add(chunk, executed=1), chunk)
