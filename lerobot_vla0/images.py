"""Camera images → pictures for the VLM: crop, resize, colour jitter, tile. Batched, on the images' device.

Follows arXiv 2510.13054, section 4.1: crop to 0.875, resize to 224×224, jitter in training only, cameras side
by side. At 256×256 the crop is 224, so evaluation pixels are exactly the camera's. Resized and jittered
pixels are truncated to bytes, as in the three codes that VLA-0 is trained with.
"""

from collections.abc import Sequence

import torch
import torchvision.transforms.v2.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.functional import pad

GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601 luma, torchvision's rgb_to_grayscale


def crop(images: Tensor, ratio: float, generator: torch.Generator | None, rule: str = "vla0-trl") -> Tensor:
    """(B, C, H, W) → (B, C, int(H·ratio), int(W·ratio)): centre crop, or with a generator one random crop per
    image."""
    height, width = images.shape[-2:]
    h, w = int(height * ratio), int(width * ratio)
    if generator is None:
        return centre_crop(images, h, w, rule)
    n = len(images)
    tops = torch.randint(0, height - h + 1, (n,), generator=generator).tolist()
    lefts = torch.randint(0, width - w + 1, (n,), generator=generator).tolist()
    # `stack` copies once into contiguous memory, which makes the many passes of resize and jitter faster.
    return torch.stack(
        [image[:, i : i + h, j : j + w] for image, i, j in zip(images, tops, lefts, strict=True)]
    )


def centre_crop(images: Tensor, h: int, w: int, rule: str) -> Tensor:
    """The middle h × w pixels. Between two pixels they begin at the lower one, or, as torchvision's
    center_crop in NVlabs/vla0, at the even one."""
    top, left = ((n - m) / 2 for n, m in zip(images.shape[-2:], (h, w), strict=True))
    top, left = (round(top), round(left)) if rule == "NVlabs" else (int(top), int(left))
    return images[..., top : top + h, left : left + w]


def cut_out(images: Tensor, region: Sequence[float] | None) -> Tensor:
    """(B, C, H, W) → the part at `region`, [top, left, height, width] in shares of the picture; its edges are
    the nearest ones between pixels, and it has at least one pixel. None keeps the whole."""
    if region is None:
        return images
    height, width = images.shape[-2:]
    top, left = min(round(region[0] * height), height - 1), min(round(region[1] * width), width - 1)
    bottom, right = round((region[0] + region[2]) * height), round((region[1] + region[3]) * width)
    return images[..., top : max(bottom, top + 1), left : max(right, left + 1)]


def fitted(
    height: int, width: int, *, size: int, crop_ratio: float, fit: str
) -> tuple[tuple[int, int], tuple[int, int]]:
    """What becomes of a camera's picture: (height, width) of the crop, and of what it is resized
    to. "squash" resizes to size × size whatever the shape; "crop" takes the middle square first; "letterbox"
    keeps the aspect ratio, so that the longer side has `size` pixels and the rest stays black."""
    if fit == "crop":
        height = width = min(height, width)
    h, w = int(height * crop_ratio), int(width * crop_ratio)
    if fit != "letterbox":
        return (h, w), (size, size)
    longer = max(h, w, 1)
    return (h, w), (max(1, round(h * size / longer)), max(1, round(w * size / longer)))


def color_jitter(
    images: Tensor,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    generator: torch.Generator,
) -> Tensor:
    """torchvision's ColorJitter with factors drawn per image (B, 3, H, W), in one pass over the batch.

    torchvision draws one set of factors per call, and a loop over the images would take most of the time of a
    training step. Factors are drawn from 1 - strength to 1 + strength, the shift of the hue from -hue to hue
    in full circles; the order of the four operations is drawn once per batch.
    """
    n = len(images)

    def factor(strength: float, centre: float = 1.0) -> Tensor:
        draw = torch.rand(n, generator=generator) * 2 - 1
        return (centre + strength * draw).view(n, 1, 1, 1).to(images)

    operations = [
        (brightness, lambda x: (x * factor(brightness)).clamp_(0, 1)),
        (contrast, lambda x: _blend(x, _gray(x).mean((-3, -2, -1), keepdim=True), factor(contrast))),
        (saturation, lambda x: _blend(x, _gray(x), factor(saturation))),
        (hue, lambda x: _shift_hue(x, factor(hue, centre=0.0))),
    ]
    for i in torch.randperm(len(operations), generator=generator).tolist():
        strength, operation = operations[i]
        if strength > 0:
            images = operation(images)
    return images


