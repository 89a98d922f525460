"""Real-time chunking (Black et al., "Real-Time Execution of Action Chunking Flow Policies", 2025) for a
policy that writes text: the robot goes on executing the last chunk while the next one is decoded. The
timesteps that it will have executed by then are the beginning of the next answer, which the model continues.

LeRobot's side is `lerobot/rollout/inference/rtc.py` (`lerobot-rollout --inference.type=rtc`).
"""

import logging
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..configuration_vla0 import VLA0Config
from ..examples import Observation
from ..task_stats import to_task_bins


@dataclass
class LeftOver:
    """What is not yet executed of each row's last chunk, as integers that the model would write.

    Attributes:
        integers: per row, timesteps × D, from the next answer's first timestep on.
        committed: how many of them will have been executed when the next chunk is decoded.
    """

    integers: list[list[int]]
    committed: list[int]

    def prefixes(self, longest: int) -> list[list[int]]:
        """The committed integers of each row, at most `longest`."""
        rows = zip(self.integers, self.committed, strict=True)
        return [row[: min(count, longest)] for row, count in rows]


def averaged_chunks(config: VLA0Config) -> str | None:
    """Why the chunks of a policy cannot be continued; None if they can."""
    if config.ensemble_size == 1:
        return None
    return (
        f"ensemble_size={config.ensemble_size} averages chunks, and real-time chunking continues them. Set "
        "--policy.ensemble_size=1."
    )


def warn_of_averaged_chunks(config: VLA0Config) -> bool:
    """Whether there is a reason not to continue chunks. It is logged: LeRobot only says that this kind of
    policy cannot."""
    problem = averaged_chunks(config)
    if problem:
        logging.warning(problem)
    return problem is not None


def read_left_over(
    observation: Observation,
    config: VLA0Config,
    inference_delay: int | None = None,
    prev_chunk_left_over: Tensor | None = None,
) -> LeftOver | None:
    """What LeRobot passes to `predict_action_chunk`, checked. None if there was no chunk before.

    Args:
        observation: of R rows.
        config: of the policy.
        inference_delay: timesteps that the robot will execute until the chunk is there; None is 0.
        prev_chunk_left_over: bins, (T, D) or (R, T, D), fractions allowed: timesteps that are not executed
            yet; with `use_relative_actions` normalised actions, which LeRobot has made relative to the state
            of this observation. LeRobot fills them up with rows of zeros; zeros at the end are not taken for
            actions.

    Raises:
        ValueError: another shape, numbers that are not finite, a negative delay, or an ensembling policy.
    """
    if problem := averaged_chunks(config):
        raise ValueError(problem)
    delay, chunk_size = int(inference_delay or 0), config.chunk_size
    if delay < 0 or delay != (inference_delay or 0):
        raise ValueError(f"inference_delay={inference_delay!r} must be an integer of at least 0 timesteps.")
    if 2 * delay > chunk_size:
        _warn_once(
            f"Decoding takes {delay} timesteps, and a chunk has {chunk_size}: the robot will wait for "
            f"actions. It needs a checkpoint with chunk_size={2 * delay} or more, a lower --fps, or faster "
            "decoding."
        )
    if prev_chunk_left_over is None:
        return None
    dim, rows = config.action_feature.shape[0], len(observation)
    bins = (prev_chunk_left_over[None] if prev_chunk_left_over.ndim == 2 else prev_chunk_left_over).float()
    if bins.ndim != 3 or (bins.shape[0], bins.shape[2]) != (rows, dim):
        raise ValueError(
            f"prev_chunk_left_over has shape {tuple(prev_chunk_left_over.shape)}: it must be (T, {dim}) "
            f"or ({rows}, T, {dim}), as predict_action_chunk returns."
        )
    if not bins.isfinite().all():
        raise ValueError("prev_chunk_left_over holds NaN or inf.")
    if bins.shape[1] < min(delay, chunk_size):
        _warn_once(
            f"Decoding takes {delay} timesteps, and LeRobot passes {bins.shape[1]} of the last chunk: "
            f"actions may jump between chunks. Set --inference.rtc.execution_horizon={chunk_size}."
        )
    # Timesteps up to the last one that is not all zeros.
    filled = bins[:, :chunk_size].ne(0).any(2)
    if config.use_relative_actions:
        bins = (bins + 1) / 2 * config.num_bins
    integers = to_task_bins(bins, observation.task_range, config.num_bins).round()[:, :chunk_size]
    steps = pad(filled * torch.arange(1, filled.shape[1] + 1, device=bins.device), (1, 0)).amax(1)  # (R,)
    inside = integers.clamp(0, config.num_bins)
    if (inside != integers)[filled].any():
        _warn_once(
            f"prev_chunk_left_over has bins outside 0..{config.num_bins}, which are moved to the edge."
        )
    counts = [count * dim for count in steps.tolist()]
    known = [row[:count] for row, count in zip(inside.long().flatten(1).tolist(), counts, strict=True)]
    return LeftOver(known, [min(delay * dim, count) for count in counts])


@cache
def _warn_once(text: str) -> None:
    logging.warning(text)
