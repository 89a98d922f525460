"""What differs between families of VLMs, one class each: where the parts of the model are, what stands for a
picture in the prompt, and how pixels become model inputs. Knows nothing of loading or running a model.

A model of another family is refused: how it takes a picture would be a guess.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES


@dataclass(frozen=True)
class PictureRule:
    """Sizes of pictures, in pixels, that the VLM sees as they are; any other would be resized or refused."""

    multiple: int  # of which height and width are multiples; a square of this side becomes one image token
    square: bool = False
    fixed: int | None = None  # the only height and width

    def tokens(self, height: int, width: int) -> int:
        return (height // self.multiple) * (width // self.multiple)


@dataclass(frozen=True)
class Family:
    """What differs between families of VLMs. The methods are those of Qwen2-VL, Qwen2.5-VL and Qwen3-VL; the
    other families override them. `processor` is the VLM's Transformers processor.

    Attributes:
        text: name, below `model.model`, of the language model without its head.
        vision: names, below `model.model`, of the vision encoder and of what joins it to the language model.
        has_session: whether `DecodingSession` makes the attention masks that the language model needs.
    """

    text: str = "language_model"
    vision: tuple[str, ...] = ("vision_tower", "multi_modal_projector")
    has_session: bool = True

    def picture_rule(self, processor: Any) -> PictureRule:
        """The sizes that follow from the processor's settings: multiples of the side of a patch times the
        number of neighbouring patches, in each direction, that become one token."""
        return PictureRule(processor.image_processor.patch_size * processor.image_processor.merge_size)

    def picture_text(self, processor: Any, height: int, width: int) -> tuple[str, str]:
        """(what the chat template writes for a picture, what the processor replaces it by), the latter with
        as many image tokens as a picture of height × width pixels takes."""
        token = processor.image_token
        return token, token * self.picture_rule(processor).tokens(height, width)

    def pin_picture_size(self, processor: Any, height: int, width: int) -> None:
        """Changes the processor's settings so that, called with its defaults, it leaves pictures of
        height × width pixels as they are."""
        pixels = height * width
        processor.image_processor.size = {"shortest_edge": pixels, "longest_edge": pixels}

    def vision_inputs(self, processor: Any, pictures: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        """Model inputs that accompany the tokens, bit for bit those of the processor (of its torchvision
        backend).

        Args:
            pictures: uint8 (B, N, 3, H, W), on the model's device; H and W as `picture_rule` allows.
            input_ids: (B, T), with the image tokens of N pictures in each row.
        """
        settings = processor.image_processor
        patch, merge = settings.patch_size, settings.merge_size
        pictures = pictures.flatten(0, 1)
        count, channels, height, width = pictures.shape
        rows, columns = height // patch, width // patch
        # The processor's order: the `merge` × `merge` neighbours that become a token stand together. Cutting
        # while a pixel is one byte, and normalising afterwards, takes a seventh of the processor's time.
        patches = pictures.view(
            count, channels, rows // merge, merge, patch, columns // merge, merge, patch
        ).permute(0, 2, 5, 3, 6, 1, 4, 7)
        pixels = _normalise(processor, patches.reshape(-1, channels, 1, patch * patch))
        # A still picture is a video of `temporal_patch_size` equal frames.
        pixels = pixels.expand(-1, -1, settings.temporal_patch_size, -1)
        return {
            "pixel_values": pixels.reshape(len(pixels), -1),
            "image_grid_thw": torch.tensor([[1, rows, columns]], device=pixels.device).repeat(count, 1),
            "mm_token_type_ids": (input_ids == processor.image_token_id).int(),
        }


class SmolVLM(Family):
    """SmolVLM2. Its processor splits pictures by default; here the model sees each as a whole."""

    def picture_rule(self, processor: Any) -> PictureRule:
        tokens_per_side = int(processor.image_seq_len**0.5)
        side = processor.image_processor.max_image_size["longest_edge"]
        return PictureRule(side // tokens_per_side, square=True)

    def picture_text(self, processor: Any, height: int, width: int) -> tuple[str, str]:
        mark, tokens = super().picture_text(processor, height, width)
        fake = processor.fake_image_token
        return mark, f"{fake}{processor.global_image_token}{tokens}{fake}"

    def pin_picture_size(self, processor: Any, height: int, width: int) -> None:
        settings, tokens = processor.image_processor, self.picture_rule(processor).tokens(height, width)
        settings.size = settings.max_image_size = {"longest_edge": height}
        settings.do_image_splitting = False
        processor.image_seq_len = tokens

    def vision_inputs(self, processor: Any, pictures: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        return {"pixel_values": _normalise(processor, pictures)}


class InternVL(Family):
    """InternVL. Its processor cuts pictures into tiles by default; here the model sees each as a whole."""

    def picture_rule(self, processor: Any) -> PictureRule:
        tokens_per_side = int(processor.image_seq_length**0.5)
        return PictureRule(processor.image_processor.size["height"] // tokens_per_side, square=True)

    def picture_text(self, processor: Any, height: int, width: int) -> tuple[str, str]:
        mark, tokens = super().picture_text(processor, height, width)
        return mark, f"{processor.start_image_token}{tokens}{processor.end_image_token}"

    def pin_picture_size(self, processor: Any, height: int, width: int) -> None:
        settings, tokens = processor.image_processor, self.picture_rule(processor).tokens(height, width)
        settings.size = {"height": height, "width": width}
        settings.crop_to_patches = False
        processor.image_seq_length = tokens

    def vision_inputs(self, processor: Any, pictures: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        return {"pixel_values": _normalise(processor, pictures.flatten(0, 1))}


class Gemma3(Family):
    """Gemma 3. Pictures have one size: the vision encoder does not interpolate its position embeddings. Their
    tokens attend to each other in both directions, and most layers attend to a window of tokens only."""

    def picture_rule(self, processor: Any) -> PictureRule:
        side = processor.image_processor.size["height"]
        return PictureRule(side, square=True, fixed=side)

    def picture_text(self, processor: Any, height: int, width: int) -> tuple[str, str]:
        return processor.boi_token, processor.full_image_sequence

    def pin_picture_size(self, processor: Any, height: int, width: int) -> None:
        """The processor's own size is the only one."""

    def vision_inputs(self, processor: Any, pictures: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        return {
            "pixel_values": _normalise(processor, pictures.flatten(0, 1)),
            "token_type_ids": (input_ids == processor.image_token_id).int(),
        }


def _normalise(processor: Any, pixels: Tensor) -> Tensor:
    """uint8 or float 0..255 (..., 3, H, W) → float, by the processor's mean and deviation."""
    settings = processor.image_processor
    mean, std = (
        torch.tensor(values, device=pixels.device).view(3, 1, 1) * (1 / settings.rescale_factor)
        for values in (settings.image_mean, settings.image_std)
    )
    return pixels.float().sub_(mean).div_(std)


# By `model_type`. All of these write numbers digit by digit.
FAMILIES = {
    "qwen2_5_vl": Family(vision=("visual",)),
    "qwen2_vl": Family(vision=("visual",)),
    "qwen3_vl": Family(vision=("visual",)),
    "smolvlm": SmolVLM(text="text_model", vision=("vision_model", "connector")),
    "internvl": InternVL(),
    "gemma3": Gemma3(has_session=False),
}


def family(model_or_processor: Any) -> Family:
    """The family of a VLM or of its Transformers processor.

    Raises:
        ValueError: the processor is one of another VLM.
    """
    if isinstance(model_or_processor, nn.Module):
        return FAMILIES[model_or_processor.config.model_type]
    name = type(model_or_processor).__name__
    for model_type, found in FAMILIES.items():
        if PROCESSOR_MAPPING_NAMES[model_type] == name:
            return found
    raise ValueError(
        f"vlm: its processor is a {name!r}, which is not the processor of a supported vision-language model "
        f"({', '.join(FAMILIES)}). Correct processor_class in the VLM's processor_config.json."
    )
