"""LeRobot configuration of VLA-0 (`--policy.type=vla0`). Imports neither transformers nor a simulator."""

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import draccus
import torch
import wrapt
import yaml
from draccus.parsers.decoding import get_decoding_fn
from draccus.utils import DecodingError
from huggingface_hub import hf_hub_download
from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.optim import AdamWConfig

# Raised when an older version of this package could not read a checkpoint, or would act otherwise with it.
FORMAT_VERSION = 1
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
IDENTITY, MIN_MAX = NormalizationMode.IDENTITY, NormalizationMode.MIN_MAX
# Integers need a bounded range. Images are normalised by the VLM's own image processor.
BOUNDED = (MIN_MAX, NormalizationMode.QUANTILES, NormalizationMode.QUANTILE10)
NORMALIZATIONS = {"STATE": BOUNDED, "ACTION": BOUNDED, "VISUAL": (IDENTITY,)}


class Names(list[str]): ...


class Normalizations(dict[str, NormalizationMode]): ...


class Regions(dict[str, list[float]]): ...


def _decode(plain: Any, raw: object, path: Sequence[str]) -> object:
    """With --policy.path=, LeRobot reads options as JSON and leaves '[a, b]' a text: it is read as YAML."""
    return get_decoding_fn(plain)(yaml.safe_load(raw) if isinstance(raw, str) else raw, path)


for kind in (Names, Normalizations, Regions):
    draccus.decode.register(kind, partial(_decode, kind.__orig_bases__[0]))

SHARE = (lambda v: 0 <= v <= 1, "in [0, 1]")
AT_LEAST_0 = (lambda v: 0 <= v < math.inf, "at least 0 and finite")
# Per field, whether a value is allowed, and what is, in words.
ALLOWED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "format_version": (
        lambda v: 1 <= v <= FORMAT_VERSION,
        f"1..{FORMAT_VERSION} here; for a newer one: pip install --upgrade lerobot_policy_vla0",
    ),
    "dtype": (lambda v: v in DTYPES, f"one of {', '.join(DTYPES)}"),
    "cameras": (lambda v: v is None or 0 < len(v) == len(set(v)), "None or a list of different image keys"),
    "camera_regions": (
        lambda v: all(map(_is_region, v.values())),
        "{image key: [top, left, height, width]}, in shares of the picture, of a part that lies in it",
    ),
    **dict.fromkeys(["image_size", "chunk_size", "ensemble_size"], (lambda v: v >= 1, "at least 1")),
    "image_fit": (lambda v: v in ("squash", "letterbox", "crop"), "squash, letterbox or crop"),
    **dict.fromkeys(["crop_ratio", "ensemble_weight"], (lambda v: 0 < v <= 1, "in (0, 1]")),
    "picture_rule": (lambda v: v in ("vla0-trl", "NVlabs"), "vla0-trl or NVlabs"),
    "num_bins": (lambda v: 2 <= v <= 100_000, "in 2..100000"),
    "action_norm": (lambda v: v in ("dataset", "task"), "dataset or task"),
    "n_obs_steps": (lambda v: v == 1, "1 (VLA-0 has no history)"),
    "jitter": (
        lambda v: len(v) == 4 and 0 <= min(v) <= max(v) <= 1 and v[3] <= 0.5,
        "four strengths in [0, 1], the last in [0, 0.5]",
    ),
    **dict.fromkeys(["action_mask_prob", "action_mask_skip_prob"], SHARE),
    "optimizer_lr": (lambda v: 0 < v < math.inf, "above 0 and finite"),
    **dict.fromkeys(["optimizer_weight_decay", "optimizer_grad_clip_norm"], AT_LEAST_0),
    **dict.fromkeys(["temperature", "empty_cameras"], AT_LEAST_0),
    "server": (lambda v: v is None or v.startswith(("http://", "https://")), "an http:// or https:// URL"),
}


def _is_region(region: Sequence[float]) -> bool:
    top, left, height, width = region
    inside = min(region) >= 0 and top + height <= 1 and left + width <= 1
    return inside and height > 0 and width > 0


