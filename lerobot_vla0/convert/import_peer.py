"""Checkpoints of the other implementations of VLA-0: where they keep model, statistics and settings.

    NVlabs/vla0 (ankgoyal/vla0-libero)   model_last/  config.yaml  dataset_stats.pkl
    vla0-trl, TinyVLA                    final/ or checkpoint-N/  dataset_stats.json in it or beside it

config.yaml says how the model was trained. vla0-trl and TinyVLA record none of it: the defaults of their code
are taken, and can be corrected by options.
"""

import ast
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION

from ..checkpoint import ADAPTER_CONFIG, VLM_FOLDER, WEIGHTS
from ..configuration_vla0 import VLA0Config
from .import_stats import read_stats
from .weights import copy_weights

# RoboVerse's names of LIBERO's cameras (its img_libero_aug.yaml: image, wrist_image), and `lerobot/libero`'s.
LIBERO_CAMERAS = {"3p1": "observation.images.image", "3p2": "observation.images.image2"}
CAMERA_SIDE = 256  # pixels that LIBERO's cameras are rendered with in all three codes


@dataclass(kw_only=True)
class PeerOptions:
    """What the checkpoint does not record; None takes what it records, or its code's defaults."""

    stats: Path | None = None
    cameras: list[str] | None = None
    chunk_size: int | None = None
    image_size: int | None = None
    crop_ratio: float | None = None


def import_peer(folder: Path, options: PeerOptions, out: Path) -> str:
    """Writes the checkpoint, processors included, into the folder `out`, and returns what to tell the user.

    Raises:
        FileNotFoundError: the model, its weights, statistics or config.yaml are missing.
        ValueError: an adapter, a setting that this package does not have, or weights or statistics that do
            not fit the model.
    """
    # Imported here: transformers takes seconds, and `--help` must not.
    from transformers import AutoProcessor

    from ..backbone import read_config, save_vlm
    from ..processor_vla0 import make_vla0_pre_post_processors

    model_folder = _model_folder(folder)
    near = [model_folder, model_folder.parent]
    stats_file = _stats_file(options.stats, near)
    stats = read_stats(stats_file)
    read_config(model_folder)  # refuses what is no VLM
    try:
        processor = AutoProcessor.from_pretrained(model_folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{model_folder} has no processor that Transformers can read ({str(error).splitlines()[0]}). "
            "Copy tokenizer and preprocessor_config.json of the model that was trained on into it."
        ) from error
    config_file = next((path / "config.yaml" for path in near if (path / "config.yaml").is_file()), None)
    if config_file is not None:
        config, origin = _nvlabs_config(config_file, options), "NVlabs/vla0"
    elif stats_file.suffix == ".json":
        config, origin = _default_config(options, len(stats["min"]), processor), "vla0-trl or TinyVLA"
    else:
        raise FileNotFoundError(
            f"{folder} has no config.yaml, which says how the model of {stats_file.name} was trained. "
            "Copy it beside the statistics, from where the model was trained or published."
        )
    dim = config.action_feature.shape[0]
    if len(stats["min"]) != dim:
        raise ValueError(
            f"{stats_file} has statistics of {len(stats['min'])} action dimensions, but the model was "
            f"trained with {dim}. Give the right ones with --stats."
        )
    model = copy_weights(model_folder, out / WEIGHTS)
    config = replace(config, dtype=str(model.dtype).removeprefix("torch."))
    config.save_pretrained(out)
    save_vlm(model, processor, out / VLM_FOLDER)
    for step in make_vla0_pre_post_processors(config, {ACTION: stats}):
        step.save_pretrained(out)
    low, high = ([round(value, 4) for value in stats[name].tolist()] for name in ("min", "max"))
    return (
        f"Imported a checkpoint of {origin}: {config.chunk_size} timesteps of {dim} integers "
        f"0..{config.num_bins}, cameras {', '.join(config.camera_keys)} cropped to {config.crop_ratio:g} and "
        f"{config.image_size} pixels, actions from {low} to {high}. The licence of the weights is still that "
        "of where they come from."
    )


def _model_folder(folder: Path) -> Path:
    """The folder that Transformers wrote: `folder` itself, or a sub-folder of it as the three codes name
    them; of several checkpoint-N the last."""
    steps = sorted(
        (p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)),
        key=lambda p: int(p.name.removeprefix("checkpoint-")),
    )
    for path in [folder, folder / "model_last", folder / "final", *reversed(steps)]:
        if (path / ADAPTER_CONFIG).is_file():
            raise ValueError(
                f"{path} holds a LoRA adapter, not a whole model. Merge it first, with PEFT's "
                "merge_and_unload() and save_pretrained()."
            )
        if (path / "config.json").is_file():
            if "model_type" not in json.loads((path / "config.json").read_text()):
                raise ValueError(
                    f"{path}/config.json is no config of a Transformers model. A LeRobot checkpoint of this "
                    "package needs no import: use it with --policy.path."
                )
            return path
    raise FileNotFoundError(
        f"{folder} holds no model: neither config.json, nor model_last/, final/ or checkpoint-N/ with one "
        f"(found: {', '.join(sorted(p.name for p in folder.iterdir())[:10])})."
    )


