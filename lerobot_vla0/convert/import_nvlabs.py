"""Settings of NVlabs/vla0 → settings of a policy. They are in the config.yaml that its training wrote, and in
the YAML of the data that this names.

A setting is used, has one value that can be imported, or has no effect on what the policy does; any other is
refused by name.
"""

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from packaging.version import InvalidVersion, Version

from ..files import reading

# RoboVerse's names of LIBERO's cameras (its img_libero_aug.yaml: image, wrist_image), and `lerobot/libero`'s.
LIBERO_CAMERAS = {"3p1": "observation.images.image", "3p2": "observation.images.image2"}
# The data's YAML that NVlabs/vla0 comes with: absolute actions of the robot. Another one has to be at hand.
LIBERO_YAML = "img_libero_aug.yaml"
MAX_ALIASES = 20
DELTA = "LEROBOT.convert_ori_act_to_delta_act"

# MODEL.QWEN: the only value that can be imported, and what says how it was trained or computed only.
MODEL_VALUES = {
    "history": 1,
    "action_type": "original",
    "use_lora": False,
    "rgb_input": True,
    "system_message_version": 1,
    "include_state": False,
}
MODEL_USED = {
    "original_action_dim", "horizon", "qwen_model_id", "num_cam", "rgb_img_size", "add_vision_id",
    "tiled_rgb_imgs", "num_bins_actions", "action_mask_aug_per",
}  # fmt: skip
MODEL_HARMLESS = {
    "use_qlora", "lora_config", "lora_rank", "use_flash_attention_2", "attention_dropout", "action_mask_aug",
}  # fmt: skip
# The same for the data: its code's defaults, the only values, and what says how it was loaded only.
DATA_DEFAULTS = {"IMAGE.crop_img": 1.0, "IMAGE.img_size": 0, "IMAGE.cam_list": ["3p1"]}
DATA_VALUES = {"unifier": "image", "history": 1, DELTA: False, "LEROBOT.fps": -1}
DATA_USED = {*DATA_DEFAULTS, "horizon", "LEROBOT.repo_id", "LEROBOT.le_cam_list", "LEROBOT.rv_cam_list"}
DATA_HARMLESS = {
    "datasets", "load_depth", "load_original_action", "IMAGE.return_ee", "IMAGE.return_ori_act",
    "IMAGE.return_proprio", "IMAGE.brightness_aug", "IMAGE.contrast_aug", "IMAGE.saturation_aug",
    "IMAGE.hue_aug", "LEROBOT.action_key", "LEROBOT.state_key", "LEROBOT.remove_noop_actions",
}  # fmt: skip


@dataclass(kw_only=True)
class PeerOptions:
    """What the checkpoint does not record; None takes what it records, or its code's defaults."""

    stats: Path | None = None
    base: str | None = None
    data_config: Path | None = None
    cameras: list[str] | None = None
    chunk_size: int | None = None
    num_bins: int | None = None
    image_size: int | None = None
    crop_ratio: float | None = None
    add_vision_id: bool | None = None


class _YacsLoader(yaml.SafeLoader):
    """Reads Python tuples, too, which yacs writes under a tag that YAML's safe loader does not know."""

    aliases = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        # A few of them, each of a mapping of the others, make a file of one line endless to read.
        self.aliases += self.check_event(yaml.AliasEvent)
        if self.aliases > MAX_ALIASES:
            raise yaml.YAMLError(f"more than {MAX_ALIASES} aliases")
        return super().compose_node(parent, index)


_YacsLoader.add_constructor(
    "tag:yaml.org,2002:python/tuple", lambda loader, node: tuple(loader.construct_sequence(node))
)


