"""Runs of other implementations of VLA-0: reference data, which leaves out the weights, with random ones; and
runs on a tiny VLM."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import torch
import yaml
from conftest import shared
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}
LOW = [-0.9375, -0.9375, -0.9375, -0.2582143, -0.375, -0.3675, -1.0]
HIGH = [0.9375, 0.9375, 0.9375, 0.3557143, 0.375, 0.375, 1.0]
QWEN = {
    "action_type": "original", "original_action_dim": 7, "horizon": 8, "history": 1, "num_cam": 2,
    "qwen_model_id": "Qwen/Qwen2.5-VL-3B-Instruct", "use_lora": False, "use_qlora": False,
    "rgb_input": True, "rgb_img_size": (224, 224), "add_vision_id": True, "tiled_rgb_imgs": True,
    "num_bins_actions": 1000, "action_mask_aug_per": 0.4,
}  # fmt: skip
WORDS = "IMAGE.crop_img:0.875:IMAGE.img_size:224:IMAGE.cam_list:('3p1','3p2')"
LIBERO_YAML = "libs/RoboVerse/roboverse/configs/img_libero_aug.yaml"


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


def save_model(vlm: Path, folder: Path, seed: int = 3) -> Path:
    """As the three codes do: a Transformers folder, the processor made for a picture of 224×448."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_pretrained(vlm)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(vlm, min_pixels=224 * 448, max_pixels=224 * 448).save_pretrained(folder)
    return folder


def write_config(
    folder: Path, words: str | None = WORDS, path: str = LIBERO_YAML, loader: dict | None = None, **qwen
) -> Path:
    """config.yaml of NVlabs/vla0."""
    roboverse = {"cfg_path": path, "cfg_opts": words} | (loader or {})
    config = {
        "EXP": {"MODEL": "qwen"},
        "MODEL": {"QWEN": QWEN | qwen},
        "DATALOADER": {"ROBOVERSE": roboverse},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.dump(config))  # tuples become !!python/tuple
    return folder / "config.yaml"


def write_stats(folder: Path, name: str) -> Path:
    if name.endswith("json"):
        (folder / name).write_text(json.dumps({"out_ori_act": {"min": LOW, "max": HIGH}}))
    else:
        arrays = {"out_ori_act": {"min": np.array(LOW), "max": np.array(HIGH), "n": np.int64(3)}}
        (folder / name).write_bytes(pickle.dumps(arrays, protocol=4))
    return folder / name
