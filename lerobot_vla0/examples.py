"""Batch of LeRobot → the VLM's inputs, and the labels it learns: one place for acting and both trainers.

Holds no weights, so that a data loader's worker can have a copy.
"""

import logging
import random
from dataclasses import dataclass
from typing import Any

import torch
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from .action_text import ActionCodec
from .chat import ChatFormatter
from .configuration_vla0 import VLA0Config, check_joints
from .dataset import ORIGIN, TASK_RANGE
from .families import family
from .images import cut_out, fitted, prepare_images


def augmentation_generator() -> torch.Generator:
    """Generator of one batch's augmentation, seeded by one draw from Python's global generator plus the rank.

    LeRobot checkpoints the global generators, so a resumed run repeats the draws; PyTorch's is one draw off
    after resuming, because a data loader takes one when it starts. All ranks are seeded alike and would draw
    the same augmentations.
    """
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    return torch.Generator().manual_seed(random.getrandbits(62) + rank)


@dataclass
class Observation:
    """What the model sees of a batch of B rows."""

    cameras: list[Tensor]  # float (B, 3, H, W) in [0, 1], in prompt order; sizes may differ
    tasks: list[str]
    state: Tensor | None = None  # (B, S), normalised to [-1, 1]; None if the policy does not use it
    task_range: Tensor | None = None  # (B, 2, D), see dataset.TASK_RANGE; None with action_norm="dataset"
    origin: Tensor | None = None  # (B, D), dataset.ORIGIN in bins; None where actions are absolute

    def __len__(self) -> int:
        return len(self.tasks)

    def take(self, rows: list[int]) -> "Observation":
        """These rows only."""
        tensors = (self.state, self.task_range, self.origin)
        return Observation(
            [images[rows] for images in self.cameras],
            [self.tasks[row] for row in rows],
            *(None if tensor is None else tensor[rows] for tensor in tensors),
        )