def nvlabs_settings(
    file: Path, options: PeerOptions, version: str | None
) -> tuple[list[str], int, dict[str, Any], str]:
    """(cameras, action dimension, further fields of VLA0Config, what was decided on add_vision_id and why).

    Args:
        file: config.yaml of the run.
        options: supply what is not recorded.
        version: of Transformers, that wrote the model.

    Raises:
        ValueError: not such a file, a setting that cannot be imported or that `options` contradict, or one
            that is missing.
    """
    try:
        saved = yaml.load(file.read_text(), _YacsLoader)
        kind, qwen = saved["EXP"]["MODEL"], dict(saved["MODEL"]["QWEN"])
        loader = dict(saved["DATALOADER"]["ROBOVERSE"])
        path, words = loader.pop("cfg_path"), loader.pop("cfg_opts")
        side, *_ = qwen["rgb_img_size"]
        missing = sorted(MODEL_USED - qwen.keys())
        if missing:
            raise KeyError(missing[0])
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is no config of NVlabs/vla0's training ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}). Expected are MODEL.QWEN and DATALOADER.ROBOVERSE with cfg_path "
            "and cfg_opts."
        ) from error
    _must(file, "EXP.MODEL", kind, "qwen")
    _check(file, "MODEL.QWEN.", qwen, MODEL_VALUES, MODEL_USED | MODEL_HARMLESS)
    data = _data_settings(file, options, str(path), words)
    data |= {f"LEROBOT.{key}": value for key, value in loader.items()}  # some versions keep them here
    _check(file, "", data, DATA_VALUES, DATA_USED | DATA_HARMLESS)

    def recorded(option: str, name: str, value: Any) -> Any:
        """The value that is recorded, or the one that is given; they must not contradict each other."""
        given = getattr(options, option)
        if value is None and given is None:
            raise ValueError(
                f"{file} does not say {name}, and the data's YAML {path} is not at hand. Copy that file "
                f"beside it, name it (--data_config=<file>), or say what the model was trained on: "
                f"--{option}."
            )
        if not isinstance(value, int | float | None):
            raise ValueError(f"{file}: {name} is {value!r}; it must be a number.")
        if None not in (value, given) and value != given:
            raise ValueError(f"--{option}={given} contradicts {file}, which says {value}. Leave it out.")
        return given if value is None else value

    # 0: the camera's own size, which is then the model's.
    size = recorded("image_size", "IMAGE.img_size", data.get("IMAGE.img_size") or side)
    _must(file, "MODEL.QWEN.rgb_img_size", list(qwen["rgb_img_size"]), [size, size])
    crop = recorded("crop_ratio", "IMAGE.crop_img", data.get("IMAGE.crop_img"))
    horizon = recorded("chunk_size", "MODEL.QWEN.horizon", qwen["horizon"])
    _must(file, "horizon of the data", data.get("horizon", horizon), horizon)
    bins = recorded("num_bins", "MODEL.QWEN.num_bins_actions", qwen["num_bins_actions"])
    vision_id, why = _vision_id(file, qwen["add_vision_id"], options.add_vision_id, version)
    settings = {
        "vlm": qwen["qwen_model_id"],
        "chunk_size": horizon,
        "n_action_steps": horizon,
        "num_bins": bins,
        "image_size": size,
        "crop_ratio": crop,
        "crop_rounding": "even",
        "tile_images": qwen["tiled_rgb_imgs"],
        "add_vision_id": vision_id,
        "resize_antialias": False,
        "action_mask_prob": qwen["action_mask_aug_per"],
    }
    return _cameras(file, data, qwen["num_cam"], options), qwen["original_action_dim"], settings, why


def _must(file: Path, name: str, value: Any, allowed: Any) -> None:
    if value != allowed:
        raise ValueError(f"{file}: {name} is {value!r}; imported can be {allowed!r} only.")


def _check(
    file: Path, prefix: str, settings: dict[str, Any], values: dict[str, Any], known: set[str]
) -> None:
    for name, value in settings.items():
        if name in values:
            _must(file, prefix + name, value, values[name])
        elif name not in known:
            raise ValueError(
                f"{file}: {prefix}{name} is {value!r}. This setting is unknown here and may change what "
                "pictures, prompt or actions mean, so the checkpoint is not imported."
            )


