"""What `bench decode` decodes: prompts, and the answers that models with random weights are made to give."""

from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from ..modeling_vla0 import VLA0Policy
from ..processor_vla0 import load_processors, make_vla0_pre_post_processors
from ..training_data import read_metadata
from .common import SHAPES
from .modes import Chunk, answer_tokens, run_mode

WORKLOADS = {
    "recorded": "recorded actions; after a wrong token the model predicts anything",
    "recorded_masked": "recorded actions; the model does not look at its own numbers",
    "replanned": "as recorded_masked, one timestep after the chunk before",
    "uniform": "uniform random integers: the worst case",
    "own": "the checkpoint's own answers",
    "own_replanned": "the checkpoint's own answers, one timestep after the chunk before",
}
# Ground-truth texts of LIBERO's data (8 timesteps × 7 integers), as printed in VLA-0's public repositories.
RECORDED = (
    "474 479 460 669 391 674 0 471 479 460 669 391 674 0 458 479 460 669 391 674 0 "
    "455 472 460 669 391 674 0 455 444 460 669 391 674 0 455 396 449 669 391 674 0 "
    "449 335 422 669 391 674 0 422 282 397 669 391 674 0",
    "569 513 500 437 500 474 0 569 514 500 437 500 474 0 571 519 500 437 500 474 0 "
    "573 521 500 437 500 474 0 573 523 500 437 500 472 0 574 527 500 437 501 471 0 "
    "574 529 500 437 500 471 0 569 531 500 437 500 470 0",
)
Frame = dict[str, Any]  # a batch of one row from the preprocessor


def make_chunks(
    name: str, policy: VLA0Policy, pairs: list[tuple[Frame, Frame]], count: int, random: np.random.Generator
) -> list[Chunk]:
    """The chunks of a workload: one for each pair of consecutive frames; without frames `count`, but of
    RECORDED at least both. Models with random weights see random images."""
    grammar = policy.decoder.grammar
    if name == "own":
        return [Chunk(now) for _, now in pairs]
    if name == "own_replanned":
        previous = [run_mode(policy, "drafts", [Chunk(before)]).integers[0] for before, _ in pairs]
        return [Chunk(now, previous=chunk) for (_, now), chunk in zip(pairs, previous, strict=True)]
    if name == "uniform":
        answers = random.integers(0, grammar.maximum + 1, (count, grammar.count)).tolist()
    elif pairs:
        answers = [now["action"].flatten().tolist() for _, now in pairs]
    else:
        texts = [[int(word) for word in text.split()] for text in RECORDED]
        answers = [texts[i % len(texts)] for i in range(max(len(texts), count))]
    masked = name in ("recorded_masked", "replanned")
    chunks = [Chunk(random_frame(random), answer_tokens(grammar, answer), masked) for answer in answers]
    if name == "replanned":
        for chunk, (before, _) in zip(chunks, pairs, strict=True):
            chunk.previous = before["action"].flatten().tolist()
    return chunks


def random_frame(random: np.random.Generator) -> Frame:
    """Two camera images of noise and an instruction."""
    images = torch.from_numpy(random.random((2, 1, 3, 256, 256), dtype=np.float32))
    return {
        "observation.images.image": images[0],
        "observation.images.image2": images[1],
        "task": ["pick up the salad dressing and place it in the basket"],
    }


def load_pairs(config: Any, policy: VLA0Policy, random: np.random.Generator) -> list[tuple[Frame, Frame]]:
    """At most `config.chunks` pairs of consecutive frames of `config.dataset`, with `action` as integer bins
    (1, H, D).

    Raises:
        ValueError: the data set's actions have another dimension than the policy's, or its episodes are too
            short for two consecutive chunks.
    """
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    meta = read_metadata("local/bench", config.dataset)
    horizon, dim = policy.config.chunk_size, policy.decoder.action_dim
    if meta.shapes["action"] != (dim,):
        raise ValueError(
            f"dataset={str(config.dataset)!r} has actions of shape {tuple(meta.shapes['action'])}, "
            f"not ({dim},)."
        )
    if config.model in SHAPES:
        preprocess, _ = make_vla0_pre_post_processors(policy.config, meta.stats)
    else:
        preprocess, _ = load_processors(policy.config, config.model)
    times = {"action": [i / meta.fps for i in range(horizon)]}
    dataset = LeRobotDataset("local/bench", root=config.dataset, delta_timestamps=times)
    # Both frames' chunks end before their episode does.
    episodes = zip(meta.episodes["dataset_from_index"], meta.episodes["dataset_to_index"], strict=True)
    starts = [i for first, last in episodes for i in range(first, last - horizon)]
    if not starts:
        raise ValueError(
            f"dataset={str(config.dataset)!r} has no episode of more than {horizon} frames, as two "
            "consecutive chunks of this policy need. Give one with longer episodes."
        )
    chosen = random.choice(starts, min(config.chunks, len(starts)), replace=False).tolist()
    return [tuple(preprocess(default_collate([dataset[j]])) for j in (i, i + 1)) for i in chosen]