class ExampleMaker:
    """Pictures and chat of a batch, as the policy's config wants them.

    Batches come from the preprocessor: images float (B, 3, H, W) in [0, 1] under `config.camera_keys`, `task`
    a list of B instructions, `action` (training) int64 bins (B, chunk_size, D) in 0..num_bins.

    Args:
        config: with `input_features` and `output_features` filled in.
        vlm_processor: the VLM's Transformers processor.
    """

    def __init__(self, config: VLA0Config, vlm_processor: Any) -> None:
        self.config, self.vlm_processor = config, vlm_processor
        self.family = family(vlm_processor)
        self.rule = self.family.picture_rule(vlm_processor)
        size, tiled, cameras = config.image_size, config.tile_images, len(config.camera_keys)
        multiple = self.rule.multiple
        if size % multiple or (self.rule.fixed and size != self.rule.fixed):
            nearest = self.rule.fixed or max(1, round(size / multiple)) * multiple
            raise ValueError(f"image_size={size} does not fit this VLM's patches. Set it to {nearest}.")
        if self.rule.square and tiled and cameras > 1:
            raise ValueError(
                f"tile_images=True puts {cameras} cameras side by side, and this VLM takes square pictures "
                "only. Set tile_images=false: one picture per camera."
            )
        self.action_dim = config.action_feature.shape[0]
        picture_size = size, size * (cameras if tiled else 1)  # (height, width)
        mark, text = self.family.picture_text(vlm_processor, *picture_size)
        self.chat = ChatFormatter(
            vlm_processor,
            horizon=config.chunk_size,
            dim=self.action_dim,
            num_bins=config.num_bins,
            num_pictures=1 if tiled else cameras,
            picture_size=picture_size,
            picture_mark=mark,
            picture_text=text,
            add_vision_id=config.add_vision_id,
        )
        self.codec = ActionCodec(config.num_bins)
        self._logged: set[str] = set()

    def _log_once(self, level: int, text: str) -> None:
        if text not in self._logged:
            self._logged.add(text)
            logging.log(level, text)

    def check(self, batch: dict[str, Any]) -> Observation:
        """What the model sees of a batch."""
        config, cameras = self.config, self._cameras(batch)
        rows = len(cameras[0])
        state = batch.get(OBS_STATE)
        if isinstance(state, Tensor) and state.ndim == 2:
            check_joints(config, state.shape[1])
        if config.use_state and state is not None and tuple(config.robot_state_feature.shape) == (1,):
            state = state.reshape(-1, 1)  # LeRobot's data have (B,), which its preprocessor takes for one row
        if config.use_state and (state is None or state.ndim != 2 or len(state) != rows):
            shape = None if state is None else tuple(state.shape)
            raise ValueError(
                f"use_state=True needs {OBS_STATE!r} of shape ({rows}, S) in the batch, got {shape}."
            )
        by_task, relative = config.action_norm == "task", config.use_relative_actions
        for key in [TASK_RANGE] * by_task + [ORIGIN] * relative:
            if key not in batch:
                raise ValueError(
                    f"the batch has no {key!r}: pass it, with its task and {OBS_STATE}, through the policy's "
                    "preprocessor first."
                )
        return Observation(
            cameras,
            self._tasks(batch.get("task"), rows),
            state if config.use_state else None,
            batch[TASK_RANGE] if by_task else None,
            batch[ORIGIN] * (config.num_bins / 2) if relative else None,
        )

    def _cameras(self, batch: dict[str, Any]) -> list[Tensor]:
        config, keys = self.config, self.config.camera_keys
        missing = [key for key in keys if key not in batch]
        if len(missing) > config.most_missing_cameras:
            present = sorted(key for key in batch if key.startswith("observation.image"))
            raise ValueError(
                f"the batch lacks the camera images {missing}; it has {present}. Rename cameras with "
                "--rename_map, train on the cameras that the robot or environment has (--policy.cameras), or "
                f"show black pictures instead (--policy.empty_cameras={len(missing)}, at most all but one)."
            )
        if missing:
            empty = f"empty_cameras={config.empty_cameras}"
            self._log_once(
                logging.WARNING, f"{missing} are missing: the model sees black pictures ({empty})."
            )
        present = {key: batch[key] for key in keys if key not in missing}
        for key, images in present.items():
            if not isinstance(images, Tensor) or not images.is_floating_point() or images.shape[1:-2] != (3,):
                raise ValueError(
                    f"{key} must be a float tensor (B, 3, H, W) in [0, 1], got "
                    f"{getattr(images, 'dtype', None)} {tuple(images.shape)}. Depth and grey cameras cannot "
                    "be used (--policy.cameras)."
                )
            self._check_size(key, images)
        black = torch.zeros_like(next(iter(present.values())))
        return [cut_out(present.get(key, black), config.camera_regions.get(key)) for key in keys]

    def _check_size(self, key: str, images: Tensor) -> None:
        config = self.config
        (h, w), (to_h, to_w) = self._fitted(images)
        if (h < to_h or w < to_w) and not self.rule.fixed:
            side = max(h, w) if config.image_fit == "letterbox" else min(h, w)
            raise ValueError(
                f"{key} is {'×'.join(map(str, images.shape[-2:]))} pixels, {h}×{w} after the crop "
                f"(crop_ratio={config.crop_ratio}, image_fit={config.image_fit}): smaller than the "
                f"{to_h}×{to_w} of image_size={config.image_size}. Lower image_size to "
                f"{side // self.rule.multiple * self.rule.multiple}, or raise crop_ratio."
            )

    def _fitted(self, images: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
        ratio, fit = self.config.crop_ratio, self.config.image_fit
        return fitted(*images.shape[-2:], size=self.config.image_size, crop_ratio=ratio, fit=fit)

    def _tasks(self, task: Any, rows: int) -> list[str]:
        """One instruction per row; the default where there is none."""
        default = self.config.default_task
        tasks = [""] * rows if task is None else [task] if isinstance(task, str) else list(task)
        if len(tasks) != rows or not all(isinstance(task, str) for task in tasks):
            raise ValueError(
                f"batch['task'] must be one instruction for each of {rows} rows, got {tasks[:3]}."
            )
        if all(task.strip() for task in tasks):
            return tasks
        if default is None:
            raise ValueError(
                "an instruction is blank or missing (LeRobot's PushT has none, for example). Pass "
                "batch['task'], or set the one of the training data: --policy.default_task='...'"
            )
        self._log_once(
            logging.INFO, f"observations without an instruction: the model sees default_task={default!r}."
        )
        return [task if task.strip() else default for task in tasks]

    def pictures(self, observation: Observation, generator: torch.Generator | None) -> Tensor:
        """uint8 (B, N, 3, H, W) of N pictures per row, augmented if a generator is passed."""
        config = self.config
        for key, images in zip(config.camera_keys, observation.cameras, strict=True):
            if generator is not None and key in self._logged:
                continue
            low, high = torch.stack(images.aminmax()).tolist()
            if not (low >= 0 and high <= 1):  # with a NaN, both are NaN
                raise ValueError(
                    f"{key} has values from {low:g} to {high:g}: they must be finite and in [0, 1]. Divide "
                    "bytes by 255."
                )
            if generator is not None:
                self._logged.add(key)
                (h, w), (to_h, to_w) = self._fitted(images)
                part = " of its camera_regions" if key in config.camera_regions else ""
                logging.info(
                    f"{key}: {images.shape[-2]}×{images.shape[-1]} pixels{part}, of which {h}×{w} remain "
                    f"and become {to_h}×{to_w} (crop_ratio={config.crop_ratio}, "
                    f"image_fit={config.image_fit}, image_size={config.image_size})"
                )
        return prepare_images(
            observation.cameras,
            size=config.image_size,
            crop_ratio=config.crop_ratio,
            tile=config.tile_images,
            rule=config.picture_rule,
            fit=config.image_fit,
            jitter=config.jitter,
            generator=generator,
        )

    def instructions(self, observation: Observation) -> list[str]:
        """B instructions, each followed by the state as integers if the policy uses it."""
        if observation.state is None:
            return observation.tasks
        bins, _ = self.codec.encode(observation.state, OBS_STATE)
        states = map(self.codec.to_text, bins)
        return [f"{task}\nState: {state}" for task, state in zip(observation.tasks, states, strict=True)]

    def acting_inputs(self, observation: Observation) -> dict[str, Tensor]:
        """Model inputs of right-padded prompts, without an answer and without augmentation."""
        tokens = self.chat.inference_batch(self.instructions(observation))
        return self._inputs(self.pictures(observation, None), tokens)

    def training_examples(
        self, batch: dict[str, Any], generator: torch.Generator | None
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Examples of supervised fine-tuning: (model inputs, labels (B, T), place values (B, T)), on the
        images' device.

        Args:
            batch: see the class; with `action_is_pad` (B, chunk_size) if `do_mask_loss_for_padding`.
            generator: CPU generator of the augmentation (crop, jitter, `?`); None leaves it out.
        """
        observation, bins = self.check(batch), batch[ACTION]
        expected = (self.config.chunk_size, self.action_dim)
        if bins.is_floating_point() or tuple(bins.shape[1:]) != expected:
            raise ValueError(
                f"action must be integer bins of shape (B, {expected[0]}, {expected[1]}), got {bins.dtype} "
                f"of shape {tuple(bins.shape)}. Pass the batch through the policy's preprocessor first."
            )
        pictures = self.pictures(observation, generator)
        tokens = self.chat.training_batch(
            self.instructions(observation),
            bins,
            padded_steps=batch.get(f"{ACTION}_is_pad") if self.config.do_mask_loss_for_padding else None,
            mask_prob=self.config.action_mask_prob,
            mask_skip_prob=self.config.action_mask_skip_prob,
            generator=generator,
        )
        device = pictures.device
        return self._inputs(pictures, tokens), tokens["labels"].to(device), tokens["places"].to(device)

    def _inputs(self, pictures: Tensor, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = {key: tokens[key].to(pictures.device) for key in ("input_ids", "attention_mask")}
        return inputs | self.family.vision_inputs(self.vlm_processor, pictures, inputs["input_ids"])
