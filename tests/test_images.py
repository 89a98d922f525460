import pytest
import torch
import torchvision.transforms.v2.functional as F  # noqa: N812
from PIL import Image

from lerobot_vla0.images import color_jitter, crop, cut_out, fitted, prepare_images

SETTINGS = {"size": 224, "crop_ratio": 0.875, "tile": True}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def uint8_images(rows: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (rows, 3, size, size), generator=torch.Generator().manual_seed(seed)).byte()


def test_evaluation_pixels_at_256_are_exactly_the_cameras():
    one, two = uint8_images(2, 256), uint8_images(2, 256, seed=1)
    out = prepare_images([one.float() / 255, two.float() / 255], **SETTINGS)
    assert out.shape == (2, 1, 3, 224, 448) and out.dtype == torch.uint8
    assert torch.equal(out[:, 0, :, :, :224], one[..., 16:240, 16:240])
    assert torch.equal(out[:, 0, :, :, 224:], two[..., 16:240, 16:240])


def test_part_of_a_picture():
    images = rand(2, 3, 40, 60)
    assert torch.equal(cut_out(images, [0.25, 0.5, 0.5, 0.25]), images[..., 10:30, 30:45])
    assert torch.equal(cut_out(images, [0, 0, 1, 1]), images) and cut_out(images, None) is images
    parts = [cut_out(images, [0, share, 1, 0.25]) for share in (0, 0.25, 0.5, 0.75)]
    assert torch.equal(torch.cat(parts, -1), images)
    for corner in (0, 0.5, 0.9999):  # narrower than a pixel
        assert cut_out(images, [corner, corner, 1e-4, 1e-4]).shape == (2, 3, 1, 1)


@pytest.mark.parametrize("convert", [lambda x: x / 255, lambda x: x * (1 / 255), lambda x: x / 255 - 1e-8])
def test_every_byte_survives(convert):
    """None is truncated to the one below where nothing is resized."""
    levels = torch.arange(256).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    images = convert(levels.float()).clamp(0, 1)
    for rule in ("vla0-trl", "NVlabs"):
        out = prepare_images([images], size=16, crop_ratio=1.0, tile=True, rule=rule)
        assert torch.equal(out[:, 0], levels.byte())


def test_jittered_pixels_are_truncated():
    image = torch.full((1, 3, 8, 8), 100.0) / 255
    settings = {"size": 8, "crop_ratio": 1.0, "tile": True, "jitter": (0.2, 0, 0, 0)}
    for seed in range(8):
        out = prepare_images([image], **settings, generator=torch.Generator().manual_seed(seed))
        generator = torch.Generator().manual_seed(seed)
        torch.randint(0, 1, (1,), generator=generator), torch.randint(0, 1, (1,), generator=generator)
        torch.randperm(4, generator=generator)
        factor = 1 + 0.2 * (torch.rand(1, generator=generator) * 2 - 1)
        assert out.unique().item() == int(100 * factor)


@pytest.mark.parametrize(
    ("side", "down", "even"), [(600, 37, 38), (1080, 67, 68), (256, 16, 16), (584, 36, 36)]
)
def test_centre_crop_between_two_pixels(side, down, even):
    """As torchvision's center_crop, or one pixel lower."""
    images = torch.arange(side).float().expand(1, 3, side, side)
    for rule, expected in (("vla0-trl", down), ("NVlabs", even)):
        assert crop(images, 0.875, None, rule)[0, 0, 0, 0] == expected
    assert torch.equal(crop(images, 0.875, None, "NVlabs"), F.center_crop(images, [int(side * 0.875)] * 2))