@PreTrainedConfig.register_subclass("vla0")
@dataclass
class VLA0Config(PreTrainedConfig):
    """Everything that changes what the model sees or says; saved as `config.json` with each checkpoint.

    Fields are in the order in which a user meets them; [...] begins a group. Defaults follow the published
    LIBERO recipe. Sources: "paper" is VLA-0, arXiv 2510.13054; "NVlabs" is its code, NVlabs/vla0, with the
    key in the config.yaml of a run; "vla0-trl" and "TinyVLA" are reimplementations.

    Raises:
        draccus.utils.DecodingError: a field is out of its range. LeRobot's scripts print it in one line.
    """

    # Version of the checkpoint's format, written by this package; a checkpoint without it has version 1.
    format_version: int = FORMAT_VERSION

    # [1. What to fine-tune] Hub id or folder of the VLM: Qwen2-VL, Qwen2.5-VL, Qwen3-VL, SmolVLM2, InternVL,
    # or Gemma 3 (which decodes row by row). For a fresh policy: checkpoints carry their VLM's files. Source:
    # paper, section 4.1.
    vlm: str = "Qwen/Qwen2.5-VL-3B-Instruct"
    # Commit, branch or tag of `vlm` on the Hub; None takes the newest.
    vlm_revision: str | None = None
    # Data type of weights and computation: bfloat16, float16 or float32. LeRobot also sets autocast by it.
    dtype: str = "bfloat16"
    # Transformers' attention: sdpa, eager or flash_attention_2 (sdpa where flash-attn is not installed).
    attn_implementation: str | None = None
    # Leave the vision encoder as it is and train the language model only.
    freeze_vision: bool = False

    # [2. Cameras and pictures]
    # Image keys in the order in which the model sees them, as in '[observation.images.front,
    # observation.images.wrist]'; None takes all of the data set, in its order.
    cameras: Names | None = None
    # How many cameras of the checkpoint may be missing; the model sees a black picture instead of each.
    empty_cameras: int = 0
    # Part of a camera's picture that the model sees instead of the whole, for small objects: {image key:
    # [top, left, height, width]}, in shares of the picture. It is enlarged to image_size if need be.
    camera_regions: Regions = field(default_factory=dict)
    # Side in pixels that each camera is resized to: a multiple of 28 for Qwen2.5-VL, Qwen2-VL and InternVL,
    # of 32 for Qwen3-VL, of 64 for SmolVLM2 (2.2B: 42); 896 for Gemma 3. Source: NVlabs, IMAGE.img_size.
    image_size: int = 224
    # How a camera that is not square becomes a square of image_size: "squash" changes its aspect ratio, as
    # the original does; "letterbox" keeps it, with black bars; "crop" takes the middle square.
    image_fit: str = "squash"
    # Share of height and width that remains, in (0, 1]: random crop in training, centre crop otherwise; 1
    # keeps the whole image. Source: NVlabs, IMAGE.crop_img.
    crop_ratio: float = 0.875
    # Whose code crops and resizes. "vla0-trl" (and TinyVLA): antialiasing; a centre crop between two pixels
    # begins at the lower one. "NVlabs": no antialiasing; at the even one. No difference at 256×256 with the
    # defaults, where the crop has image_size pixels already.
    picture_rule: str = "vla0-trl"
    # True: cameras side by side in one picture. False: one picture per camera, which SmolVLM2, InternVL and
    # Gemma 3 need with several cameras. Source: NVlabs, tiled_rgb_imgs.
    tile_images: bool = True
    # Write "Picture 1: " before each picture, as NVlabs does (add_vision_id); vla0-trl and TinyVLA do not.
    # Only Qwen's chat templates know it.
    add_vision_id: bool = True

    # [3. Actions as text]
    # Timesteps written per prediction (H in the paper), at least 1. Source: NVlabs, horizon.
    chunk_size: int = 8
    # Largest integer an action is written as (B in the paper), at least 2. Source: NVlabs, num_bins_actions.
    num_bins: int = 1000
    # "dataset": one range of the actions for all of the data set (paper, section 3). "task": one for each
    # instruction, which resolves motions more finely; an unknown instruction uses the data set's.
    action_norm: str = "dataset"
    # What the integers 0 and num_bins mean: MIN_MAX (paper, section 3), QUANTILES (0.01, 0.99) or QUANTILE10
    # (0.1, 0.9). Give all three keys: '{VISUAL: IDENTITY, STATE: QUANTILES, ACTION: QUANTILES}'.
    normalization_mapping: Normalizations = field(
        default_factory=lambda: {"VISUAL": IDENTITY, "STATE": MIN_MAX, "ACTION": MIN_MAX}
    )
    # The model writes actions minus the state that it sees, as LeRobot's pi0 with this field. Needs
    # observation.state with the action's joints, in the same order, at its beginning.
    use_relative_actions: bool = False
    # Dimensions that stay absolute: those of whose name in action_feature_names one of these is a part.
    relative_exclude_joints: Names = field(default_factory=lambda: ["gripper"])
    # Names of the action's dimensions; taken from the data set in training.
    action_feature_names: Names | None = None
    # Instruction where the observation's is blank, as LeRobot's PushT has it: a task of the training data.
    # Training takes it from a data set that has only one.
    default_task: str | None = None
    # Append the robot's state to the instruction, as integers 0..num_bins. The paper gives the model none.
    use_state: bool = False
    # Observations that the model sees; only 1 is allowed. Source: NVlabs, history.
    n_obs_steps: int = 1

    # [4. Training]
    # Strengths of the colour jitter of brightness, contrast, saturation (in [0, 1]) and hue (in [0, 0.5]),
    # drawn per image and camera. The first three multiply by a factor from 1 - strength to 1 + strength; hue
    # turns by up to this share of the colour circle. [0, 0, 0, 0]: none. Source: vla0-trl, configs/vla0.yaml.
    jitter: list[float] = field(default_factory=lambda: [0.2, 0.2, 0.2, 0.05])
    # Masked action augmentation: a share drawn from U(0, action_mask_prob) of the answer's characters is
    # replaced by "?" in the input and left out of the loss, so that it cannot just continue its own text. In
    # [0, 1]. Source: paper, section 3; NVlabs, action_mask_aug_per.
    action_mask_prob: float = 0.4
    # Share of training examples left unmasked, in [0, 1]. Source: NVlabs.
    action_mask_skip_prob: float = 0.1
    # Leave timesteps past the episode's end out of the loss. NVlabs trains on them: its last action,
    # repeated.
    do_mask_loss_for_padding: bool = False
    # AdamW's learning rate, constant, above 0. Another optimiser or a schedule: LeRobot's --optimizer.* and
    # --scheduler.* with --use_policy_training_preset=false. Source: NVlabs, TRAIN.lr (5e-6) times its 8 GPUs.
    optimizer_lr: float = 4e-5
    # AdamW's weight decay, at least 0. Source: NVlabs, TRAIN.l2.
    optimizer_weight_decay: float = 1e-10
    # Largest norm of the gradient; 0 does not clip. Source: vla0-trl, which does better with clipping.
    optimizer_grad_clip_norm: float = 1.0
    # Recompute activations in the backward pass: less memory, about a third more time.
    gradient_checkpointing: bool = False
    # torch.compile the language model in training and in acting on a CPU; CUDA graphs in acting on a GPU.
    compile_model: bool = False

    # [5. Acting]
    # Timesteps executed before predicting again, in 1..chunk_size. The paper's evaluation has 1.
    n_action_steps: int = 8
    # Temporal ensembling: predictions averaged for one action, the newest included; 1 does not average. The
    # paper's evaluation has 8 with n_action_steps=1.
    ensemble_size: int = 1
    # Weight of an older prediction, in (0, 1], against 1 for the newest; 1 is the plain mean. Source: NVlabs.
    ensemble_weight: float = 0.5
    # 0 decodes greedily; above 0 samples from the allowed tokens, for a policy that greedily stays in a
    # place.
    temperature: float = 0.0

    # [6. The VLM on a server]
    # OpenAI-compatible base URL (http://localhost:8000/v1) of a server that runs the export (lerobot-vla0
    # export) of the checkpoint at --policy.path. For acting only; never part of a checkpoint.
    server: str | None = None
    # Name of the model on the server; None takes its only one.
    server_model: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, (allowed, what) in ALLOWED.items():
            _check(name, getattr(self, name), allowed, what)
        steps = self.chunk_size
        _check(
            "n_action_steps", self.n_action_steps, lambda v: 1 <= v <= steps, f"in 1..chunk_size ({steps})"
        )
        what = f"1 where n_action_steps={steps} executes the whole chunk: there is nothing to average"
        _check("ensemble_size", self.ensemble_size, lambda v: v == 1 or self.n_action_steps < steps, what)
        by_task = self.action_norm == "task"
        what = "false with action_norm=task"
        _check("use_relative_actions", self.use_relative_actions, lambda v: not (v and by_task), what)
        for kind, modes in NORMALIZATIONS.items():
            name, mode = f"normalization_mapping[{kind!r}]", self.normalization_mapping.get(kind)
            _check(name, mode, lambda v, m=modes: v in m, f"one of {', '.join(m.value for m in modes)}")

    def validate_features(self) -> None:
        """Raises ValueError if the features that LeRobot fills in from the data set or environment do not
        fit."""
        inputs, cameras = sorted(self.input_features or {}), sorted(self.image_features)
        if self.action_feature is None or len(self.action_feature.shape) != 1:
            raise ValueError(
                f"VLA-0 needs an `action` vector; there are {sorted(self.output_features or {})}."
            )
        if not cameras:
            raise ValueError(f"VLA-0 needs at least one camera: no image feature among {inputs}.")
        for name, known in (("cameras", cameras), ("camera_regions", self.camera_keys)):
            if unknown := [key for key in getattr(self, name) or [] if key not in known]:
                raise ValueError(f"--policy.{name} names {unknown}, which are not there. Present: {known}.")
        shapes = {key: tuple(self.image_features[key].shape) for key in self.camera_keys}
        colour = [key for key, shape in shapes.items() if 3 in (shape[0], shape[-1])]
        if len(colour) < len(shapes):
            raise ValueError(
                f"of the cameras {shapes}, those with other than 3 channels (depth, grey) cannot be used. "
                f"Choose the others: --policy.cameras='[{', '.join(colour)}]'."
            )
        size, state = (f.shape[0] if f else 0 for f in (self.action_feature, self.robot_state_feature))
        if (self.use_state and not state) or (self.use_relative_actions and not 2 <= size <= state):
            raise ValueError(
                "use_state needs observation.state, and use_relative_actions one that is as long as the "
                f"action: they have {state} and {size} numbers (among {inputs}). Set use_state and "
                "use_relative_actions to false."
            )

    def _save_pretrained(self, save_directory: Path) -> None:
        saved = copy.copy(self)
        saved.server = None  # a checkpoint must not choose where pictures are sent
        super(VLA0Config, saved)._save_pretrained(save_directory)

    @property
    def camera_keys(self) -> list[str]:
        """Image keys in prompt order."""
        return list(self.cameras or self.image_features)

    @property
    def most_missing_cameras(self) -> int:
        """How many cameras an observation may lack."""
        return min(self.empty_cameras, len(self.camera_keys) - 1)

    @property
    def needs_state(self) -> bool:
        return self.use_state or self.use_relative_actions

    def get_optimizer_preset(self) -> AdamWConfig:
        decay, clip = self.optimizer_weight_decay, self.optimizer_grad_clip_norm
        return AdamWConfig(lr=self.optimizer_lr, weight_decay=decay, grad_clip_norm=clip)

    def get_scheduler_preset(self) -> None:
        """Constant learning rate, as NVlabs' EXP.LR_SCHED."""

    # What LeRobot loads around a frame: no other observations, no rewards, a chunk of actions.
    observation_delta_indices = reward_delta_indices = None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.chunk_size))


