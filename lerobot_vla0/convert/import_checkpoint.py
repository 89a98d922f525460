"""`lerobot-vla0 import`: checkpoints of the other implementations of VLA-0 (import_peer.py), and folders that
`lerobot-vla0 export` wrote, as checkpoints of this package. Any other layout is refused."""

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from lerobot.configs import PreTrainedConfig
from safetensors.torch import save_file

from ..checkpoint import VLM_FOLDER, WEIGHTS, admit_processors, check_checkpoint
from ..files import new_folder, read_json, reading
from .card import make_card
from .export import ACTION_SPEC, SPEC_VERSION
from .import_nvlabs import LIBERO_CAMERAS, PeerOptions
from .import_peer import import_peer
from .weights import copy_weights, find_folder


def main(argv: list[str]) -> None:
    """Parses the command line and imports. By argparse: draccus names options after fields, and `from` is a
    keyword of Python."""
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
        help="folder or Hub repo: the run, or the model's folder in it; NVlabs' run/model_last.pth means "
        "run/model_last",
    )
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--stats", type=Path, help="dataset_stats.pkl or .json, where it lies elsewhere")
    parser.add_argument("--revision", help="commit, branch or tag of the Hub repo")
    parser.add_argument(
        "--base",
        help="of a LoRA adapter: folder or Hub repo of the model that it was trained on (default: what its "
        "adapter_config.json names)",
    )
    parser.add_argument(
        "--data_config", type=Path, help="of NVlabs/vla0: the data's YAML that config.yaml names (cfg_path)"
    )
    parser.add_argument(
        "--add_vision_id",
        type=yaml_value,
        help='true or false: whether "Picture 1: " stands before the picture (default: as the model was '
        "trained, which config.yaml and the version of Transformers tell)",
    )
    parser.add_argument(
        "--cameras",
        type=yaml_value,
        help="image keys in the order that the model was trained on (default: LIBERO's, "
        f"'[{', '.join(LIBERO_CAMERAS.values())}]')",
    )
    unsaid = "; vla0-trl and TinyVLA do not record it (default: their code's, {})"
    parser.add_argument("--chunk_size", type=int, help="timesteps per prediction" + unsaid.format(8))
    parser.add_argument("--num_bins", type=int, help="largest integer" + unsaid.format(1000))
    parser.add_argument("--image_size", type=int, help="pixels per camera" + unsaid.format(224))
    parser.add_argument("--crop_ratio", type=float, help="share of a picture kept" + unsaid.format(0.875))
    import_checkpoint(**vars(parser.parse_args(argv)))


def yaml_value(text: str) -> Any:
    """A value of the command line; argparse shows this function's name where it is none."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError from error


def import_checkpoint(source: str, out: Path, *, revision: str | None = None, **options: Any) -> Path:
    """Writes the checkpoint, processors included, to `out` and returns it. Weights keep their type.

    Args:
        source: folder or Hub repo, a run or the model's folder in it.
        out: a folder that is not there, or empty.
        revision: commit, branch or tag of the Hub repo.
        options: see PeerOptions.

    Raises:
        FileExistsError: `out` exists and is not empty.
        FileNotFoundError: nothing is there, or weights, statistics or config.yaml are missing.
        ValueError: a layout that is none of the four, a setting that this package does not have, or weights
            that do not fit the model's config.
    """
    peer, cameras, vision_id = PeerOptions(**options), options.get("cameras"), options.get("add_vision_id")
    if cameras is not None and not (isinstance(cameras, list) and all(isinstance(c, str) for c in cameras)):
        raise ValueError(f"--cameras={cameras!r} is not allowed: it must be a list, '[first, second]'.")
    if not (vision_id is None or isinstance(vision_id, bool)):
        raise ValueError(f"--add_vision_id={vision_id!r} is not allowed: it must be true or false.")
    with new_folder(out) as part:
        folder = _find(source, revision)
        if (folder / ACTION_SPEC).is_file():
            for name, value in vars(peer).items():
                if value is not None:
                    raise ValueError(
                        f"--{name} does not apply here: {folder / ACTION_SPEC} records how the model was "
                        "trained. Leave it out."
                    )
            with reading(folder / ACTION_SPEC):
                _import_exported(folder, part)
            admit_processors(part)
            shutil.copyfile(folder / "tokenizer.json", part / VLM_FOLDER / "tokenizer.json")
            copy_weights(folder, part / WEIGHTS)
            message, imported = "Imported an exported checkpoint.", None
        else:
            imported = import_peer(folder, peer, part)
            message = imported.message
        saved = PreTrainedConfig.from_pretrained(part)
        check_checkpoint(part, saved, saved)
        if imported is not None:
            card = make_card(saved, {}, imported.stats, imported=imported.origin)
            (part / "README.md").write_text(str(card))
    print(f"{message}\nWrote {out}")
    return Path(out)


def _find(source: str, revision: str | None) -> Path:
    """As `find_folder`. NVlabs/vla0 names a model by the small file beside its folder: run/model_last.pth."""
    if not source.endswith(".pth"):
        return find_folder(source, revision, "--from")
    folder = Path(source).with_suffix("")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"--from={source!r}: the model's folder {folder} is not there. The .pth file holds no weights: "
            "copy the folder beside it, too."
        )
    return folder.resolve()


def _import_exported(folder: Path, out: Path) -> None:
    """Undoes `lerobot-vla0 export`. action_spec.json holds the files of the checkpoint that Transformers'
    folder does not."""
    spec = read_json(folder / ACTION_SPEC)
    version, files, state = spec["spec_version"], spec["checkpoint"]["files"], spec["checkpoint"]["state"]
    if version > SPEC_VERSION:
        raise ValueError(
            f"{folder / ACTION_SPEC} has spec_version {version}, this package reads up to {SPEC_VERSION}: "
            "pip install -U lerobot_policy_vla0."
        )
    (out / VLM_FOLDER).mkdir()
    for name, content in files.items():
        _must_be("file of a checkpoint", rf"({VLM_FOLDER}/)?\w[\w.-]*\.json", name, folder)
        (out / name).write_text(json.dumps(content, indent=2))
    for name, tensors in state.items():
        _must_be("file of a checkpoint", r"policy_\w[\w.-]*\.safetensors", name, folder)
        values = {}
        for key, saved in tensors.items():
            _must_be("type of numbers", "float(16|32|64)|bfloat16|u?int(8|16|32|64)", saved["dtype"], folder)
            values[key] = torch.tensor(saved["values"], dtype=getattr(torch, saved["dtype"]))
        save_file(values, out / name)


def _must_be(what: str, pattern: str, name: str, folder: Path) -> None:
    if len(name) > 200 or not re.fullmatch(pattern, name, re.ASCII):
        raise ValueError(f"{folder / ACTION_SPEC} names {name[:200]!r}, which is no {what}.")