def _data_settings(file: Path, options: PeerOptions, path: str, words: Any) -> dict[str, Any]:
    """Settings of the data, "IMAGE.crop_img" → value: the YAML at `path`, if it is at hand, and over it
    `words`, "IMAGE.crop_img:0.875:IMAGE.img_size:224:...".

    Raises:
        ValueError: `words` are no such pairs, or it is not known whether actions are deltas.
    """
    words = str(words or "").split(":") if words else []
    if len(words) % 2:
        raise ValueError(
            f"{file}: cfg_opts={':'.join(words)!r} must be pairs, name:value:name:value; it has "
            f"{len(words)} parts."
        )
    given = {name: _decoded(value) for name, value in zip(words[::2], words[1::2], strict=True)}
    if options.data_config is not None and not options.data_config.is_file():
        raise FileNotFoundError(f"--data_config={str(options.data_config)!r} is not there.")
    # The path begins at NVlabs' working folder, which holds the folder of runs.
    places = [file.parent / Path(path).name]
    if not Path(path).is_absolute() and ".." not in Path(path).parts:
        places += [folder / path for folder in file.parents]
    found = options.data_config or next((place for place in places if place.is_file()), None)
    if found is not None:
        with reading(found):
            content = yaml.load(found.read_text(), _YacsLoader)
            return DATA_DEFAULTS | dict(_flat({} if content is None else content)) | given
    if Path(path).name != LIBERO_YAML and DELTA not in given:
        raise ValueError(
            f"{file} was trained on data of {path}, which is not at hand: it says whether actions are deltas "
            f"({DELTA}). Copy it beside config.yaml, or name it: --data_config=<file>."
        )
    return given


def _flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in settings.items():
        found += _flat(value, f"{name}.") if isinstance(value, dict) else [(prefix + name, _decoded(value))]
    return found


def _decoded(value: Any) -> Any:
    """As yacs reads a string: a Python literal if it is one."""
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # the latter two: nested too deeply
        return value


def _cameras(file: Path, data: dict[str, Any], count: int, options: PeerOptions) -> list[str]:
    """Image keys in the order of the prompt."""
    names, keys = data.get("IMAGE.cam_list"), LIBERO_CAMERAS
    if names is not None:
        names = [names] if isinstance(names, str) else list(names)
        _must(file, "MODEL.QWEN.num_cam", count, len(names))
    own, known = data.get("LEROBOT.le_cam_list"), data.get("LEROBOT.rv_cam_list")
    if own and known and "libero" not in str(data.get("LEROBOT.repo_id")).lower():
        keys = dict(zip(known, own, strict=False))
    cameras = options.cameras or [keys.get(name) for name in names or []]
    if None in cameras or len(cameras) != count:
        what = f"the cameras {names}" if names else f"{count} cameras, which it does not name"
        raise ValueError(
            f"{file} was trained on {what} (known are {sorted(LIBERO_CAMERAS)} of LIBERO). Name their "
            f"{count} image keys in this order: --cameras='[observation.images.front, ...]'."
        )
    return cameras


def _vision_id(file: Path, asked: bool, given: bool | None, version: str | None) -> tuple[bool, str]:
    """Whether "Picture 1: " stood before the picture in training, and why. Transformers hands add_vision_id
    to the chat template since its version 4.52; before, it drops it without a word (4.49.0, 4.50.3 and 4.51.3
    do, 4.52.4 does not)."""
    if given is not None:
        return given, f"add_vision_id={str(given).lower()}, as --add_vision_id says."
    if not asked:
        return False, f"add_vision_id=false, as {file.name} says."
    try:
        found = Version(str(version))
    except InvalidVersion:
        found = None
    if found is None or (found.is_prerelease and re.match(r"4\.52\.0", found.base_version)):
        raise ValueError(
            f"{file} says add_vision_id: true, but Transformers before 4.52 dropped it, and config.json of "
            f'the model names the version {version!r}. Say whether the model saw "Picture 1: " in training: '
            "--add_vision_id=false if Transformers was older than 4.52 (NVlabs' container has 4.51.3), else "
            "--add_vision_id=true."
        )
    if found < Version("4.52"):
        return False, (
            f"add_vision_id=false: written with transformers {version}; before 4.52 it dropped "
            f'add_vision_id, so the model never saw "Picture 1: ", although {file.name} says true. '
            "--add_vision_id overrides."
        )
    return True, f"add_vision_id=true, as {file.name} says; transformers {version} writes it."