def _check(name: str, value: Any, allowed: Callable[[Any], Any], what: str) -> None:
    try:
        good = allowed(value)
    except (TypeError, ValueError):  # None, for example, has no order
        good = False
    if not good:
        raise DecodingError((), f"{name}={value!r} is not allowed: it must be {what}.")


# Fields of version 0.1.0, and the value that changes nothing; None where no value changed what a policy does.
RETIRED = {
    "ensemble_exponential": False,
    **dict.fromkeys(["draft_length", "load_in_4bit", "optimizer_betas", "optimizer_eps", "server_timeout"]),
    **dict.fromkeys(["scheduler_warmup_steps", "scheduler_decay_steps", "scheduler_decay_lr", "stream"]),
}
JITTERS = ("jitter_brightness", "jitter_contrast", "jitter_saturation", "jitter_hue")  # → jitter
PICTURE_RULES = {("down", True): "vla0-trl", ("even", False): "NVlabs"}  # (crop_rounding, resize_antialias)


def upgrade(saved: dict[str, Any]) -> dict[str, Any]:
    """A config.json of version 0.1.0 → the same with the fields of this version."""
    fields = dict(saved)
    if JITTERS[0] in fields:
        fields["jitter"] = [fields.pop(name) for name in JITTERS]
    if "resize_antialias" in fields:
        rule = fields.pop("crop_rounding", "down"), fields.pop("resize_antialias")
        fields["picture_rule"] = PICTURE_RULES.get(rule, f"crop_rounding and resize_antialias {rule}")
    for name in RETIRED.keys() & fields.keys():
        value = fields.pop(name)
        if RETIRED[name] not in (None, value):
            raise DecodingError((), f"{name}={value!r} needs lerobot_policy_vla0 0.1.0.")
    return fields


