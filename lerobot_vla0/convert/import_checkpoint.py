"""`lerobot-vla0 import`: folders of the other implementations of VLA-0, and exports, as checkpoints.

    NVlabs/vla0 (ankgoyal/vla0-libero)   model_last/, model_final/ or model_N/  config.yaml  dataset_stats.pkl
    vla0-trl, TinyVLA                    final/ or checkpoint-N/  dataset_stats.json in it or beside it
    lerobot-vla0 export                  the model's files  lerobot/

vla0-trl and TinyVLA do not record how the model was trained: options say it, or their code's defaults count.
"""

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION
from safetensors import safe_open
from safetensors.torch import save_model
from torch import nn

from .. import checkpoint
from ..checkpoint import ADAPTER_CONFIG, VLM_FOLDER, WEIGHTS
from ..configuration_vla0 import VLA0Config
from ..dataset import check_action_statistics
from ..files import new_folder, not_found, read_json, reading, weight_files
from .card import make_card
from .export import CHECKPOINT_FOLDER
from .peer_files import LIBERO_CAMERAS, nvlabs_settings, read_stats

DOWNLOADED = ["*.json", "*.safetensors", "*.yaml", "dataset_stats.pkl", "*.jinja", "*merges.txt"]
STATISTICS = ("dataset_stats.pkl", "dataset_stats.json")
# safetensors' names of the types of weights.
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# Settings of vla0-trl's and TinyVLA's code, which options replace.
DEFAULTS = {
    "cameras": list(LIBERO_CAMERAS.values()), "chunk_size": 8, "num_bins": 1000, "image_size": 224,
    "crop_ratio": 0.875, "add_vision_id": False,
}  # fmt: skip
CAMERA = PolicyFeature(FeatureType.VISUAL, (3, 256, 256))  # LIBERO's in all three codes


