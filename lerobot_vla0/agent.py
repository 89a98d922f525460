"""A policy with its processors, for any Gymnasium loop: takes observations as environments return them, and
returns actions as environments take them."""

import difflib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from lerobot.envs.utils import preprocess_observation
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.constants import OBS_STATE
from torch import Tensor

from .configuration_vla0 import VLA0Config
from .decoding.chunk_decoder import EpisodeState
from .modeling_vla0 import VLA0Policy
from .options import load_policy_config, override_arguments
from .processor_vla0 import load_processors


class Agent:
    """`act(observation, task) -> action`, for one environment or a vector of them.

    An action may come from a plan that was made some steps earlier, so an episode must begin with `reset`. In
    a vector that resets its environments itself, `reset(rows)` goes after the `step` that returned the first
    observations of new episodes, before the next `act`. With Gymnasium's `AutoresetMode.SAME_STEP` this is
    the step that ended the episodes; with NEXT_STEP, the default, it is the one after, whose action, planned
    from the last observation, the environment ignores:

        observation, info = envs.reset()
        agent.reset()
        ended = np.zeros(envs.num_envs, dtype=bool)
        while ...:
            observation, _, terminated, truncated, _ = envs.step(agent.act(observation, tasks))
            agent.reset(ended)  # SAME_STEP: agent.reset(terminated | truncated)
            ended = terminated | truncated

    Args:
        policy, preprocess, postprocess: from LeRobot's factories.
    """

    def __init__(
        self, policy: VLA0Policy, preprocess: PolicyProcessorPipeline, postprocess: PolicyProcessorPipeline
    ) -> None:
        self.policy, self.preprocess, self.postprocess = policy.eval(), preprocess, postprocess

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        device: str | None = None,
        revision: str | None = None,
        **overrides: Any,
    ) -> Self:
        """Loads policy and processors from a checkpoint folder or Hub repo.

        Args:
            device: "cuda", "cpu", ...; None takes the checkpoint's, or the best one where that is missing.
            overrides: fields of `VLA0Config` to change, for example n_action_steps=4.

        Raises:
            FileNotFoundError: there is no such folder or repo, or a file of the checkpoint is missing.
            TypeError: `VLA0Config` has no such field.
            ValueError: it is no VLA-0 policy, or a field is out of its range.
        """
        known = [field.name for field in fields(VLA0Config)]
        for name in overrides.keys() - set(known):
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise TypeError(
                f"{name}={overrides[name]!r}: VLA0Config has no field {name!r}. The nearest is {nearest!r}."
            )
        if device is not None:
            overrides["device"] = device
        config = load_policy_config(pretrained_name_or_path, override_arguments(overrides), revision)
        return cls.from_config(config, revision)

    @classmethod
    def from_config(cls, config: VLA0Config, revision: str | None = None) -> Self:
        """Loads policy and processors of the checkpoint that a config was read from (`load_policy_config`,
        `--policy.path`)."""
        path = str(config.pretrained_path)
        policy = VLA0Policy.from_pretrained(path, config=config, revision=revision)
        return cls(policy, *load_processors(config, path, revision))

    def reset(self, rows: Any = None) -> None:
        """Forgets queued actions; call at the start of every episode.

        Args:
            rows: of a vector of environments, those whose episodes begin: indices (a sequence or an array) or
                a boolean mask (B,); None for all.

        Raises:
            ValueError: a row that is not there, or a mask of another length.
        """
        self.policy.reset(rows)

    @torch.inference_mode()
    def act(self, observation: dict[str, Any], task: str | Sequence[str]) -> np.ndarray:
        """The next action in the environment's units, float32 (D,), or (B, D) for a vector of environments.

        Args:
            observation: Gymnasium's usual keys, `pixels` (an image or a dict of them) and `agent_pos`, or
                LeRobot's, `observation.images.*` and `observation.state`. Images are uint8 (H, W, 3), or (B,
                H, W, 3).
            task: the instruction; for a vector of environments one per environment.

        Raises:
            ValueError: the observation is no dict, images are not uint8 (H, W, 3), the state is missing
                though the policy uses it, or the number of tasks does not fit.
        """
        batch, is_vector = self._batch(observation, task)
        actions = self.postprocess(self.policy.select_action(self.preprocess(batch))).numpy()
        return actions if is_vector else actions[0]

    @torch.inference_mode()
    def act_chunk(
        self, observation: dict[str, Any], tasks: Sequence[str], episodes: list[EpisodeState]
    ) -> np.ndarray:
        """The next `n_action_steps` actions of each of B environments, float32 (B, n, D). The environments
        may be others at every call, and differ in their progress.

        Args:
            observation, tasks: as for `act`, of a vector.
            episodes: what is remembered of each environment's episode, changed here; new ones are made by
                `policy.decoder.new_episodes`.
        """
        batch, _ = self._batch(observation, tasks)
        with self.policy._lock:
            self.policy._action_queue = episodes
            actions = [self.policy.select_action(self.preprocess(batch))]  # decodes a chunk, queues the rest
            self.policy.reset()
        while episodes[0].actions:
            actions.append(torch.stack([episode.actions.popleft() for episode in episodes]))
        return self.postprocess(torch.stack(actions, dim=1)).numpy()

    def _batch(self, observation: dict[str, Any], task: str | Sequence[str]) -> tuple[dict[str, Any], bool]:
        """The preprocessor's batch, and whether it is of a vector of environments."""
        if not isinstance(observation, dict):
            raise ValueError(
                f"the observation must be a dict with 'pixels', got {type(observation).__name__}. If it is "
                "the image itself (obs_type='pixels'), pass {'pixels': observation}."
            )
        pixels = observation.get("pixels", {})
        if isinstance(pixels, dict):
            images = {f"observation.images.{name}": image for name, image in pixels.items()}
        else:
            images = {"observation.image": pixels}
        named = {key: value for key, value in observation.items() if key.startswith("observation.")}
        images |= {key: value for key, value in named.items() if key.startswith("observation.image")}
        for key, image in images.items():
            good = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (3, 4)
            if not good or image.shape[-1] != 3:
                raise ValueError(
                    f"image {key.removeprefix('observation.images.')!r} must be a uint8 array (H, W, 3) or "
                    f"(B, H, W, 3), got {getattr(image, 'dtype', type(image).__name__)} "
                    f"{getattr(image, 'shape', '')}."
                )
        # Gymnasium's other keys under LeRobot's names, and everything with a batch axis.
        batch = preprocess_observation({k: v for k, v in observation.items() if k not in (*named, "pixels")})
        for key in named.keys() - images.keys():
            batch[key] = torch.from_numpy(np.atleast_2d(named[key])).float()
        for key, image in images.items():  # → float (B, 3, H, W) in [0, 1]
            batch[key] = preprocess_observation({"pixels": image})["observation.image"]
        is_vector = any(image.ndim == 4 for image in images.values())
        batch["task"] = _tasks(task, {key: len(batch[key]) for key in images} if is_vector else {})
        config = self.policy.config
        if config.needs_state:
            why = "use_state" if config.use_state else "use_relative_actions"
            _check_state(batch.get(OBS_STATE), len(batch["task"]), sorted(observation), why)
        return batch, is_vector


