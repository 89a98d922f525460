"""Weights between Transformers' folders and ours: names, shapes and types from the files' headers, tensors
one at a time, so that a model need not fit into memory."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

# safetensors' names, as in its README, of the types that weights come in.
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def find_weights(folder: Path) -> dict[str, tuple[Path, list[int], str]]:
    """Name → (file, shape, safetensors' type) of every tensor, shards included.

    Raises:
        FileNotFoundError: no safetensors, or a shard is missing.
        ValueError: a file is truncated.
    """
    index = folder / "model.safetensors.index.json"
    files = [folder / "model.safetensors"]
    if index.is_file():
        files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    found = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing. Weights are read from safetensors, all shards of them; older files "
                "(.pth, .bin) are converted by loading and saving the model with Transformers."
            )
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    if name in found:
                        raise ValueError(
                            f"{name} is in {found[name][0]} and in {file}: copy the model again."
                        )
                    part = tensors.get_slice(name)
                    found[name] = file, part.get_shape(), part.get_dtype()
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or no safetensors: copy it again ({error}).") from error
    return found


def policy_names(weights: dict[str, tuple[Path, list[int], str]], model: torch.nn.Module) -> dict[str, str]:
    """Name in the files → name in the policy, of every tensor that is written.

    Raises:
        ValueError: tensors are missing, unknown or of another shape than the model's config says.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if tied:
        del expected["lm_head.weight"]
    # Transformers writes Qwen2.5-VL's weights under the names they had before 4.52.
    renamings = get_model_conversion_mapping(model, add_legacy=False)
    names, wrong = {}, []
    for name, (_, shape, dtype) in weights.items():
        if tied and name == "lm_head.weight":
            continue  # a second copy of the embeddings
        target = name
        for renaming in renamings:
            target, _ = renaming.rename_source_key(target)
        if target not in expected:
            target = f"model.{target}"  # "visual...", from before 4.52
        if target not in expected:
            wrong.append(f"{name} is unknown")
        elif shape != expected[target]:
            wrong.append(f"{name} has shape {shape} instead of {expected[target]}")
        elif dtype not in DTYPES:
            wrong.append(f"{name} is of type {dtype}, not {', '.join(DTYPES)}")
        names[name] = f"model.{target}"
    missing = sorted({f"model.{name}" for name in expected} - set(names.values()))
    wrong += [f"{name.removeprefix('model.')} is missing" for name in missing]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"the weights do not fit the model's config.json: {'; '.join(wrong[:3])}{more}.")
    return names


def common_dtype(weights: dict[str, tuple[Path, list[int], str]], names: dict[str, str]) -> str:
    found = {weights[name][2] for name in names}
    return DTYPES[found.pop()] if len(found) == 1 else "float32"


def write_weights(weights: dict[str, tuple[Path, list[int], str]], names: dict[str, str], out: Path) -> None:
    """Copies tensors under new names into one file, one at a time: safetensors' own writer takes all at
    once.

    The format (github.com/huggingface/safetensors#format): the header's length as 8 bytes, the header as
    JSON, then the tensors' bytes in its order.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, target in names.items():
        _, shape, dtype = weights[name]
        start, end = end, end + int(np.prod(shape)) * getattr(torch, DTYPES[dtype]).itemsize
        header[target] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(out, "wb") as stream, tqdm(total=end, unit="B", unit_scale=True, desc=out.name) as bar:
        stream.write(struct.pack("<Q", len(text)) + text)
        for file in dict.fromkeys(weights[name][0] for name in names):
            with safe_open(file, framework="pt") as tensors:
                for name in (n for n in names if weights[n][0] == file):
                    content = tensors.get_tensor(name).reshape(-1).view(torch.uint8).numpy()
                    stream.write(content)
                    bar.update(len(content))
