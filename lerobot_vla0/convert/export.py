"""`lerobot-vla0 export`: a checkpoint as a plain Transformers folder, for serving engines and other code.
`action_spec.json` in it says how to ask the model for actions and how to read what it writes."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..checkpoint import VLM_FOLDER, find_checkpoint
from ..configuration_vla0 import VLA0Config
from ..files import new_folder, read_json
from ..options import PolicyOptions

ACTION_SPEC = "action_spec.json"
SPEC_VERSION = 1
PICTURE_FIELDS = (
    "camera_regions", "image_fit", "crop_ratio", "crop_rounding", "image_size", "tile_images",
    "resize_antialias",
)  # fmt: skip
SHARD_BYTES = 2 * 1024**3  # largest file of weights


@dataclass(kw_only=True)
class ExportConfig(PolicyOptions):
    """What to export. `--policy.path=` names the checkpoint, a folder or a Hub repo."""

    # Folder to write.
    out: Path


def export(config: ExportConfig) -> Path:
    """Writes the folder to `config.out` and returns it. `AutoModelForImageTextToText` and `AutoProcessor`
    load it, and so do `transformers serve`, `vllm serve` and `sglang.launch_server`. An export that fails
    leaves nothing behind.

    Raises:
        FileExistsError: `out` exists and is not empty.
        ValueError: no policy, one of another type, or an adapter.
        FileNotFoundError: a file of the checkpoint is missing.
    """
    policy = config.require_policy("which checkpoint?")
    out, path = Path(config.out), str(policy.pretrained_path)
    with new_folder(out) as part:
        checkpoint = find_checkpoint(path, revision=policy.pretrained_revision)
        if checkpoint.kind == "adapter":
            raise ValueError(
                f"{path} is an adapter: fold it into its base first "
                f"(lerobot-vla0 merge --policy.path={path})."
            )
        write_export(checkpoint.folder, policy, part)
    print(f"Wrote {out}")
    return out


def write_export(folder: Path, config: VLA0Config, out: Path) -> None:
    """Writes what Transformers loads, and action_spec.json.

    Args:
        folder: the checkpoint.
        config: its config, overrides included.
        out: an empty folder.
    """
    # Imported here: transformers takes seconds, and `--help` must not.
    from transformers import GenerationConfig

    from ..backbone import VISION_ID_SET
    from ..families import family
    from ..modeling_vla0 import VLA0Policy

    on_cpu = replace(config, device="cpu", attn_implementation=None, server=None)
    policy = VLA0Policy.from_pretrained(folder, config=on_cpu)
    model, processor, chat = policy.model, policy.vlm_processor, policy.examples.chat
    (out / ACTION_SPEC).write_text(json.dumps(action_spec(folder, config, chat), indent=2))
    # Serving engines apply generation_config.json to every request. The base model's may ask for sampling
    # and a repetition penalty.
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=chat.end_id, pad_token_id=chat.pad_id
    )
    # Tensors are named as in the model; by default Transformers writes the names from before its version
    # 4.52.
    model.save_pretrained(out, max_shard_size=SHARD_BYTES, save_original_format=False)
    # Engines do not know the settings in `config`, so chat template and processor get them as their defaults.
    template = processor.chat_template
    if "add_vision_id" in template:
        template = VISION_ID_SET[config.add_vision_id] + template
    if chat.lead:
        template += "{% if add_generation_prompt %}{{ " + repr(chat.lead) + " }}{% endif %}"
    processor.chat_template = processor.tokenizer.chat_template = template
    family(processor).pin_picture_size(processor, *chat.picture_size)
    processor.save_pretrained(out)
    # preprocessor_config.json, which Transformers 4 and engines built on it read.
    processor.image_processor.save_pretrained(out)


def action_spec(folder: Path, config: VLA0Config, chat: Any) -> dict[str, Any]:
    """Content of action_spec.json: what a client needs besides the model and, under `checkpoint`, the files
    of the checkpoint that Transformers' folder does not hold, for `lerobot-vla0 import`."""
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
        "regex": chat.grammar.regex(),
        "max_tokens": chat.grammar.max_tokens,
        "chunk_size": config.chunk_size,
        "action_dim": config.action_feature.shape[0],
        "num_bins": config.num_bins,
        "cameras": config.camera_keys,
        "pictures": {
            "count": chat.num_pictures,
            "height": chat.picture_size[0],
            "width": chat.picture_size[1],
            "preparation": "each camera: its part at camera_regions ([top, left, height, width] in shares, "
            "edges rounded to pixels), if it has one; centre crop of crop_ratio of height and width "
            "(crop_rounding: where it begins if it lies between two pixels), bilinear resize of floats to "
            "image_size × image_size, truncated to bytes; image_fit crop takes the middle square before, "
            "letterbox resizes the longer side to image_size and centres the picture on black; with "
            "tile_images side by side in the order of `cameras`",
            **{name: getattr(config, name) for name in PICTURE_FIELDS},
        },
        "state": "appended to the instruction as '\\nState: <integers>'" if config.use_state else None,
        "normalization": config.normalization_mapping["ACTION"].value,
        "reading": "integers, timestep after timestep: x = integer / num_bins * 2 - 1 in [-1, 1], then "
        "undo `normalization` with `statistics`"
        + (", which depend on the task (vla0_task_*)" if config.action_norm == "task" else ""),
        "relative": "add the state of the picture's moment, unless a name of the action contains one of "
        f"{list(config.relative_exclude_joints)}: {config.action_feature_names}"
        if config.use_relative_actions
        else None,
        "statistics": statistics,
        "checkpoint": {
            "files": {str(f.relative_to(folder)): read_json(f) for f in sorted(files)},
            "state": state,
        },
    }
