"""Real-time chunking (Black et al., "Real-Time Execution of Action Chunking Flow Policies", 2025) for a
policy that writes text: the robot executes the last chunk while the next one is decoded. The timesteps that
it executes meanwhile are the beginning of the next answer, which the model continues.

LeRobot's side is `lerobot/rollout/inference/rtc.py` (`lerobot-rollout --inference.type=rtc`).
"""

import logging
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..configuration_vla0 import VLA0Config
from ..dataset import to_task_bins
from ..examples import Observation


@dataclass
class Committed:
    """The rest of each row's last chunk, as integers that the model would write.

    Attributes:
        integers: per row, timesteps × D, from the next answer's first timestep on.
        counts: per row, how many of them are executed while the next chunk is decoded.
    """

    integers: list[list[int]]
    counts: list[int]

    def prefixes(self, longest: int) -> list[list[int]]:
        """The integers of each row that are executed meanwhile, at most `longest`."""
        rows = zip(self.integers, self.counts, strict=True)
        return [row[: min(count, longest)] for row, count in rows]


def warn_of_averaged_chunks(config: VLA0Config) -> bool:
    """Whether the policy averages chunks, which cannot be continued. The reason is logged, since LeRobot only
    says that this kind of policy does not support real-time chunking."""
    if config.ensemble_size > 1:
        logging.warning(
            f"ensemble_size={config.ensemble_size} averages chunks, and real-time chunking continues them. "
            "Set --policy.ensemble_size=1."
        )
    return config.ensemble_size > 1


def read_left_over(
    observation: Observation,
    config: VLA0Config,
    inference_delay: int | None = None,
    prev_chunk_left_over: Tensor | None = None,
) -> Committed | None:
    """Converts what LeRobot passes to `predict_action_chunk`. None if there was no chunk before.

    Args:
        observation: of R rows.
        config: of the policy.
        inference_delay: timesteps that the robot executes while the chunk is decoded; None is 0.
        prev_chunk_left_over: timesteps that are not executed yet, as bins (T, D) or (R, T, D), fractions
            allowed; with `use_relative_actions` in [-1, 1], relative to the state of this observation.
            LeRobot appends rows of zeros, so zeros at the end are no actions.
    """
    delay, chunk_size, dim = inference_delay or 0, config.chunk_size, config.action_feature.shape[0]
    if 2 * delay > chunk_size:
        _warn_once(
            f"Decoding takes {delay} timesteps, and a chunk has {chunk_size}: the robot will wait for "
            f"actions. Use a checkpoint with chunk_size={2 * delay} or more, or a lower --fps."
        )
    if prev_chunk_left_over is None:
        return None
    bins = prev_chunk_left_over.float()
    bins = bins[None] if bins.ndim == 2 else bins
    if (len(bins), bins.shape[-1]) != (len(observation), dim) or not bins.isfinite().all():
        raise ValueError(
            f"prev_chunk_left_over must be finite, of shape (T, {dim}) or ({len(observation)}, T, {dim}), as "
            f"predict_action_chunk returns; got {tuple(prev_chunk_left_over.shape)}."
        )
    if bins.shape[1] < min(delay, chunk_size):
        _warn_once(
            f"Decoding takes {delay} timesteps, and LeRobot passes {bins.shape[1]} of the last chunk: "
            f"actions may jump between chunks. Set --inference.rtc.execution_horizon={chunk_size}."
        )
    bins = bins[:, :chunk_size]
    # Timesteps up to the last one that is not all zeros, (R,).
    filled = bins.ne(0).any(2)
    steps = pad(filled * torch.arange(1, filled.shape[1] + 1, device=bins.device), (1, 0)).amax(1)
    if config.use_relative_actions:
        bins = (bins + 1) / 2 * config.num_bins
    bins = to_task_bins(bins, observation.task_range, config.num_bins).round().clamp(0, config.num_bins)
    counts = [count * dim for count in steps.tolist()]
    integers = [row[:count] for row, count in zip(bins.long().flatten(1).tolist(), counts, strict=True)]
    return Committed(integers, [min(delay * dim, count) for count in counts])


@cache
def _warn_once(text: str) -> None:
    logging.warning(text)
