"""Passes over a few tokens as CUDA graphs. Such a pass launches about a thousand small kernels, which takes
the CPU longer than the GPU needs to run them; a graph launches them all at once, and they stay the same.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .kv_cache import KVCache

WARM_UP = 2  # runs before a recording, in which libraries allocate what they keep


def replay(step: Callable[..., Tensor], cache: KVCache, inputs: tuple[Tensor, ...]) -> Tensor:
    """`step(*inputs)`, recorded at the first call with tensors of these shapes.

    Args:
        step: reads and writes no other tensors than `inputs`, the cache's, and weights. None of these may
            move in memory while the cache is in use, and nothing may depend on values that only the CPU has.
        cache: keeps the recordings, as long as its own tensors.
        inputs: on a GPU.

    Returns:
        A tensor that the next call overwrites.
    """
    shapes = tuple(tensor.shape for tensor in inputs)
    if shapes not in cache.graphs:
        cache.graphs[shapes] = _record(step, tuple(tensor.clone() for tensor in inputs), cache.graphs)
    graph, places, output = cache.graphs[shapes]
    for place, tensor in zip(places, inputs, strict=True):
        place.copy_(tensor)
    graph.replay()
    return output


def _record(step: Callable[..., Tensor], places: tuple[Tensor, ...], graphs: dict[Any, Any]) -> tuple:
    """(graph, its inputs, its output). All graphs of a cache use one pool of memory, one after the other."""
    # As PyTorch asks for (Semantics of CUDA Graphs): on a stream of its own, first without recording.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step(*places)
    torch.cuda.current_stream().wait_stream(stream)
    pool = next((graph.pool() for graph, *_ in graphs.values()), None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = step(*places)
    return graph, places, output