def _gray(images: Tensor) -> Tensor:
    r, g, b = images.unbind(-3)
    return (r * GRAY[0]).add_(g, alpha=GRAY[1]).add_(b, alpha=GRAY[2]).unsqueeze(-3)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).add_((1 - factor) * other).clamp_(0, 1)


def _shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Shifts the hue by `shift` (B, 1, 1, 1), in full circles.

    HSV → RGB in its piecewise linear form (https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB), computed in
    place: on a CPU it takes half of the time in which a picture is prepared.
    """
    r, g, b = images.unbind(-3)
    value, low = images.amax(-3), images.amin(-3)
    chroma = value - low
    red, green = value == r, value == g
    # Hue in sixths of the circle: red 0, green 2, blue 4.
    hue = torch.where(red, g - b, torch.where(green, b - r, r - g)).div_(chroma.clamp(min=1e-12))
    hue += torch.where(red, 0.0, torch.where(green, 2.0, 4.0))
    hue += 6 * shift[..., 0, :, :]
    hue -= (hue / 6).floor_().mul_(6)  # mod 6; torch.remainder takes several times as long
    shares = (
        (hue - 3).abs_().sub_(1),
        (hue - 2).abs_().neg_().add_(2),
        (hue - 4).abs_().neg_().add_(2),
    )
    return torch.stack([share.clamp_(0, 1).mul_(chroma).add_(low) for share in shares], dim=-3)


def resize(images: Tensor, size: tuple[int, int], rule: str) -> Tensor:
    """Images in [0, 1], of any size → levels in [0, 255] of `size` (height, width), a new tensor.

    Truncated, they are the bytes of the code whose rule it is: NVlabs/vla0 resizes levels without
        antialiasing, vla0-trl and TinyVLA numbers in [0, 1] with it. The camera's own bytes are rounded,
        because byte / 255 * 255 may come out a little below the byte.
    """
    if images.shape[-2:] == size:
        return (images * 255).round_()
    if rule == "NVlabs":
        return F.resize((images * 255).round_(), list(size), antialias=False)
    return F.resize(images, list(size), antialias=True) * 255


def prepare_images(
    cameras: list[Tensor],
    *,
    size: int,
    crop_ratio: float,
    tile: bool,
    rule: str = "vla0-trl",
    fit: str = "squash",
    jitter: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A batch of images per camera → a batch of pictures for the chat.

    Args:
        cameras: one float tensor (B, 3, H, W) in [0, 1] per camera, in prompt order; sizes may differ.
        size: side of the square that each camera becomes, in pixels.
        crop_ratio: share of height and width that remains, in (0, 1].
        tile: True puts all cameras side by side in one picture, False keeps one picture per camera.
        rule: whose code is followed, see `VLA0Config.picture_rule`.
        fit: "squash", "crop" or "letterbox", see `fitted`. Bars are black, whatever the jitter.
        jitter: strengths for `color_jitter` (brightness, contrast, saturation, hue); used with a generator.
        generator: CPU generator for crops and jitter; None for evaluation (centre crop, no jitter).

    Returns:
        uint8 (B, 1, 3, size, size·cameras) when tiled, else (B, cameras, 3, size, size).
    """
    pictures = []
    for images in cameras:
        if fit == "crop":
            side = min(images.shape[-2:])
            images = centre_crop(images, side, side, rule)
        _, (h, w) = fitted(*images.shape[-2:], size=size, crop_ratio=crop_ratio, fit=fit)
        levels = resize(crop(images, crop_ratio, generator, rule), (h, w), rule)
        if generator is not None and jitter is not None:
            levels = color_jitter(levels.div_(255), *jitter, generator=generator).mul_(255)
        top, left = (size - h) // 2, (size - w) // 2
        picture = levels.clamp_(0, 255).to(torch.uint8)
        pictures.append(pad(picture, (left, size - w - left, top, size - h - top)))
    return torch.cat(pictures, dim=-1).unsqueeze(1) if tile else torch.stack(pictures, dim=1)
