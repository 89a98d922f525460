"""Batch of LeRobot → what the VLM is fed, and the labels it learns: one place for acting and both trainers.

Holds no weights, so that a data loader's worker can have a copy.
"""

from typing import Any

import torch
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from .action_codec import ActionCodec
from .configuration_vla0 import VLA0Config
from .families import family
from .images import prepare_images
from .prompt import ChatFormatter


class ExampleMaker:
    """Pictures and chat of a batch, as the policy's config wants them.

    Batches come from the preprocessor: images float (B, 3, H, W) in [0, 1] under `config.camera_keys`, `task`
    a list of B instructions, `action` (training) int64 bins (B, chunk_size, D) in 0..num_bins.

    Args:
        config: with `input_features` and `output_features` filled in.
        vlm_processor: the VLM's Transformers processor.

    Raises:
        ValueError: `image_size` or `tile_images` makes pictures that the VLM cannot be shown as they are, or
            the tokenizer does not write numbers digit by digit.
    """

    def __init__(self, config: VLA0Config, vlm_processor: Any) -> None:
        self.config, self.vlm_processor = config, vlm_processor
        self.rule = family(vlm_processor).picture_rule(vlm_processor)
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
        self.chat = ChatFormatter(
            vlm_processor,
            horizon=config.chunk_size,
            dim=self.action_dim,
            num_bins=config.num_bins,
            num_pictures=1 if tiled else cameras,
            picture_size=(config.image_size, config.image_size * (cameras if tiled else 1)),
            add_vision_id=config.add_vision_id,
        )
        self.codec = ActionCodec(config.num_bins)

    def rows(self, batch: dict[str, Any]) -> int:
        """B, of a batch that has the cameras and instructions it needs."""
        missing = [key for key in self.config.camera_keys if key not in batch]
        if missing:
            present = sorted(key for key in batch if key.startswith("observation.image"))
            raise ValueError(
                f"the batch lacks the camera images {missing}; it has {present}. Rename cameras with "
                "--rename_map, or train on the cameras that the robot or environment has "
                "(--policy.cameras)."
            )
        if "task" not in batch:
            raise ValueError(
                "the batch has no 'task': VLA-0 needs one instruction per row. Use a data set whose "
                "episodes have tasks, or add batch['task'] = [instruction, ...]."
            )
        return len(batch[self.config.camera_keys[0]])

    def pictures(self, batch: dict[str, Any], generator: torch.Generator | None) -> Tensor:
        """uint8 (B, N, 3, H, W) from the batch's camera images, augmented if a generator is given."""
        config, keys = self.config, self.config.camera_keys
        self.rows(batch)
        for key in keys:
            if batch[key].ndim != 4 or batch[key].shape[1] != 3 or not batch[key].is_floating_point():
                raise ValueError(
                    f"{key} must be a float tensor (B, 3, H, W) in [0, 1], got {batch[key].dtype} of shape "
                    f"{tuple(batch[key].shape)}."
                )
            if min(batch[key].shape[-2:]) < config.image_size and not self.rule.fixed:
                raise ValueError(
                    f"{key} is {batch[key].shape[-2]}×{batch[key].shape[-1]} pixels, smaller than the crop "
                    f"of image_size={config.image_size}: it would have to be enlarged. Lower image_size."
                )
        return prepare_images(
            [batch[key] for key in keys],
            size=config.image_size,
            crop_ratio=config.crop_ratio,
            tile=config.tile_images,
            antialias=config.resize_antialias,
            jitter=config.jitter,
            generator=generator,
        )

    def instructions(self, batch: dict[str, Any]) -> list[str]:
        """B instructions, with the state behind them if `use_state`."""
        rows = self.rows(batch)
        tasks = [batch["task"]] if isinstance(batch["task"], str) else list(batch["task"])
        if len(tasks) != rows:
            raise ValueError(f"the batch has {rows} images but {len(tasks)} tasks: {tasks[:3]}.")
        if self.config.use_state:
            bins, _ = self.codec.encode(batch[OBS_STATE])
            tasks = [f"{t}\nState: {self.codec.to_text(b)}" for t, b in zip(tasks, bins, strict=True)]
        return tasks

    def acting_inputs(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Model inputs of right-padded prompts, without an answer and without augmentation."""
        return self._inputs(self.pictures(batch, None), self.chat.inference_batch(self.instructions(batch)))

    def training_inputs(
        self, batch: dict[str, Any], generator: torch.Generator | None
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The supervised fine-tuning example: (model inputs, labels (B, T), place values (B, T)), on the
        images' device.

        Args:
            batch: see the class; with `action_is_pad` (B, chunk_size) if `do_mask_loss_for_padding`.
            generator: CPU generator of the augmentation (crop, jitter, `?`); None leaves it out.
        """
        bins = batch[ACTION]
        expected = (self.config.chunk_size, self.action_dim)
        if bins.is_floating_point() or tuple(bins.shape[1:]) != expected:
            raise ValueError(
                f"action must be integer bins of shape (B, {expected[0]}, {expected[1]}), got {bins.dtype} "
                f"of shape {tuple(bins.shape)}. Pass the batch through the policy's preprocessor first."
            )
        pictures = self.pictures(batch, generator)
        tokens = self.chat.training_batch(
            self.instructions(batch),
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
        return inputs | family(self.vlm_processor).vision_inputs(
            self.vlm_processor, pictures, inputs["input_ids"]
        )
