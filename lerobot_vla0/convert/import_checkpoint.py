"""`lerobot-vla0 import`: checkpoints of the other implementations of VLA-0, as checkpoints of ours.

    NVlabs/vla0 (ankgoyal/vla0-libero)   model_last/  config.yaml  dataset_stats.pkl
    vla0-trl, TinyVLA                    final/ or checkpoint-N/  dataset_stats.json in it or beside it
    lerobot-vla0 export                  action_spec.json

The first says in config.yaml how it was trained, the last holds all of a checkpoint of ours. vla0-trl and
TinyVLA say nothing: what their code has as defaults is taken, and can be corrected by options. Any other
layout is refused.
"""

import argparse
import ast
import json
import re
import shutil
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import yaml
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.utils.constants import ACTION
from safetensors.torch import save_file

from ..checkpoint import ADAPTER_CONFIG, VLM_FOLDER, WEIGHTS, check_checkpoint, new_folder
from ..configuration_vla0 import VLA0Config
from .export import ACTION_SPEC, SPEC_VERSION
from .import_stats import read_stats
from .weights import common_dtype, find_weights, policy_names, write_weights

# RoboVerse's names of LIBERO's cameras (its img_libero_aug.yaml: image, wrist_image), and `lerobot/libero`'s.
LIBERO_CAMERAS = {"3p1": "observation.images.image", "3p2": "observation.images.image2"}
CAMERA_SIDE = 256  # pixels that LIBERO's cameras are rendered with in all three codes
FILES = ["*.json", "*.safetensors", "*.yaml", "dataset_stats.pkl", "*.jinja", "*merges.txt"]


@dataclass
class ImportConfig:
    """What to import; an option that is None is taken from the checkpoint, or from its code's defaults."""

    source: str
    out: Path
    stats: Path | None = None
    revision: str | None = None
    cameras: list[str] | None = None
    chunk_size: int | None = None
    image_size: int | None = None
    crop_ratio: float | None = None


def main(argv: list[str]) -> None:
    """Parses the command line and imports. argparse, because `from` cannot be the name of a field."""
    parser = argparse.ArgumentParser(
        prog="lerobot-vla0 import",
        description="Import a checkpoint of NVlabs/vla0, vla0-trl or TinyVLA, or a folder that "
        "`lerobot-vla0 export` wrote.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        help="folder or Hub repo: the run, or the model's folder in it",
    )
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--stats", type=Path, help="dataset_stats.pkl or .json, where it lies elsewhere")
    parser.add_argument("--revision", help="commit, branch or tag of the Hub repo")
    parser.add_argument(
        "--cameras",
        type=yaml.safe_load,
        help="image keys in the order that the model was trained on (default: LIBERO's, "
        f"'[{', '.join(LIBERO_CAMERAS.values())}]')",
    )
    unsaid = "; vla0-trl and TinyVLA do not record it (default: their code's, {})"
    parser.add_argument("--chunk_size", type=int, help="timesteps per prediction" + unsaid.format(8))
    parser.add_argument("--image_size", type=int, help="pixels per camera" + unsaid.format(224))
    parser.add_argument("--crop_ratio", type=float, help="share of a picture kept" + unsaid.format(0.875))
    import_checkpoint(ImportConfig(**vars(parser.parse_args(argv))))


def import_checkpoint(options: ImportConfig) -> Path:
    """Writes the checkpoint, processors included, to `options.out` and returns it. Weights are copied tensor
    by tensor, in their type.

    Raises:
        FileExistsError: `out` exists and is not empty.
        FileNotFoundError: nothing is there, or weights, statistics or config.yaml are missing.
        ValueError: a layout that is none of the four, a setting that this package does not have, or weights
            that do not fit the model's config.
    """
    # Imported here: transformers takes seconds, and `--help` must not.
    from ..backbone import read_config, save_vlm
    from ..processor_vla0 import make_vla0_pre_post_processors

    cameras = options.cameras
    if cameras is not None and not (isinstance(cameras, list) and all(isinstance(c, str) for c in cameras)):
        raise ValueError(f"--cameras={cameras!r} is not allowed: it must be a list, '[first, second]'.")
    with new_folder(options.out) as out:
        folder = _find(options.source, options.revision)
        if (folder / ACTION_SPEC).is_file():
            _exported(folder, options, out)
            print(f"Imported an exported checkpoint.\nWrote {options.out}")
            return Path(options.out)
        model_folder = _model_folder(folder)
        near = [model_folder, model_folder.parent]
        stats_file = _stats_file(options.stats, near)
        stats = read_stats(stats_file)
        read_config(model_folder)  # refuses what is no VLM
        model, processor = _empty_model(model_folder)
        config_file = next((path / "config.yaml" for path in near if (path / "config.yaml").is_file()), None)
        if config_file is not None:
            config, origin = _original(config_file, options), "NVlabs/vla0"
        elif stats_file.suffix == ".json":
            config, origin = _without_config(options, len(stats["min"]), processor), "vla0-trl or TinyVLA"
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
        weights = find_weights(model_folder)
        names = policy_names(weights, model)
        config = replace(config, dtype=common_dtype(weights, names))
        config.save_pretrained(out)
        save_vlm(model, processor, out / VLM_FOLDER)
        for step in make_vla0_pre_post_processors(config, {ACTION: stats}):
            step.save_pretrained(out)
        write_weights(weights, names, out / WEIGHTS)
        check_checkpoint(out, PreTrainedConfig.from_pretrained(out), config)
    low, high = ([round(value, 4) for value in stats[name].tolist()] for name in ("min", "max"))
    print(
        f"Imported a checkpoint of {origin}: {config.chunk_size} timesteps of {dim} integers "
        f"0..{config.num_bins}, cameras {', '.join(config.camera_keys)} cropped to {config.crop_ratio:g} and "
        f"{config.image_size} pixels, actions from {low} to {high}. The licence of the weights is still that "
        f"of where they come from.\nWrote {options.out}"
    )
    return Path(options.out)


