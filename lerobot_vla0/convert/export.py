"""`lerobot-vla0 export`: a checkpoint as a plain Transformers folder, for serving engines and other code.
`action_spec.json` in it says how to ask the model for actions and how to read what it writes."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from ..checkpoint import ADAPTER_CONFIG, VLM_FOLDER, WEIGHTS, check_checkpoint, new_folder
from ..configuration_vla0 import VLA0Config
from ..options import PolicyOptions

ACTION_SPEC = "action_spec.json"
SPEC_VERSION = 1
SHARD_BYTES = 2 * 1024**3  # what is held in memory at a time
# LeRobot's policy holds the VLM as `model`.
POLICY_PREFIX = "model."


@dataclass(kw_only=True)
class ExportConfig(PolicyOptions):
    """What to export. `--policy.path=` names the checkpoint, a folder or a Hub repo."""

    # Folder to write.
    out: Path


def export(config: ExportConfig) -> Path:
    """Writes the folder to `config.out` and returns it. `AutoModelForImageTextToText` and `AutoProcessor`
    load it, and so do `transformers serve`, `vllm serve` and `sglang.launch_server`. All or nothing: it is
    written beside `out` and renamed at the end.

    Raises:
        FileExistsError: `out` exists and is not empty.
        ValueError: no policy, or an adapter.
        FileNotFoundError: a file of the checkpoint is missing.
    """
    if config.policy is None:
        raise ValueError("which checkpoint? --policy.path=<checkpoint folder or Hub repo>")
    out, path = Path(config.out), str(config.policy.pretrained_path)
    with new_folder(out) as part:
        folder = Path(path)
        if not folder.is_dir():
            revision, patterns = config.policy.pretrained_revision, ["*.json", "*.safetensors"]
            folder = Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
        if (folder / ADAPTER_CONFIG).is_file():
            raise ValueError(
                f"{path} is an adapter: fold it into its base first "
                f"(lerobot-vla0 merge --policy.path={path})."
            )
        check_checkpoint(folder, config.policy, config.policy)
        _write(folder, config.policy, part)
    print(f"Wrote {out}")
    return out


def _write(folder: Path, config: VLA0Config, out: Path) -> None:
    # Imported here: transformers takes seconds, and `--help` must not.
    from transformers import AutoConfig, AutoProcessor, GenerationConfig

    from ..examples import ExampleMaker
    from ..families import family

    processor = AutoProcessor.from_pretrained(folder / VLM_FOLDER)
    chat = ExampleMaker(config, processor).chat
    spec = action_spec(folder, config, chat)
    (out / ACTION_SPEC).write_text(json.dumps(spec, indent=2))
    AutoConfig.from_pretrained(folder / VLM_FOLDER).save_pretrained(out)
    # Engines apply this file silently; the base model's may ask for sampling and a repetition penalty.
    GenerationConfig(do_sample=False, eos_token_id=chat.end_id, pad_token_id=chat.pad_id).save_pretrained(out)
    # Engines know nothing of our settings: the template and the processor do by default what they were
    # trained with.
    template = processor.chat_template
    if "add_vision_id" in template:
        template = "{% set add_vision_id = " + str(config.add_vision_id).lower() + " %}" + template
    if chat.lead:
        template += "{% if add_generation_prompt %}{{ " + repr(chat.lead) + " }}{% endif %}"
    processor.chat_template = processor.tokenizer.chat_template = template
    family(processor).pin_picture_size(processor, *chat.picture_size)
    processor.save_pretrained(out)
    # Where Transformers 4 (and engines built on it) look.
    processor.image_processor.save_pretrained(out)
    _copy_weights(folder / WEIGHTS, out)


def action_spec(folder: Path, config: VLA0Config, chat: Any) -> dict[str, Any]:
    """What a client needs besides the model, and, under `checkpoint`, all else that the checkpoint holds."""
    from ..decoding.grammar import IntegerGrammar

    count = config.chunk_size * config.action_feature.shape[0]
    grammar = IntegerGrammar(count, config.num_bins, chat.digit_ids, chat.space_id, chat.end_id)
    state = {}
    for file in sorted(folder.glob("policy_*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            state[file.name] = {
                key: {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}
                for key in tensors.keys()  # noqa: SIM118 (not a dict)
                for value in [tensors.get_tensor(key)]
            }
    statistics: dict[str, dict[str, Any]] = {}
    for name, tensors in state.items():
        for key, value in tensors.items() if "unnormalizer" in name else ():
            feature, _, statistic = key.rpartition(".")
            statistics.setdefault(feature, {})[statistic] = value["values"]
    # tokenizer.json is the same in the exported folder.
    files = [*folder.glob("*.json"), *(folder / VLM_FOLDER).glob("*.json")]
    files = [f for f in files if f.name not in ("tokenizer.json", "train_config.json")]
    return {
        "spec_version": SPEC_VERSION,
        "messages": chat.messages("{instruction}"),
        "regex": grammar.regex,
        "max_tokens": grammar.max_tokens,
        "chunk_size": config.chunk_size,
        "action_dim": config.action_feature.shape[0],
        "num_bins": config.num_bins,
        "cameras": config.camera_keys,
        "pictures": {
            "count": chat.num_pictures,
            "height": chat.picture_size[0],
            "width": chat.picture_size[1],
            "preparation": "each camera: centre crop of crop_ratio of height and width, bilinear resize to "
            "image_size × image_size; with tile_images side by side in the order of `cameras`",
            **{
                name: getattr(config, name)
                for name in ("crop_ratio", "image_size", "tile_images", "resize_antialias")
            },
        },
        "state": "appended to the instruction as '\\nState: <integers>'" if config.use_state else None,
        "normalization": config.normalization_mapping["ACTION"].value,
        "reading": "integers, timestep after timestep: x = integer / num_bins * 2 - 1 in [-1, 1], then "
        "undo `normalization` with `statistics`"
        + (", which depend on the task (vla0_task_*)" if config.action_norm == "task" else ""),
        "statistics": statistics,
        "checkpoint": {
            "files": {str(f.relative_to(folder)): json.loads(f.read_text()) for f in sorted(files)},
            "state": state,
        },
    }


def _copy_weights(weights: Path, out: Path) -> None:
    """The tensors of a checkpoint under Transformers' names, a shard at a time."""
    with safe_open(weights, framework="pt") as tensors:
        # Of tied tensors one is stored, under either name; Transformers ties the head to the embeddings.
        stored = {
            kept: removed for removed, kept in (tensors.metadata() or {}).items() if removed != "format"
        }
        names = {}
        for key in tensors.keys():  # noqa: SIM118 (not a dict)
            name = stored[key] if key.endswith("lm_head.weight") and key in stored else key
            names[key] = name.removeprefix(POLICY_PREFIX)
        shards: list[list[str]] = [[]]
        total = held = 0
        for key in names:
            size = _bytes(tensors.get_slice(key))
            if held and held + size > SHARD_BYTES:
                shards.append([])
                held = 0
            shards[-1].append(key)
            held, total = held + size, total + size
        index = {}
        for number, keys in enumerate(shards, 1):
            file = WEIGHTS
            if len(shards) > 1:
                file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                logging.info(f"weights: {number} of {len(shards)}")
            _save({names[key]: tensors.get_tensor(key) for key in keys}, out / file)
            index |= {names[key]: file for key in keys}
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (out / f"{WEIGHTS}.index.json").write_text(json.dumps(content, indent=2))


def _bytes(tensor: Any) -> int:
    """Of a slice of a safetensors file, without reading it."""
    count = 1
    for size in tensor.get_shape():
        count *= size
    return count * {"BF16": 2, "F16": 2, "F32": 4}[tensor.get_dtype()]


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, file, metadata={"format": "pt"})
