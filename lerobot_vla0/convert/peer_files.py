"""What other implementations of VLA-0 save beside the weights: settings (NVlabs/vla0) and statistics (all).

A setting of NVlabs/vla0 is used, must have the one value that this package has, or has no effect on the
policy; an import with any other is refused.
"""

import ast
import pickle
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from ..files import read_json, reading

# RoboVerse's names of LIBERO's cameras -> keys of `lerobot/libero`.
LIBERO_CAMERAS = {"3p1": "observation.images.image", "3p2": "observation.images.image2"}
LIBERO_YAML = "img_libero_aug.yaml"  # of NVlabs/vla0's data; its actions are absolute
DELTA = "LEROBOT.convert_ori_act_to_delta_act"
DATA_DEFAULTS = {"IMAGE.crop_img": 1.0, "IMAGE.img_size": 0, "IMAGE.cam_list": ["3p1"]}
# Settings with the only value that can be imported.
ONLY = {
    "EXP.MODEL": "qwen", "QWEN.history": 1, "QWEN.action_type": "original", "QWEN.use_lora": False,
    "QWEN.rgb_input": True, "QWEN.system_message_version": 1, "QWEN.include_state": False,
    "unifier": "image", "history": 1, DELTA: False, "LEROBOT.fps": -1,
}  # fmt: skip
# Settings with any value: used below, or without effect on the policy.
ANY = """
    QWEN.original_action_dim QWEN.horizon QWEN.qwen_model_id QWEN.num_cam QWEN.rgb_img_size QWEN.add_vision_id
    QWEN.tiled_rgb_imgs QWEN.num_bins_actions QWEN.action_mask_aug_per QWEN.use_qlora QWEN.lora_config
    QWEN.lora_rank QWEN.use_flash_attention_2 QWEN.attention_dropout QWEN.action_mask_aug IMAGE.crop_img
    IMAGE.img_size IMAGE.cam_list IMAGE.return_ee IMAGE.return_ori_act IMAGE.return_proprio
    IMAGE.brightness_aug IMAGE.contrast_aug IMAGE.saturation_aug IMAGE.hue_aug LEROBOT.repo_id
    LEROBOT.le_cam_list LEROBOT.rv_cam_list LEROBOT.action_key LEROBOT.state_key LEROBOT.remove_noop_actions
    horizon datasets load_depth load_original_action
"""
# Names in the pickles of arrays that NumPy 1 (core) and 2 (_core) write.
NAMES = ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")
PICKLED = {"ndarray", "dtype"} | {f"{core}.{name}" for core in ("core", "_core") for name in NAMES}


def nvlabs_settings(file: Path, version: str | None, data_config: Path | None) -> tuple[int, dict, str]:
    """(action dimension, fields of VLA0Config, None if not recorded, reason for add_vision_id).

    Args:
        file: config.yaml of the run.
        version: of Transformers, which saved the model.
        data_config: YAML of the data; None searches the one that `file` names.
    """
    saved = _read_yaml(file)
    loader = dict(saved["DATALOADER"]["ROBOVERSE"])
    data = _data_settings(file, loader.pop("cfg_path"), loader.pop("cfg_opts"), data_config)
    data |= {f"LEROBOT.{name}": value for name, value in loader.items()}  # where some versions have them
    qwen = saved["MODEL"]["QWEN"]
    named = {f"QWEN.{name}": value for name, value in qwen.items()} | {"EXP.MODEL": saved["EXP"]["MODEL"]}
    for name, value in (named | data).items():
        if name not in ONLY and name not in ANY.split():
            raise ValueError(f"{file}: the setting {name}={value!r} is unknown and may change the actions.")
        if value != ONLY.get(name, value):
            raise ValueError(f"{file}: {name} is {value!r}; only {ONLY[name]!r} can be imported.")
    vision_id, reason = _vision_id(qwen["add_vision_id"], version)
    return qwen["original_action_dim"], {
        "vlm": qwen["qwen_model_id"],
        "cameras": _cameras(data, qwen["num_cam"]),
        "chunk_size": qwen["horizon"],
        "num_bins": qwen["num_bins_actions"],
        "image_size": data.get("IMAGE.img_size") or qwen["rgb_img_size"][0],  # 0: the camera's own size
        "crop_ratio": data.get("IMAGE.crop_img"),
        "tile_images": qwen["tiled_rgb_imgs"],
        "add_vision_id": vision_id,
        "picture_rule": "NVlabs",
        "action_mask_prob": qwen["action_mask_aug_per"],
    }, reason  # fmt: skip


def _read_yaml(file: Path) -> Any:
    """As yacs wrote it, whose tag for tuples the safe loader does not know."""
    return yaml.safe_load(file.read_text(encoding="utf-8").replace("!!python/tuple", ""))


