"""Runs of other implementations of VLA-0: reference data, which leaves out the weights, and random ones."""

import json
import shutil
from pathlib import Path

import torch
from conftest import shared
from safetensors.torch import save_file

DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


def make_run(name: str, out: Path, *models: str) -> Path:
    """The run folder `name` with its folders `models`: what the code wrote, the tokenizer, and weights that
    fit the listed tensors."""
    layout, tokenizer = shared("peer_layouts") / name, shared("qwen_tokenizer")
    out.mkdir(parents=True, exist_ok=True)
    for file in layout.iterdir():
        if file.is_file() and file.name != "FILES.txt":
            shutil.copyfile(file, out / file.name)
    for model in models:
        (out / model).mkdir()
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tokenizer / file, out / model / file)
        for file in (layout / model).iterdir():
            if not file.name.endswith(".header.json"):
                shutil.copyfile(file, out / model / file.name)
                continue
            generator = torch.Generator().manual_seed(0)
            tensors = {
                key: torch.randn(shape, generator=generator).mul_(0.1).to(DTYPES[dtype])
                for key, (dtype, shape) in json.loads(file.read_text()).items()
                if key != "__metadata__"
            }
            save_file(tensors, out / model / file.name.removesuffix(".header.json"), {"format": "pt"})
    return out