def parse(argv: list[str]) -> argparse.Namespace:
    """By argparse: draccus names options after fields, and `from` cannot be one."""
    parser = argparse.ArgumentParser("lerobot-vla0 import", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add(
        "--from",
        dest="source",
        required=True,
        help="folder or Hub repo: the run, or the model's folder in it",
    )
    add("--out", required=True, type=Path, help="folder to write")
    add("--revision", help="commit, branch or tag of the Hub repo")
    add("--stats", type=Path, help=f"{' or '.join(STATISTICS)}, if it is elsewhere")
    add("--base", help="what a LoRA adapter was trained on (default: as its adapter_config.json says)")
    add("--data_config", type=Path, help="NVlabs/vla0's YAML of the data, which config.yaml names")
    text = 'whether the model saw "Picture 1: " in training; Transformers before 4.52 left it out'
    add("--add_vision_id", type=json.loads, choices=[True, False], metavar="BOOL", help=text)
    text = "[first, second]: image keys in the order of training (default: LIBERO's)"
    add("--cameras", type=lambda text: text.strip("[] ").replace(",", " ").split(), help=text)
    add("--chunk_size", type=int, help="timesteps per prediction")
    add("--num_bins", type=int, help="largest integer")
    add("--image_size", type=int, help="pixels per camera")
    add("--crop_ratio", type=float, help="share of a picture's sides that is cropped out")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Writes a checkpoint, processors included. Weights keep their type.

    Raises:
        FileExistsError: `--out` exists and is not empty.
        FileNotFoundError: model, weights, statistics, config.yaml or an adapter's base are missing.
        ValueError: a setting that this package does not have, or weights or statistics that do not fit.
    """
    options = parse(argv)
    settings = {name: getattr(options, name) for name in DEFAULTS if getattr(options, name) is not None}
    with new_folder(options.out) as out:
        # NVlabs names a model by the small file beside its folder: run/model_last.pth.
        folder = find_folder(options.source.removesuffix(".pth"), options.revision, "--from")
        if (folder / CHECKPOINT_FOLDER).is_dir():
            if settings:
                raise ValueError(f"{settings}: an export records how the model was trained. Leave it out.")
            shutil.copytree(folder / CHECKPOINT_FOLDER, out, dirs_exist_ok=True)
            save_weights(load_model(folder), out)
            origin = "an export"
        else:
            origin = import_peer(folder, options, settings, out)
        found = checkpoint.find_checkpoint(out)
        saved = found.config
        checkpoint.check_checkpoint(found, saved)
        (out / "README.md").write_text(str(make_card(saved, {}, origin=origin)), encoding="utf-8")
    print(f"Imported {origin}\nWrote {options.out}")


def import_peer(folder: Path, options: argparse.Namespace, overrides: dict[str, Any], out: Path) -> str:
    """Writes the checkpoint of a model of another code into `out` and returns a line about its origin."""
    # Imported here: transformers takes seconds, and `--help` must not.
    from ..processor_vla0 import make_vla0_pre_post_processors
    from ..vlm import load_processor, save_vlm

    model_folder = find_model(folder)
    near = [model_folder, model_folder.parent]
    stats_file = options.stats or next(
        filter(Path.is_file, (path / n for path in near for n in STATISTICS)), None
    )
    if stats_file is None:
        raise FileNotFoundError(f"{folder} has no {' or '.join(STATISTICS)}: name it with --stats=<file>.")
    stats = read_stats(stats_file)
    config_file = next(filter(Path.is_file, (path / "config.yaml" for path in near)), None)
    if config_file is not None:
        code, version = "NVlabs/vla0", read_json(model_folder / "config.json").get("transformers_version")
        with reading(config_file):
            dim, settings, reason = nvlabs_settings(config_file, version, options.data_config)
    elif stats_file.suffix == ".json":
        code, dim, settings, reason = "vla0-trl or TinyVLA", len(stats["min"]), DEFAULTS, "the code's default"
    else:
        raise FileNotFoundError(f"{folder} has no config.yaml, which says how the model was trained.")
    settings = settings | overrides
    reason = "as --add_vision_id says" if "add_vision_id" in overrides else reason
    unknown = [name for name, value in settings.items() if value is None]
    if unknown:
        raise ValueError(
            f"{config_file} does not tell {', '.join(unknown)}, or names cameras that are not LIBERO's. Say "
            f"how the model was trained: --{unknown[0]}=<value>, or --data_config=<YAML of the data>."
        )
    if (model_folder / ADAPTER_CONFIG).is_file():
        model, settings["vlm"] = load_merged(model_folder, options.base)
    else:
        model = load_model(model_folder)
    processor = load_processor(model_folder)
    # All codes save the number of pixels of a picture, so that wrong options are noticed.
    pixels, size = processor.image_processor.size["shortest_edge"], settings["image_size"]
    if settings.get("tile_images", True) and pixels != size * size * len(settings["cameras"]):
        raise ValueError(
            f"{model_folder} was made for pictures of {pixels} pixels, not for {len(settings['cameras'])} "
            f"cameras of {size}×{size} side by side: correct --image_size or --cameras."
        )
    config = VLA0Config(
        n_action_steps=settings["chunk_size"],
        input_features=dict.fromkeys(settings["cameras"], CAMERA),
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (dim,))},
        push_to_hub=False,
        dtype=str(model.dtype).removeprefix("torch."),
        **settings,
    )
    check_action_statistics(config, {ACTION: stats}, str(stats_file))
    for part in (config, *make_vla0_pre_post_processors(config, {ACTION: stats})):
        part.save_pretrained(out)
    save_weights(model, out)
    save_vlm(model, processor, out / VLM_FOLDER)
    return f"{model_folder.name} of {code}; add_vision_id={str(config.add_vision_id).lower()}, {reason}."


def find_folder(source: str, revision: str | None, option: str) -> Path:
    """A folder, or the download of a Hub repo. `option` named it."""
    if Path(source).is_dir():
        return Path(source).resolve()
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=DOWNLOADED))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{option}={not_found(source, error)}") from error


def find_model(run: Path) -> Path:
    """The folder that Transformers or PEFT wrote: `run` itself, or the one in it that the three codes name;
    of several model_N or checkpoint-N the last."""
    steps = [path for path in run.iterdir() if re.fullmatch(r"(model_|checkpoint-)\d+", path.name)]
    steps.sort(key=lambda path: int(re.split("[_-]", path.name)[1]), reverse=True)
    for path in [run, run / "model_last", run / "model_final", run / "final", *steps]:
        if (path / ADAPTER_CONFIG).is_file() or (path / "config.json").is_file():
            return path
    raise FileNotFoundError(
        f"{run} holds no model: no config.json, also not in model_*, final or checkpoint-*."
    )


def load_model(folder: Path) -> nn.Module:
    """The model on the CPU, in the type in which its weights are stored (float32 if there are several). It
    knows shards and the names of earlier versions, but only warns if tensors do not fit."""
    from transformers import AutoModelForImageTextToText

    from ..vlm import read_config

    stored = set()
    for file in weight_files(folder):
        with reading(file), safe_open(file, framework="pt") as tensors:
            stored |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    model, report = AutoModelForImageTextToText.from_pretrained(
        folder,
        config=read_config(folder),
        dtype=DTYPES[stored.pop()] if len(stored) == 1 else torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,  # named below instead
        output_loading_info=True,
    )
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *(n for n, *_ in report["mismatched_keys"])]
    # A head of its own although config.json ties it to the embeddings: the policy would not have it.
    if model.config.tie_word_embeddings:
        separate = model.get_output_embeddings().weight is not model.get_input_embeddings().weight
        wrong += ["lm_head.weight"] * separate
    if wrong:
        raise ValueError(f"{folder}: weights are missing or do not fit config.json: {sorted(wrong)[:3]}.")
    return model


def load_merged(adapter: Path, base: str | None) -> tuple[nn.Module, str]:
    """(model with a LoRA adapter merged into its base, name of the base). `base` is where that is now."""
    saved = read_json(adapter / ADAPTER_CONFIG)
    name, revision = saved.get("base_model_name_or_path") or base, saved.get("revision")
    folder = find_folder(base or str(name), None if base else revision, "--base")
    model = load_model(folder)
    checkpoint.check_adapter(model, adapter, folder)
    return checkpoint.import_peft().PeftModel.from_pretrained(model, adapter).merge_and_unload(), name


def save_weights(model: nn.Module, out: Path) -> None:
    # The policy holds the VLM as `model`.
    save_model(nn.ModuleDict({"model": model}), str(out / WEIGHTS))