@pytest.mark.parametrize(
    ("fit", "kept", "box"),
    [
        ("squash", (slice(30, 210), slice(40, 280)), (0, 56, 0, 56)),
        ("crop", (slice(30, 210), slice(70, 250)), (0, 56, 0, 56)),
        ("letterbox", (slice(30, 210), slice(40, 280)), (7, 49, 0, 56)),
    ],
)
@pytest.mark.parametrize("upright", [False, True])
def test_cameras_that_are_not_square(fit, kept, box, upright):
    """240×320, of which three quarters are kept, and the same turned."""
    image = rand(2, 3, 240, 320).clamp(min=0.1)
    top, bottom, left, right = box
    part = F.resize(image[..., *kept], [bottom - top, right - left], antialias=True)
    expected = torch.zeros(2, 3, 56, 56, dtype=torch.uint8)
    expected[..., top:bottom, left:right] = (part * 255).byte()
    if upright:
        image, expected = image.mT, expected.mT
    sizes = tuple(part.stop - part.start for part in kept), (bottom - top, right - left)
    assert fitted(240, 320, size=56, crop_ratio=0.75, fit=fit) == sizes
    settings = {"size": 56, "crop_ratio": 0.75, "tile": True, "fit": fit}
    out = prepare_images([image], **settings)[:, 0]
    # Sums are rounded differently where rows and columns are exchanged.
    assert (out.int() - expected.int()).abs().max() <= upright
    augmented = prepare_images(
        [image], **settings, jitter=(0.2, 0.2, 0.2, 0.05), generator=torch.Generator().manual_seed(0)
    )[:, 0]
    bars = expected == 0
    assert (augmented[bars] == 0).all() and (augmented[~bars] > 0).all()
    assert bars.any() == (fit == "letterbox")


def test_resize_of_each_rule():
    image = uint8_images(1, 512).float() / 255
    for rule, antialias in (("vla0-trl", True), ("NVlabs", False)):
        out = prepare_images([image], **SETTINGS, rule=rule)
        scale = 1 if antialias else 255  # what is resized: [0, 1] or grey levels
        expected = F.resize(image[..., 32:480, 32:480] * scale, [224, 224], antialias=antialias)
        assert torch.equal(out[:, 0], (expected * (255 / scale)).byte())


def test_random_crops_lie_inside_and_differ_between_rows():
    # Each pixel says where it was.
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    images = torch.stack([y, x, y * 64 + x]).expand(16, 3, 64, 64)
    out = crop(images, 0.875, torch.Generator().manual_seed(0))
    assert out.shape == (16, 3, 56, 56)
    tops, lefts = out[:, 0, 0, 0], out[:, 1, 0, 0]
    assert (
        tops.min() >= 0 and tops.max() <= 8 and len(set(zip(tops.tolist(), lefts.tolist(), strict=True))) > 8
    )
    for i in range(16):
        t, left = int(tops[i]), int(lefts[i])
        assert torch.equal(out[i], images[i, :, t : t + 56, left : left + 56])


@pytest.mark.parametrize(
    ("index", "reference"),
    [(0, F.adjust_brightness), (1, F.adjust_contrast), (2, F.adjust_saturation), (3, F.adjust_hue)],
)
def test_each_jitter_is_torchvisions(index, reference):
    """With one strength set, each image equals torchvision's function at that image's factor."""
    images, strength = rand(6, 3, 20, 24), 0.4
    strengths = [0.0] * 4
    strengths[index] = strength
    out = color_jitter(images, *strengths, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    torch.randperm(4, generator=generator)  # the order is drawn first
    draws = torch.rand(6, generator=generator) * 2 - 1
    for i in range(6):
        factor = (0 if index == 3 else 1) + strength * draws[i].item()
        assert torch.allclose(out[i], reference(images[i], factor), atol=1e-5)
    assert not torch.allclose(out, images, atol=1e-2)


def test_augmentation_is_reproducible_and_off_without_generator():
    camera, jitter = [rand(3, 3, 64, 64)], (0.2, 0.2, 0.2, 0.05)
    settings = {**SETTINGS, "size": 56, "jitter": jitter}
    once, again, other = (
        prepare_images(camera, **settings, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    )
    plain = prepare_images(camera, **settings)
    assert torch.equal(once, again) and not torch.equal(once, other) and not torch.equal(once, plain)
    assert torch.equal(plain, prepare_images(camera, **settings))


def test_pixel_values_equal_transformers_on_the_pil_image(qwen_processor):
    """What the model sees is what Transformers' image processor makes of the same uint8 picture as a PIL
    image."""
    from lerobot_vla0.families import family

    pictures = prepare_images([rand(3, 3, 256, 256), rand(3, 3, 256, 256, seed=1)], **SETTINGS)
    ours = family(qwen_processor).vision_inputs(qwen_processor, pictures, torch.zeros(3, 4, dtype=torch.long))
    pil = [Image.fromarray(p[0].permute(1, 2, 0).numpy()) for p in pictures]
    # min_pixels = max_pixels = 224·448, as the original code sets them.
    theirs = qwen_processor.image_processor(
        pil, min_pixels=224 * 448, max_pixels=224 * 448, return_tensors="pt"
    )
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