@wrapt.patch_function_wrapper(PreTrainedConfig, "from_pretrained")
def _read_version_0_1_0(load: Callable[..., Any], _: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """LeRobot's loader of config.json refuses fields that the config does not have."""
    try:
        return load(*args, **kwargs)
    except DecodingError:
        path, options = (*args, kwargs.pop("pretrained_name_or_path", None))[0], dict(kwargs)
        overrides = {"cli_overrides": options.pop("cli_overrides", [])}
        file = Path(path) / "config.json"
        file = file if file.is_file() else hf_hub_download(str(path), "config.json", **options)
        saved = json.loads(Path(file).read_text())
        if saved.get("type") != "vla0" or (upgraded := upgrade(saved)) == saved:
            raise
        with TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(upgraded))
            return load(folder, **overrides)


def check_joints(config: VLA0Config, state: int) -> None:
    """Raises ValueError for a robot with fewer joints (`state`: numbers in its `observation.state`) than the
    policy moves: LeRobot would leave out the last dimensions of each action, with a warning at most."""
    size, trained = (f.shape[0] if f else 0 for f in (config.action_feature, config.robot_state_feature))
    if state < size <= trained:
        raise ValueError(
            f"the robot has {state} joints (observation.state), and the policy writes actions of {size} "
            f"dimensions: it was trained on a robot with {trained}. Use that robot, or train on data of this."
        )
