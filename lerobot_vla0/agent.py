"""A policy with its processors, for any Gymnasium loop: takes observations as environments return them, and
returns actions as environments take them."""

from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.envs.utils import preprocess_observation
from lerobot.processor import PolicyProcessorPipeline

from .modeling_vla0 import VLA0Policy
from .processor_vla0 import load_processors


class Agent:
    """`act(observation, task) -> action`, for one environment or a vector of them.

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
        """
        if device is not None:
            overrides["device"] = device
        arguments = [f"--{name}={value}" for name, value in overrides.items()]
        config = PreTrainedConfig.from_pretrained(
            pretrained_name_or_path, revision=revision, cli_overrides=arguments
        )
        policy = VLA0Policy.from_pretrained(pretrained_name_or_path, config=config, revision=revision)
        return cls(policy, *load_processors(config, pretrained_name_or_path, revision))

    def reset(self, rows: list[int] | None = None) -> None:
        """Forgets queued actions; call at the start of every episode. `rows`: of a vector of environments,
        those whose episodes begin; None for all."""
        self.policy.reset(rows)

    @torch.inference_mode()
    def act(self, observation: dict[str, Any], task: str | list[str]) -> np.ndarray:
        """The next action in the environment's units, float32 (D,), or (B, D) for a vector of environments.

        Args:
            observation: Gymnasium's usual keys, `pixels` (an image or a dict of them) and `agent_pos`, or
                LeRobot's, `observation.images.*` and `observation.state`. Images are uint8 (H, W, 3), or (B,
                H, W, 3).
            task: the instruction, or one per environment.

        Raises:
            ValueError: images that are not uint8 (H, W, 3), or a number of tasks that does not fit.
        """
        pixels = observation.get("pixels", {})
        if isinstance(pixels, dict):
            images = {f"observation.images.{name}": image for name, image in pixels.items()}
        else:
            images = {"observation.image": pixels}
        named = {key: value for key, value in observation.items() if key.startswith("observation.")}
        images |= {key: value for key, value in named.items() if key.startswith("observation.image")}
        for key, image in images.items():
            if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[-1] != 3:
                raise ValueError(
                    f"image {key.removeprefix('observation.images.')!r} must be a uint8 array (H, W, 3) or "
                    f"(B, H, W, 3), got {getattr(image, 'dtype', type(image).__name__)} "
                    f"{getattr(image, 'shape', '')}."
                )
        # Gymnasium's other keys under LeRobot's names, and everything with a batch axis.
        batch = preprocess_observation({k: v for k, v in observation.items() if k not in (*named, "pixels")})
        for key in named.keys() - images.keys():
            batch[key] = torch.from_numpy(np.atleast_2d(named[key])).float()
        batched = any(image.ndim == 4 for image in images.values())
        for key, image in images.items():  # → float (B, 3, H, W) in [0, 1]
            batch[key] = preprocess_observation({"pixels": image})["observation.image"]
        rows = len(next(iter(images.values()))) if batched else 1
        batch["task"] = [task] * rows if isinstance(task, str) else list(task)
        actions = self.postprocess(self.policy.select_action(self.preprocess(batch))).numpy()
        return actions if batched else actions[0]
