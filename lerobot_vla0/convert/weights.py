"""Weights of a Transformers folder, and of a LoRA adapter on it → weights of a checkpoint.

Transformers loads them, because it knows shards, tied weights and the names that its earlier versions wrote.
It only warns about tensors that are missing or do not fit; here they are errors.
"""

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_model
from torch import nn

from ..files import check_kinds, not_found, weight_files

# safetensors' names of the types that weights come in.
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# What is downloaded of a Hub repo.
FILES = ["*.json", "*.safetensors", "*.yaml", "dataset_stats.pkl", "*.jinja", "*merges.txt"]


def find_folder(source: str, revision: str | None, option: str) -> Path:
    """The folder on this machine of a folder or Hub repo.

    Args:
        option: that named it, for the message.

    Raises:
        FileNotFoundError: neither a folder nor a repo that can be read.
    """
    if Path(source).is_dir():
        check_kinds(Path(source))
        return Path(source).resolve()
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=FILES))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(f"{option}={not_found(source, error)}") from error


def copy_weights(folder: Path, file: Path, adapter: Path | None = None) -> nn.Module:
    """Writes the weights of the model in `folder` to `file` under the names that they have in the policy, in
    the type in which they are stored (float32 if there are several). One copy of the model is in memory.

    Args:
        adapter: folder of a LoRA adapter that is merged into them.

    Returns:
        The model, on the CPU.

    Raises:
        FileNotFoundError: no safetensors, or a shard is missing.
        ValueError: a file is truncated, tensors are missing, unknown or of another shape or type than the
            model's config says, or the adapter does not fit the model.
        ImportError: an adapter, and peft is not installed.
    """
    # Imported here: transformers takes seconds, and `--help` must not.
    from transformers import AutoModelForImageTextToText

    from ..adapters import check_adapter, import_peft
    from ..backbone import read_config

    stored = _stored_types(folder)
    _refuse([f"{n} is of type {t}, not {', '.join(DTYPES)}" for n, t in stored.items() if t not in DTYPES])
    types = set(stored.values())
    model, found = AutoModelForImageTextToText.from_pretrained(
        folder,
        config=read_config(folder),
        dtype=DTYPES[types.pop()] if len(types) == 1 else torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,  # listed like the others, all of them, instead of an exception
        output_loading_info=True,
    )
    wrong = [f"{name} is unknown" for name in sorted(found["unexpected_keys"])]
    wrong += [
        f"{name} has shape {list(shape)} instead of {list(expected)}"
        for name, shape, expected in sorted(found["mismatched_keys"])
    ]
    wrong += [f"{name} is missing" for name in sorted(found["missing_keys"])]
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    # Transformers leaves them apart then; a policy could not: its model is built from the config.
    if model.config.tie_word_embeddings and head is not embeddings:
        wrong.append("lm_head.weight differs from the embeddings that it is tied to")
    _refuse(wrong)
    if adapter is not None:
        check_adapter(model, adapter, folder)
        model = import_peft().PeftModel.from_pretrained(model, adapter).merge_and_unload()
    save_model(nn.ModuleDict({"model": model}), str(file))  # LeRobot's policy holds the VLM as `model`
    return model


def _refuse(wrong: list[str]) -> None:
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"the weights do not fit the model's config.json: {'; '.join(wrong[:3])}{more}.")


def _stored_types(folder: Path) -> dict[str, str]:
    """Name → safetensors' type of every tensor, from the headers of all shards."""
    types: dict[str, str] = {}
    for file in weight_files(folder):
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing. Weights are read from safetensors, all shards of them; older files "
                "(.pth, .bin) are converted by loading and saving the model with Transformers."
            )
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    if name in types:
                        raise ValueError(f"{name} is in {file} and in another shard: copy the model again.")
                    types[name] = tensors.get_slice(name).get_dtype()
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or no safetensors: copy it again ({error}).") from error
    return types
