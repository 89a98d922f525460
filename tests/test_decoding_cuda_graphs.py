"""Without a GPU: a recording that runs its function again stands in for a CUDA graph. Else test_cuda.py."""

from functools import partial

import pytest
import torch
from conftest import make_batch, make_config, observation, randomise

from lerobot_vla0.decoding import cuda_graphs, session
from lerobot_vla0.decoding.cuda_graphs import replay
from lerobot_vla0.decoding.kv_cache import KVCache
from lerobot_vla0.modeling_vla0 import VLA0Policy


class FakeGraph:
    """Runs on the tensors that it was recorded with, and leaves the result where it was then."""

    def __init__(self, step, places):
        self.step, self.places, self.output = step, places, step(*places)

    def replay(self):
        self.output.copy_(self.step(*self.places))


@pytest.fixture
def recorded(monkeypatch) -> list[tuple]:
    """Shapes of the inputs of each recording."""
    shapes = []

    def record(step, places, graphs):
        shapes.append(tuple(place.shape for place in places))
        graph = FakeGraph(step, places)
        return graph, places, graph.output

    monkeypatch.setattr(cuda_graphs, "_record", record)
    return shapes


def test_records_once_per_shape_and_cache(recorded):
    cache = KVCache()
    cache.begin(1, 128, None)
    for size in (2, 3, 2, 3):
        a, b = torch.rand(size), torch.rand(size)
        assert torch.equal(replay(torch.add, cache, (a, b)), a + b)
        assert torch.equal(replay(torch.add, cache, (b, b)), b + b)
    assert len(recorded) == 2
    cache.begin(1, 128, None)
    replay(torch.add, cache, (a, b))
    assert len(recorded) == 2
    cache.begin(1, 256, None)  # other tensors
    replay(torch.add, cache, (a, b))
    assert len(recorded) == 3


@torch.no_grad()
def test_chunks_are_those_of_eager_passes(tiny_vlm, processors, recorded, monkeypatch):
    """With the longest drafts, several rows, and new weights in between."""
    monkeypatch.setattr(session, "_compiled_step", lambda: _replayed)
    eager = VLA0Policy(make_config(tiny_vlm, draft_length=0)).eval()
    graphs = VLA0Policy(make_config(tiny_vlm, draft_length=63, compile_model=True)).eval()
    for seed in (1, 2):
        for policy in (eager, graphs):
            randomise(policy, seed)
            policy.decoder.release()
        for rows in (2, 1, 2):
            batch = processors[0](observation(make_batch(rows=rows, seed=rows)))
            assert torch.equal(graphs.predict_action_chunk(batch), eager.predict_action_chunk(batch))
    widths = {grid[1] for *_, grid in recorded}  # the last input is `Packed.grid`, (R, width)
    assert session.WIDTHS[-1] in widths


def _replayed(*arguments):
    """As `DecodingSession.extend` calls it on a GPU: what is no input lasts longer than a session."""
    lasting, new = arguments[:3], arguments[3:]
    assert [type(argument) for argument in lasting[1:]] == [KVCache, int]
    assert all(isinstance(argument, torch.Tensor) for argument in new)
    return replay(partial(session._step, *lasting), lasting[1], new)
