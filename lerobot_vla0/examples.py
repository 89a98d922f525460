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

from . import backbone
from .action_codec import ActionCodec
from .config_types import check_joints
from .configuration_vla0 import VLA0Config
from .images import cut_out, fitted, prepare_images
from .prompt import ChatFormatter
from .relative import ORIGIN
from .task_stats import TASK_RANGE

MAX_INTEGERS = 8192  # of a prediction: far beyond any use. What a file asks for must not fill the memory.


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
    """A batch that has been checked: what the model looks at, B rows."""

    cameras: list[Tensor]  # float (B, 3, H, W) in [0, 1], in prompt order; sizes may differ
    tasks: list[str]
    state: Tensor | None  # (B, S), normalised to [-1, 1]; None if the policy does not use it
    task_range: Tensor | None  # (B, 2, D), see task_stats.TASK_RANGE; None with action_norm="dataset"
    origin: Tensor | None = None  # (B, D), relative.ORIGIN in bins; None where actions are absolute

    def __len__(self) -> int:
        return len(self.tasks)

    def take(self, rows: list[int]) -> "Observation":
        """These rows only."""
        return Observation(
            [images[rows] for images in self.cameras],
            [self.tasks[row] for row in rows],
            None if self.state is None else self.state[rows],
            None if self.task_range is None else self.task_range[rows],
            None if self.origin is None else self.origin[rows],
        )


def _instructions(task: Any, rows: int, default: str | None) -> tuple[list[str], bool]:
    """(one instruction per row, whether one of them is the default)."""
    if task is None and default is None:
        raise ValueError(
            "the batch has no 'task': VLA-0 needs one instruction per row. Use a data set whose "
            "episodes have tasks, or add batch['task'] = [instruction, ...]."
        )
    tasks = [""] * rows if task is None else [task] if isinstance(task, str) else list(task)
    if not all(isinstance(task, str) for task in tasks):
        raise ValueError(f"'task' must be one instruction per row, each a string, got {tasks[:3]}.")
    if len(tasks) != rows:
        raise ValueError(f"the batch has {rows} images but {len(tasks)} tasks: {tasks[:3]}.")
    is_blank = [not task.strip() for task in tasks]
    if any(is_blank) and default is None:
        raise ValueError(
            "an instruction is blank (LeRobot's PushT gives none, for example), and the policy has no "
            "default. Give it the one of the training data: --policy.default_task='...'"
        )
    return [default if b else task for task, b in zip(tasks, is_blank, strict=True)], any(is_blank)


