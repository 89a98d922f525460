"""`lerobot-vla0 export`: a checkpoint as a plain Transformers folder, for serving engines and other code.

config.json, *.safetensors, tokenizer.json, ...   model and processor, as Transformers loads them
action_spec.json   how to ask the model for actions and how to read what it writes (README.md)
lerobot/           the checkpoint without its weights, for `lerobot-vla0 import`
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint import POSTPROCESSOR, VLM_FOLDER, Checkpoint, find_checkpoint
from ..cli import PolicyOptions
from ..configuration_vla0 import VLA0Config
from ..files import new_folder

ACTION_SPEC, CHECKPOINT_FOLDER = "action_spec.json", "lerobot"
SPEC_VERSION = 2
# Fields of the config that a client needs as they are.
FIELDS = (
    "chunk_size", "num_bins", "camera_regions", "image_fit", "crop_ratio", "image_size", "tile_images",
    "picture_rule", "use_state", "action_norm", "use_relative_actions", "relative_exclude_joints",
    "action_feature_names",
)  # fmt: skip
SHARD_BYTES = 2 * 1024**3  # largest file of weights


@dataclass(kw_only=True)
class ExportConfig(PolicyOptions):
    """What to export. `--policy.path=` names the checkpoint, a folder or a Hub repo."""

    # Folder to write.
    out: Path


def export(config: ExportConfig) -> Path:
    """Writes the folder to `config.out` and returns it. `transformers serve`, `vllm serve` and
    `sglang.launch_server` load it.

    Raises:
        FileExistsError: `out` exists and is not empty.
        ValueError: the checkpoint is an adapter.
    """
    policy = config.require_policy("which checkpoint?")
    checkpoint = find_checkpoint(str(policy.pretrained_path), revision=policy.pretrained_revision)
    if checkpoint.kind == "adapter":
        raise ValueError(
            f"{policy.pretrained_path} is an adapter: fold it into its base first "
            f"(lerobot-vla0 merge --policy.path={policy.pretrained_path})."
        )
    with new_folder(config.out) as out:
        _write_model(checkpoint, policy, out)
        for pattern in ("config.json", "policy_*", f"{VLM_FOLDER}/*.json"):
            for file in checkpoint.folder.glob(pattern):
                copy = out / CHECKPOINT_FOLDER / file.relative_to(checkpoint.folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
    print(f"Wrote {config.out}")
    return config.out


def _write_model(checkpoint: Checkpoint, config: VLA0Config, out: Path) -> None:
    # Imported here: transformers takes seconds, and `--help` must not.
    from transformers import GenerationConfig

    from ..families import family
    from ..modeling_vla0 import VLA0Policy
    from ..vlm import VISION_ID_SET

    on_cpu = replace(config, device="cpu", attn_implementation=None, server=None)
    policy = VLA0Policy.from_pretrained(checkpoint.folder, config=on_cpu)
    model, processor, chat = policy.model, policy.vlm_processor, policy.examples.chat
    (out / ACTION_SPEC).write_text(json.dumps(action_spec(checkpoint, config, chat), indent=2))
    # Engines apply generation_config.json to every request; a base model's may ask for sampling.
    ends = {"eos_token_id": chat.end_id, "pad_token_id": chat.pad_id}
    model.generation_config = GenerationConfig(do_sample=False, **ends)
    # Names of tensors as in the model; the default are those of Transformers before 4.52.
    model.save_pretrained(out, max_shard_size=SHARD_BYTES, save_original_format=False)
    # Engines do not know the policy's settings, so chat template and processor have them as defaults.
    template = processor.chat_template
    if "add_vision_id" in template:
        template = VISION_ID_SET[config.add_vision_id] + template
    if chat.lead:
        template += "{% if add_generation_prompt %}{{ " + repr(chat.lead) + " }}{% endif %}"
    processor.chat_template = processor.tokenizer.chat_template = template
    family(processor).pin_picture_size(processor, *chat.picture_size)
    processor.save_pretrained(out)
    processor.image_processor.save_pretrained(out)  # preprocessor_config.json, for Transformers 4


def action_spec(checkpoint: Checkpoint, config: VLA0Config, chat: Any) -> dict[str, Any]:
    """What a client needs besides the model. `chat` is the policy's ChatFormatter."""
    statistics = checkpoint.statistics.get(POSTPROCESSOR, {})
    return {
        "spec_version": SPEC_VERSION,
        "messages": chat.messages("{instruction}"),
        "regex": chat.grammar.regex(),
        "max_tokens": chat.grammar.max_tokens,
        "action_dim": config.action_feature.shape[0],
        "cameras": config.camera_keys,
        "pictures": {"count": chat.num_pictures, "size": list(chat.picture_size)},  # [height, width]
        "normalization": config.normalization_mapping["ACTION"].value,
        "statistics": {
            feature: {name: values.tolist() for name, values in of_feature.items()}
            for feature, of_feature in statistics.items()
        },
        **{name: getattr(config, name) for name in FIELDS},
    }
