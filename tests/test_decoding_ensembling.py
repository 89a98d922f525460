import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lerobot_vla0.decoding.ensembling import TemporalEnsembler


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
    chunks = [torch.rand(horizon, 3, generator=generator, dtype=torch.float64) for _ in range(calls)]
    ensembler = TemporalEnsembler(size, weight, exponential)
    for call, chunk in enumerate(chunks):
        past = [c.numpy() for c in chunks[: call + 1]]
        expected = reference(past, executed, size, weight, exponential)
        assert np.allclose(ensembler.add(chunk, executed).numpy(), expected)