def _tasks(task: str | Sequence[str], rows: dict[str, int]) -> list[str]:
    """One instruction per row, of which each camera has `rows`; {} for a single environment."""
    tasks = [task] if isinstance(task, str) else task
    if not isinstance(tasks, Sequence | np.ndarray) or not all(isinstance(text, str) for text in tasks):
        raise ValueError(f"task={task!r} must be the instruction, or one per environment of a vector.")
    if len({len(tasks), *(rows or {"": 1}).values()}) != 1:
        found = ", ".join(f"{n} of {key}" for key, n in rows.items()) or "those of one environment"
        raise ValueError(
            f"the images are {found}, and there is {len(tasks)} task ({list(tasks)[:3]}). A vector of B "
            "environments takes B images per camera and B tasks, for example [task] * B. Stacked frames of "
            "one environment cannot be shown: pass the newest."
        )
    return list(tasks)


def _check_state(state: Tensor | None, rows: int, present: list[str], why: str) -> None:
    if state is None:
        raise ValueError(
            f"{why}=True needs 'agent_pos' (or {OBS_STATE!r}), and the observation has {present}. Make "
            "the environment with it, for example obs_type='pixels_agent_pos'."
        )
    if state.ndim != 2 or len(state) != rows:
        raise ValueError(f"'agent_pos' must have {rows} rows, one per environment, got {tuple(state.shape)}.")
