"""A policy with its processors, for any Gymnasium loop: takes observations as environments return them, and
returns actions as environments take them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from lerobot.envs.utils import preprocess_observation
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.constants import OBS_IMAGE, OBS_IMAGES, OBS_STATE

from .checkpoint import load_policy_config
from .configuration_vla0 import VLA0Config
from .decoding.decoder import LOCK, Plan
from .modeling_vla0 import VLA0Policy
from .processor_vla0 import load_processors


class Agent:
    """`act(observation, task) -> action`, for one environment or a vector of them.

    An action may come from a chunk that was predicted some steps earlier, so an episode must begin with
    `reset`. In a vector that resets its environments itself, `reset(rows)` goes after the `step` that
    returned the first observations of new episodes, before the next `act`. With Gymnasium's
    `AutoresetMode.SAME_STEP` this is the step that ended the episodes; with NEXT_STEP, the default, it is the
    step after, whose action the environment ignores:

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
        self.plans: list[Plan] = []  # one per environment

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
        config = load_policy_config(pretrained_name_or_path, revision=revision)
        return cls.from_config(replace(config, device=device or config.device, **overrides), revision)

    @classmethod
    def from_config(cls, config: VLA0Config, revision: str | None = None) -> Self:
        """Loads the policy and processors of `config.pretrained_path`, as `load_policy_config` sets it."""
        path = str(config.pretrained_path)
        policy = VLA0Policy.from_pretrained(path, config=config, revision=revision)
        return cls(policy, *load_processors(config, path, revision))

    def reset(self, rows: Sequence[int] | Sequence[bool] | np.ndarray | None = None) -> None:
        """Forgets queued actions; call at the start of every episode.

        Args:
            rows: of a vector of B environments, those whose episodes begin: indices, or a boolean mask (B,);
                None for all.
        """
        if rows is None:
            self.plans = []
        elif self.plans:
            for row in np.arange(len(self.plans))[np.asarray(rows)]:
                self.plans[row] = Plan()

    @torch.inference_mode()
    def act(self, observation: dict[str, Any], task: str | Sequence[str]) -> np.ndarray:
        """The next action in the environment's units, float32 (D,), or (B, D) for a vector of environments.

        Args:
            observation: Gymnasium's usual keys, `pixels` (an image or a dict of them) and `agent_pos`, or
                LeRobot's, `observation.images.*` and `observation.state`. Images are uint8 (H, W, 3), or (B,
                H, W, 3).
            task: the instruction; for a vector of environments one per environment.

        Raises:
            ValueError: the observation is no dict, the state is missing though the policy uses it, or the
                number of tasks is not that of the images.
        """
        batch, is_vector = self._batch(observation, task)
        with LOCK:
            if len(self.plans) != len(batch["task"]):
                self.plans = [Plan() for _ in batch["task"]]
            checked = self.policy.examples.check(self.preprocess(batch))
            actions = self.postprocess(self.policy.act(checked, self.plans)).numpy()
        return actions if is_vector else actions[0]

    @torch.inference_mode()
    def act_chunk(self, observation: dict[str, Any], tasks: Sequence[str], plans: list[Plan]) -> np.ndarray:
        """The next `n_action_steps` actions of each of B environments, float32 (B, n, D). The environments
        may be others at every call, and differ in their progress.

        Args:
            observation, tasks: as for `act`, of a vector.
            plans: one per environment; an episode begins with a new one.
        """
        batch, _ = self._batch(observation, tasks)
        with LOCK:
            self.policy.predict(self.policy.examples.check(self.preprocess(batch)), plans)
            actions = torch.stack([torch.stack(list(plan.actions)) for plan in plans])
            for plan in plans:
                plan.actions.clear()
            return self.postprocess(actions).numpy()

    def _batch(self, observation: dict[str, Any], task: str | Sequence[str]) -> tuple[dict[str, Any], bool]:
        """The preprocessor's batch, and whether it is of a vector of environments."""
        if not isinstance(observation, dict):
            raise ValueError(
                f"the observation must be a dict with 'pixels', got {type(observation).__name__}. If it is "
                "the image itself (obs_type='pixels'), pass {'pixels': observation}."
            )
        pixels = observation.get("pixels", {})
        pixels = pixels if isinstance(pixels, dict) else {"": pixels}
        images = {f"{OBS_IMAGES}.{name}" if name else OBS_IMAGE: image for name, image in pixels.items()}
        images |= {key: value for key, value in observation.items() if key.startswith(OBS_IMAGE)}
        # Gymnasium's other keys under LeRobot's names, and everything with a batch axis.
        others = {k: v for k, v in observation.items() if k != "pixels" and not k.startswith("observation.")}
        batch = preprocess_observation(others)
        for key, image in images.items():  # → float (B, 3, H, W) in [0, 1]
            batch[key] = preprocess_observation({"pixels": image})[OBS_IMAGE]
        if OBS_STATE in observation:
            batch[OBS_STATE] = torch.from_numpy(np.atleast_2d(observation[OBS_STATE])).float()
        if self.policy.config.needs_state and OBS_STATE not in batch:
            raise ValueError(
                f"the policy uses the state: the observation needs 'agent_pos' (or {OBS_STATE!r}), and has "
                f"{sorted(observation)}. Make the environment with obs_type='pixels_agent_pos'."
            )
        batch["task"] = [task] if isinstance(task, str) else list(task)
        rows = {key: len(batch[key]) for key in (*images, OBS_STATE, "task") if key in batch}
        if len(set(rows.values())) > 1:
            raise ValueError(
                f"the observation has {rows} rows. A vector of B environments takes B images per camera "
                "and B tasks, for example [task] * B. Of stacked frames, pass the newest."
            )
        is_vector = any(image.ndim == 4 for image in images.values())
        return batch, is_vector