# ---------------------------------------------------------------------------------------------------- finding


def _find(source: str, revision: str | None) -> Path:
    if Path(source).is_dir():
        return Path(source).resolve()
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=FILES))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"--from={source!r} is neither a folder nor a Hub repo that can be read "
            f"({str(error).splitlines()[0]})."
        ) from error


def _model_folder(folder: Path) -> Path:
    """Where Transformers wrote the model: here, or in the sub-folder that the three codes write."""
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


# --------------------------------------------------------------------------------------------------- exported


def _exported(folder: Path, options: ImportConfig, out: Path) -> None:
    """Undoes `lerobot-vla0 export`: action_spec.json holds the files that Transformers' folder does not."""
    for option in fields(options):
        if option.name not in ("source", "out", "revision") and getattr(options, option.name) is not None:
            raise ValueError(
                f"--{option.name} does not apply here: {folder / ACTION_SPEC} records how the model was "
                "trained. Leave it out."
            )
    try:
        spec = json.loads((folder / ACTION_SPEC).read_text())
        version, files, state = spec["spec_version"], spec["checkpoint"]["files"], spec["checkpoint"]["state"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / ACTION_SPEC} was not written by `lerobot-vla0 export` "
            f"({type(error).__name__}: {error})."
        ) from error
    if version > SPEC_VERSION:
        raise ValueError(
            f"{folder / ACTION_SPEC} has spec_version {version}, this package reads up to {SPEC_VERSION}: "
            "pip install -U lerobot_policy_vla0."
        )
    (out / VLM_FOLDER).mkdir()
    for name, content in files.items():
        place = PurePosixPath(name)
        if str(place.parent) not in (".", VLM_FOLDER) or place.suffix != ".json":
            raise ValueError(f"{folder / ACTION_SPEC} names {name!r}, which is no file of a checkpoint.")
        (out / place).write_text(json.dumps(content, indent=2))
    for name, tensors in state.items():
        if PurePosixPath(name).name != name:
            raise ValueError(f"{folder / ACTION_SPEC} names {name!r}, which is no file of a checkpoint.")
        values = {
            key: torch.tensor(saved["values"], dtype=getattr(torch, saved["dtype"]))
            for key, saved in tensors.items()
        }
        save_file(values, out / name)
    shutil.copyfile(folder / "tokenizer.json", out / VLM_FOLDER / "tokenizer.json")
    weights = find_weights(folder)
    model, _ = _empty_model(folder)
    write_weights(weights, policy_names(weights, model), out / WEIGHTS)
    saved = PreTrainedConfig.from_pretrained(out)
    check_checkpoint(out, saved, saved)


# --------------------------------------------------------------------------------------------------- settings


class _YacsLoader(yaml.SafeLoader):
    """yacs writes Python's tuples, which YAML does not know."""


_YacsLoader.add_constructor(
    "tag:yaml.org,2002:python/tuple", lambda loader, node: tuple(loader.construct_sequence(node))
)


def _original(file: Path, options: ImportConfig) -> VLA0Config:
    """Settings of NVlabs/vla0, from the config that its training wrote: MODEL.QWEN of the model, and
    DATALOADER.ROBOVERSE.cfg_opts ("IMAGE.crop_img:0.875:IMAGE.img_size:224:...") of the pictures."""

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


def _without_config(options: ImportConfig, dim: int, processor: Any) -> VLA0Config:
    """Settings of vla0-trl and TinyVLA: their defaults, but for the options."""
    size, horizon = options.image_size or 224, options.chunk_size or 8
    cameras = options.cameras or list(LIBERO_CAMERAS.values())
    # What they do record is how many pixels a picture has.
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
    pixels = (3, CAMERA_SIDE, CAMERA_SIDE)
    return VLA0Config(
        cameras=cameras,
        input_features={key: PolicyFeature(FeatureType.VISUAL, pixels) for key in cameras},
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (dim,))},
        push_to_hub=False,
        **settings,
    )


def _empty_model(folder: Path) -> tuple[torch.nn.Module, Any]:
    """(the model without storage, for names and shapes; its processor)."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    model.tie_weights()
    try:
        return model, AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{folder} has no processor that Transformers can read ({str(error).splitlines()[0]}). Copy "
            "tokenizer and preprocessor_config.json of the model that was trained on into it."
        ) from error
