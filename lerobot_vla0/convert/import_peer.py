"""Checkpoints of the other implementations of VLA-0: where they keep model, statistics and settings.

    NVlabs/vla0 (ankgoyal/vla0-libero)   model_last/, model_final/ or model_N/  config.yaml  dataset_stats.pkl
    vla0-trl, TinyVLA                    final/ or checkpoint-N/  dataset_stats.json in it or beside it

config.yaml says how the model was trained (import_nvlabs.py). vla0-trl and TinyVLA record none of it: the
defaults of their code are taken, and can be corrected by options. A LoRA adapter is merged into its base.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lerobot.configs import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION

from ..checkpoint import ADAPTER_CONFIG, VLM_FOLDER, WEIGHTS
from ..configuration_vla0 import VLA0Config
from ..files import read_json
from .import_nvlabs import LIBERO_CAMERAS, PeerOptions, nvlabs_settings
from .import_stats import read_stats
from .weights import copy_weights, find_folder

CAMERA_SIDE = 256  # pixels that LIBERO's cameras are rendered with in all three codes


@dataclass(frozen=True)
class Imported:
    """What was imported: for the user, and for the model card."""

    message: str
    origin: str  # by which code the model was made, and what was decided on its prompt
    stats: dict[str, Any]  # min and max of the actions, D numbers each


def import_peer(folder: Path, options: PeerOptions, out: Path) -> Imported:
    """Writes the checkpoint, processors included, into the folder `out`.

    Raises:
        FileNotFoundError: the model, its weights, statistics, config.yaml or an adapter's base are missing.
        ValueError: a setting that this package does not have, or weights or statistics that do not fit the
            model.
        ImportError: an adapter, and peft is not installed.
    """
    # Imported here: transformers takes seconds, and `--help` must not.
    from ..backbone import load_processor, read_config, save_vlm
    from ..processor_vla0 import make_vla0_pre_post_processors

    model_folder = _model_folder(folder)
    near = [model_folder, model_folder.parent]
    stats_file = _stats_file(options.stats, near)
    stats = read_stats(stats_file)
    config_file = next((path / "config.yaml" for path in near if (path / "config.yaml").is_file()), None)
    base_folder, adapter = model_folder, {}
    if (model_folder / ADAPTER_CONFIG).is_file():
        adapter = _read_adapter(model_folder, options.base)
    elif options.base is not None:
        raise ValueError(
            f"--base={options.base!r} does not apply: {model_folder} is no adapter. Leave it out."
        )
    if config_file is None and options.data_config is not None:
        raise ValueError(
            f"--data_config={str(options.data_config)!r} does not apply: {folder} has no config.yaml. Leave "
            "it out."
        )
    if config_file is None and stats_file.suffix != ".json":
        raise FileNotFoundError(
            f"{folder} has no config.yaml, which says how the model of {stats_file.name} was trained. "
            "Copy it beside the statistics, from where the model was trained or published."
        )
    if adapter and config_file is not None:
        raise ValueError(
            f"{model_folder} holds a LoRA adapter of NVlabs/vla0; imported can be those of vla0-trl and "
            "TinyVLA only."
        )
    if adapter:
        base_folder = find_folder(adapter["base"], adapter["revision"], "--base")
    read_config(base_folder)  # refuses what is no VLM
    try:
        processor = load_processor(model_folder)
    except ValueError as error:
        raise FileNotFoundError(
            f"{model_folder} has no processor that Transformers can read ({str(error).splitlines()[0]}). "
            "Copy tokenizer and preprocessor_config.json of the model that was trained on into it."
        ) from error
    if config_file is not None:
        version = read_json(model_folder / "config.json").get("transformers_version")
        cameras, dim, settings, why = nvlabs_settings(config_file, options, version)
        origin = "NVlabs/vla0"
    else:
        cameras, settings, why = _default_settings(options, processor)
        dim, origin = len(stats["min"]), "vla0-trl or TinyVLA"
        settings |= {"vlm": adapter["name"]} if adapter else {}
    if len(stats["min"]) != dim:
        raise ValueError(
            f"{stats_file} has statistics of {len(stats['min'])} action dimensions, but the model was "
            f"trained with {dim}. Give the right ones with --stats."
        )
    model = copy_weights(base_folder, out / WEIGHTS, model_folder if adapter else None)
    pixels = PolicyFeature(FeatureType.VISUAL, (3, CAMERA_SIDE, CAMERA_SIDE))
    config = VLA0Config(
        cameras=cameras,
        input_features=dict.fromkeys(cameras, pixels),
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (dim,))},
        push_to_hub=False,
        dtype=str(model.dtype).removeprefix("torch."),
        **settings,
    )
    config.save_pretrained(out)
    save_vlm(model, processor, out / VLM_FOLDER)
    for step in make_vla0_pre_post_processors(config, {ACTION: stats}):
        step.save_pretrained(out)
    low, high = ([round(value, 4) for value in stats[name].tolist()] for name in ("min", "max"))
    merged = f", its LoRA adapter merged into {adapter['base']}" if adapter else ""
    message = (
        f"{why}\nImported {model_folder.name} of {origin}{merged}: {config.chunk_size} timesteps of {dim} "
        f"integers 0..{config.num_bins}, cameras {', '.join(cameras)} cropped to {config.crop_ratio:g} and "
        f"{config.image_size} pixels, actions from {low} to {high}. The licence of the weights is still that "
        "of where they come from."
    )
    return Imported(message, f"a checkpoint of {origin}. {why}", stats)


def _model_folder(folder: Path) -> Path:
    """The folder that Transformers or PEFT wrote: `folder` itself, or a sub-folder of it as the three codes
    name them; of several model_N or checkpoint-N the last."""
    steps = [path for path in folder.iterdir() if re.fullmatch(r"(model_|checkpoint-)\d+", path.name)]
    steps.sort(key=lambda path: int(re.split("[_-]", path.name)[-1]), reverse=True)
    for path in [folder, *(folder / name for name in ("model_last", "model_final", "final")), *steps]:
        if (path / ADAPTER_CONFIG).is_file():
            return path
        if (path / "config.json").is_file():
            saved = read_json(path / "config.json")
            if "model_type" not in saved:
                kind = saved.get("type")
                raise ValueError(
                    f"{path}/config.json is no config of a Transformers model"
                    + (f", but of a LeRobot policy of type {kind!r}" if kind else "")
                    + ". A LeRobot checkpoint of this package (type 'vla0') needs no import: use it with "
                    "--policy.path; other policies cannot be imported."
                )
            return path
    raise FileNotFoundError(
        f"{folder} holds no model: neither config.json, nor model_last/, model_final/, model_N/, final/ or "
        f"checkpoint-N/ with one (found: {', '.join(sorted(p.name for p in folder.iterdir())[:10])})."
    )


def _read_adapter(folder: Path, given: str | None) -> dict[str, Any]:
    """Of an adapter: `name` of the model that it was trained on; `base`, where that is; its `revision`."""
    saved = read_json(folder / ADAPTER_CONFIG)
    name = saved.get("base_model_name_or_path") or given
    if not name:
        raise ValueError(
            f"{folder / ADAPTER_CONFIG} does not name the model that the adapter was trained on "
            "(base_model_name_or_path). Name it: --base=<folder or Hub repo>."
        )
    return {"name": name, "base": given or name, "revision": None if given else saved.get("revision")}


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


def _default_settings(options: PeerOptions, processor: Any) -> tuple[list[str], dict[str, Any], str]:
    """Cameras and settings of vla0-trl and TinyVLA: the options, and their code's defaults for the rest; and
    what was decided on add_vision_id."""
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
    vision_id = bool(options.add_vision_id)
    why = f"add_vision_id={str(vision_id).lower()}, as "
    why += "both codes have it." if options.add_vision_id is None else "--add_vision_id says."
    return cameras, {
        "chunk_size": horizon,
        "n_action_steps": horizon,
        "num_bins": options.num_bins or 1000,
        "image_size": size,
        "crop_ratio": 0.875 if options.crop_ratio is None else options.crop_ratio,
        "tile_images": True,
        "add_vision_id": vision_id,
        "resize_antialias": True,
    }, why  # fmt: skip