def _data_settings(file: Path, path: str, words: str | None, data_config: Path | None) -> dict[str, Any]:
    """Settings of the data, {"IMAGE.crop_img": value}: of the YAML at `path`, if it is at hand, overridden by
    `words`, "IMAGE.crop_img:0.875:IMAGE.img_size:224:..."."""
    parts = words.split(":") if words else []
    overrides = {name: _literal(value) for name, value in zip(parts[::2], parts[1::2], strict=True)}
    candidates = [file.parent / Path(path).name]
    if not Path(path).is_absolute() and ".." not in Path(path).parts:
        candidates += [folder / path for folder in file.parents]  # NVlabs' working folder is one of them
    data_file = data_config or next(filter(Path.is_file, candidates), None)
    if data_file is not None:
        with reading(data_file):
            return DATA_DEFAULTS | _flat(_read_yaml(data_file)) | overrides
    if Path(path).name != LIBERO_YAML and DELTA not in overrides:
        raise ValueError(
            f"{file} was trained on data of {path}, which says whether actions are deltas ({DELTA}). Copy it "
            "beside config.yaml, or name it: --data_config=<file>."
        )
    return overrides


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in settings.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.") if nested else {prefix + name: _literal(value)}
    return flat


def _literal(value: Any) -> Any:
    """As yacs reads a string: a Python literal if it is one."""
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        return value


def _cameras(data: dict[str, Any], count: int) -> list[str] | None:
    """Image keys in the order of the prompt; None if the cameras are not recorded or have no known keys."""
    names, keys = data.get("IMAGE.cam_list") or [], LIBERO_CAMERAS
    own_keys, own_names = data.get("LEROBOT.le_cam_list"), data.get("LEROBOT.rv_cam_list")
    if own_keys and own_names and "libero" not in str(data.get("LEROBOT.repo_id")).lower():
        keys = dict(zip(own_names, own_keys, strict=True))
    cameras = [keys.get(name) for name in ([names] if isinstance(names, str) else names)]
    return None if None in cameras or len(cameras) != count else cameras


def _vision_id(asked: bool, version: str | None) -> tuple[bool | None, str]:
    """Whether "Picture 1: " stood before the picture in training (None: unknown), and the reason.
    Transformers before 4.52 drops add_vision_id silently (4.49.0, 4.50.3 and 4.51.3 do, 4.52.4 does not)."""
    if not asked:
        return False, "as config.yaml says"
    if not re.match(r"\d+\.\d+\.\d", str(version)) or version.startswith("4.52.0.dev"):
        return None, "unknown"
    if tuple(map(int, version.split(".")[:2])) >= (4, 52):
        return True, f"as config.yaml says; transformers {version} writes it"
    return False, f"as transformers {version} drops it, whatever config.yaml says"


# -------------------------------------------------------------------------------- statistics of the actions


class PickledCall:
    """Stands for the result of a function that a pickle names: the call is recorded and not made."""

    def __init__(self, name: str, *arguments: Any) -> None:
        self.name, self.arguments, self.state = name, arguments, None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def numbers(self) -> list[float]:
        """The values of a 1-D array. Anything else, for example an array of objects, is refused."""
        match self.name, self.arguments, self.state:
            case "_reconstruct", _, (_, (int(),), PickledCall() as dtype, _, bytes(raw)):
                pass
            case "_frombuffer", (raw, PickledCall() as dtype, (int(),), _), None:  # pickle protocol 5
                pass
            case _:
                raise TypeError(f"{self.name} makes no array of numbers")
        code, order = dtype.arguments[0], dtype.state[1]
        if not re.fullmatch("[fiu][1248]", code):
            raise TypeError(f"an array of type {code!r}, which is no number")
        return np.frombuffer(raw, np.dtype(code).newbyteorder(order)).tolist()


class StatsUnpickler(pickle.Unpickler):
    """Reads containers, numbers, and NumPy's arrays as PickledCall; nothing that the file names is called."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}".removeprefix("numpy.") not in PICKLED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return partial(PickledCall, name)


def read_stats(file: Path) -> dict[str, Tensor]:
    """`min` and `max` of the actions, float32 (D,) each, from a dataset_stats.pkl or .json."""
    with reading(file):
        actions = (read_json(file) if file.suffix == ".json" else _unpickle(file))["out_ori_act"]
        return {name: torch.tensor(_vector(actions[name]), dtype=torch.float32) for name in ("min", "max")}


def _unpickle(file: Path) -> Any:
    try:
        with file.open("rb") as stream:
            return StatsUnpickler(stream).load()
    except Exception as error:  # the instructions of a damaged pickle raise anything
        raise ValueError(
            f"{file} is no pickle of numbers and NumPy arrays ({error}). None of it ran."
        ) from error


def _vector(values: Any) -> list[float]:
    return values.numbers() if isinstance(values, PickledCall) else [float(value) for value in values]