def _stats_file(given: Path | None, near: list[Path]) -> Path:
    """The file with the statistics of the actions: the one that is given, or the first found in `near`."""
    if given is not None:
        if not Path(given).is_file():
            raise FileNotFoundError(f"--stats={str(given)!r} is not there.")
        return Path(given)
    found = [p / name for p in near for name in ("dataset_stats.pkl", "dataset_stats.json")]
    found = [path for path in found if path.is_file()]
    if not found:
        raise FileNotFoundError(
            "dataset_stats.pkl or dataset_stats.json is missing in "
            f"{' and '.join(map(str, near))}: it says what the integers mean. Name it with --stats=<file>."
        )
    return found[0]


class _YacsLoader(yaml.SafeLoader):
    """Reads Python tuples, too, which yacs writes under a tag that YAML's safe loader does not know."""


_YacsLoader.add_constructor(
    "tag:yaml.org,2002:python/tuple", lambda loader, node: tuple(loader.construct_sequence(node))
)


def _nvlabs_config(file: Path, options: PeerOptions) -> VLA0Config:
    """Settings of NVlabs/vla0, from the config.yaml that its training wrote. MODEL.QWEN holds those of the
    model, DATALOADER.ROBOVERSE.cfg_opts those of the pictures
    ("IMAGE.crop_img:0.875:IMAGE.img_size:224:...").
    """

    def must(name: str, value: Any, allowed: Any) -> None:
        if value != allowed:
            raise ValueError(f"{file}: {name} is {value!r}; imported can be {allowed!r} only.")

    try:
        saved = yaml.load(file.read_text(), _YacsLoader)
        must("EXP.MODEL", saved["EXP"]["MODEL"], "qwen")
        qwen, words = saved["MODEL"]["QWEN"], saved["DATALOADER"]["ROBOVERSE"]["cfg_opts"].split(":")
        image = {key: ast.literal_eval(value) for key, value in zip(words[::2], words[1::2], strict=True)}
        size, crop, names = image["IMAGE.img_size"], image["IMAGE.crop_img"], image["IMAGE.cam_list"]
        dim, horizon, bins = qwen["original_action_dim"], qwen["horizon"], qwen["num_bins_actions"]
        vision_id, tiled, vlm = qwen["add_vision_id"], qwen["tiled_rgb_imgs"], qwen["qwen_model_id"]
        must("MODEL.QWEN.history", qwen["history"], 1)
        must("MODEL.QWEN.action_type", qwen["action_type"], "original")
        must("MODEL.QWEN.use_lora", qwen["use_lora"], False)
        must("MODEL.QWEN.rgb_input", qwen["rgb_input"], True)
        must("MODEL.QWEN.num_cam", qwen["num_cam"], len(names))
        must("MODEL.QWEN.rgb_img_size", list(qwen["rgb_img_size"]), [size, size])
        masked = qwen["action_mask_aug_per"]
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, SyntaxError) as error:
        raise ValueError(
            f"{file} is no config of NVlabs/vla0's training ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}). Expected are MODEL.QWEN and DATALOADER.ROBOVERSE.cfg_opts with "
            "IMAGE.crop_img, IMAGE.img_size and IMAGE.cam_list."
        ) from error
    for name, told in [("chunk_size", horizon), ("image_size", size), ("crop_ratio", crop)]:
        given = getattr(options, name)
        if given not in (None, told):
            raise ValueError(f"--{name}={given} contradicts {file}, which says {told}. Leave it out.")
    cameras = options.cameras or [LIBERO_CAMERAS.get(name) for name in names]
    if None in cameras or len(cameras) != len(names):
        raise ValueError(
            f"{file} was trained on the cameras {list(names)}, which are not {sorted(LIBERO_CAMERAS)} of "
            "LIBERO. Name their image keys in this order: --cameras='[observation.images.front, ...]'."
        )
    return _config(
        cameras, dim, vlm=vlm, chunk_size=horizon, n_action_steps=horizon, num_bins=bins, image_size=size,
        crop_ratio=crop, tile_images=tiled, add_vision_id=vision_id, resize_antialias=False,
        action_mask_prob=masked,
    )  # fmt: skip


def _default_config(options: PeerOptions, dim: int, processor: Any) -> VLA0Config:
    """Settings of vla0-trl and TinyVLA: the options, and their code's defaults for the rest."""
    size, horizon = options.image_size or 224, options.chunk_size or 8
    cameras = options.cameras or list(LIBERO_CAMERAS.values())
    # The number of pixels of a picture is recorded, so that wrong options are noticed.
    pixels, expected = processor.image_processor.size["shortest_edge"], size * size * len(cameras)
    if pixels != expected:
        raise ValueError(
            f"the image processor was made for pictures of {pixels} pixels, not for {len(cameras)} cameras "
            f"of {size}×{size} side by side ({expected}). Say what the model was trained on: --image_size, "
            "--cameras."
        )
    return _config(
        cameras, dim, chunk_size=horizon, n_action_steps=horizon, num_bins=1000, image_size=size,
        crop_ratio=0.875 if options.crop_ratio is None else options.crop_ratio, tile_images=True,
        add_vision_id=False, resize_antialias=True,
    )  # fmt: skip


def _config(cameras: list[str], dim: int, **settings: Any) -> VLA0Config:
    """The policy's config with its features: images of `cameras` and actions of `dim` numbers."""
    pixels = (3, CAMERA_SIDE, CAMERA_SIDE)
    return VLA0Config(
        cameras=cameras,
        input_features={key: PolicyFeature(FeatureType.VISUAL, pixels) for key in cameras},
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (dim,))},
        push_to_hub=False,
        **settings,
    )