class ExampleMaker:
    """Pictures and chat of a batch, as the policy's config wants them.

    Batches come from the preprocessor: images float (B, 3, H, W) in [0, 1] under `config.camera_keys`, `task`
    a list of B instructions, `action` (training) int64 bins (B, chunk_size, D) in 0..num_bins.

    Args:
        config: with `input_features` and `output_features` filled in.
        vlm_processor: the VLM's Transformers processor.

    Raises:
        ValueError: `image_size` or `tile_images` makes pictures that the VLM would resize or refuse, a
            prediction has too many integers, or the tokenizer does not write numbers digit by digit.
    """

    def __init__(self, config: VLA0Config, vlm_processor: Any) -> None:
        self.config, self.vlm_processor = config, vlm_processor
        self.family = backbone.family(vlm_processor)
        self.rule = self.family.picture_rule(vlm_processor)
        multiple, fixed = self.rule.multiple, self.rule.fixed
        if fixed and config.image_size != fixed:
            raise ValueError(
                f"image_size={config.image_size} does not fit this VLM, which sees {fixed}×{fixed} pixels "
                f"only (smaller cameras are enlarged). Set image_size={fixed}."
            )
        if config.image_size % multiple:
            raise ValueError(
                f"image_size={config.image_size} must be a multiple of {multiple} for this VLM, for example "
                f"{max(1, round(config.image_size / multiple)) * multiple}."
            )
        tiled, cameras = config.tile_images, len(config.camera_keys)
        if self.rule.square and tiled and cameras > 1:
            raise ValueError(
                f"tile_images=True puts {cameras} cameras side by side, and this VLM takes square pictures "
                "only. Set tile_images=false: one picture per camera."
            )
        self.action_dim = config.action_feature.shape[0]
        count = config.chunk_size * self.action_dim
        if not 1 <= count <= MAX_INTEGERS:
            raise ValueError(
                f"chunk_size={config.chunk_size} times {self.action_dim} dimensions of the action are "
                f"{count} integers: there must be 1..{MAX_INTEGERS} in a prediction. Lower chunk_size."
            )
        height, width = config.image_size, config.image_size * (cameras if tiled else 1)
        mark, text = self.family.picture_text(vlm_processor, height, width)
        self.chat = ChatFormatter(
            vlm_processor,
            horizon=config.chunk_size,
            dim=self.action_dim,
            num_bins=config.num_bins,
            num_pictures=1 if tiled else cameras,
            picture_size=(height, width),
            picture_mark=mark,
            picture_text=text,
            add_vision_id=config.add_vision_id,
        )
        self.codec = ActionCodec(config.num_bins)
        self._missing: list[str] = []  # cameras of the last warning
        self._is_default_shown = False
        self._trained_on: set[str] = set()  # cameras whose first batch has been checked

    def check(self, batch: dict[str, Any]) -> Observation:
        """The part of a batch that the model looks at, checked.

        Raises:
            ValueError: a camera, the instructions or the state are missing or of a wrong shape; or
                `config_types.check_joints`.
        """
        config, keys = self.config, self.config.camera_keys
        missing = [key for key in keys if key not in batch]
        if len(missing) > config.most_missing_cameras:
            present = sorted(key for key in batch if key.startswith("observation.image"))
            raise ValueError(
                f"the batch lacks the camera images {missing}; it has {present}. Rename cameras with "
                "--rename_map, train on the cameras that the robot or environment has (--policy.cameras), or "
                f"show black pictures instead (--policy.empty_cameras={len(missing)}, at most all but one)."
            )
        keys = [key for key in keys if key not in missing]
        for key in keys:
            self._check_images(key, batch[key])
        if missing and missing != self._missing:
            self._missing = missing
            logging.warning(
                f"the cameras {missing} are not there: the model sees black pictures "
                f"(empty_cameras={config.empty_cameras})."
            )
        pictures = {**batch, **{key: torch.zeros_like(batch[keys[0]]) for key in missing}}
        tasks, is_default = _instructions(batch.get("task"), len(batch[keys[0]]), config.default_task)
        if is_default and not self._is_default_shown:
            self._is_default_shown = True
            shown = config.default_task
            logging.info(f"the observations have no instruction: the model sees default_task={shown!r}.")
        if config.use_state and OBS_STATE not in batch:
            raise ValueError(
                f"the batch has no {OBS_STATE!r}, which use_state=True puts into the prompt; it has "
                f"{sorted(key for key in batch if key.startswith('observation'))}."
            )
        if isinstance(batch.get(OBS_STATE), Tensor) and batch[OBS_STATE].ndim == 2:
            check_joints(config, batch[OBS_STATE].shape[1])
        state = batch[OBS_STATE] if config.use_state else None
        if isinstance(state, Tensor) and tuple(config.robot_state_feature.shape) == (1,):
            state = state.reshape(-1, 1)  # LeRobot's data have (B,), which its preprocessor takes for one row
        rows = len(tasks)
        if config.use_state and (not isinstance(state, Tensor) or state.ndim != 2 or len(state) != rows):
            raise ValueError(
                f"{OBS_STATE} must be a float tensor ({rows}, S), got {type(state).__name__} of shape "
                f"{tuple(getattr(state, 'shape', ()))}."
            )
        by_task = config.action_norm == "task"
        if by_task and TASK_RANGE not in batch:
            raise ValueError(
                f"the batch has no {TASK_RANGE!r}, by which action_norm='task' reads integers. Pass the "
                "batch through the policy's preprocessor first."
            )
        if config.use_relative_actions and ORIGIN not in batch:
            raise ValueError(
                f"the batch has no {ORIGIN!r}, which use_relative_actions=True needs. Pass the batch, with "
                f"{OBS_STATE!r}, through the policy's preprocessor first."
            )
        return Observation(
            [cut_out(pictures[key], config.camera_regions.get(key)) for key in config.camera_keys],
            tasks,
            state,
            batch[TASK_RANGE] if by_task else None,
            batch[ORIGIN] * (config.num_bins / 2) if config.use_relative_actions else None,
        )

    def _check_images(self, key: str, images: Any) -> None:
        config = self.config
        good = isinstance(images, Tensor) and images.is_floating_point() and images.ndim == 4
        if not good or images.shape[1] != 3:
            kind, shape = getattr(images, "dtype", type(images).__name__), getattr(images, "shape", ())
            hint = ""
            if good and images.shape[1] <= 4:
                hint = " A depth or grey camera cannot be shown: choose the others with --policy.cameras."
            raise ValueError(
                f"{key} must be a float tensor (B, 3, H, W) in [0, 1], got {kind} of shape {tuple(shape)}"
                f"{'' if isinstance(images, Tensor) else f' ({type(images).__name__})'}.{hint}"
            )
        height, width = images.shape[-2:]
        (h, w), (to_h, to_w) = self._fitted(images)
        if (h < to_h or w < to_w) and not self.rule.fixed:
            side = max(h, w) if config.image_fit == "letterbox" else min(h, w)
            fits = side // self.rule.multiple * self.rule.multiple
            raise ValueError(
                f"{key} is {height}×{width} pixels, {h}×{w} after the crop (crop_ratio={config.crop_ratio}, "
                f"image_fit={config.image_fit}): smaller than the {to_h}×{to_w} of image_size="
                f"{config.image_size}, it would have to be enlarged. Lower image_size"
                f"{f' to {fits}' if fits else ''}, or raise crop_ratio."
            )

    def _fitted(self, images: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
        config = self.config
        return fitted(
            *images.shape[-2:], size=config.image_size, crop_ratio=config.crop_ratio, fit=config.image_fit
        )

    def _check_range(self, key: str, images: Tensor) -> None:
        low, high = torch.stack(images.aminmax()).tolist()
        if not (low >= 0 and high <= 1):  # with a NaN, both are NaN
            raise ValueError(
                f"{key} has values from {low:g} to {high:g}: they must be finite and in [0, 1]. Divide "
                "bytes by 255."
            )

    def pictures(self, observation: Observation, generator: torch.Generator | None) -> Tensor:
        """uint8 (B, N, 3, H, W) of N pictures per row, augmented if a generator is given.

        Raises:
            ValueError: an image is not finite or not in [0, 1]: looked for when nothing is augmented, as in
                acting, and in the first batch that is.
        """
        config = self.config
        for key, images in zip(config.camera_keys, observation.cameras, strict=True):
            if generator is None:
                self._check_range(key, images)
            elif key not in self._trained_on:
                self._check_range(key, images)
                self._trained_on.add(key)
                (h, w), (to_h, to_w) = self._fitted(images)
                part = " of its camera_regions" if key in config.camera_regions else ""
                logging.info(
                    f"{key}: {images.shape[-2]}×{images.shape[-1]} pixels{part}, of which {h}×{w} are kept "
                    f"and become {to_h}×{to_w} (crop_ratio={config.crop_ratio}, "
                    f"image_fit={config.image_fit}, image_size={config.image_size})"
                )
        return prepare_images(
            observation.cameras,
            size=config.image_size,
            crop_ratio=config.crop_ratio,
            tile=config.tile_images,
            antialias=config.resize_antialias,
            crop_rounding=config.crop_rounding,
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

        Raises:
            ValueError: as `check`, or actions that are no bins (B, chunk_size, D).
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
