"""LeRobot configuration of VLA-0 (`--policy.type=vla0`). Imports neither transformers nor a simulator."""

import copy
import math
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from lerobot.configs import PreTrainedConfig
from lerobot.optim import AdamWConfig
from lerobot.optim.schedulers import (
    ConstantWithWarmupSchedulerConfig,
    CosineDecayWithWarmupSchedulerConfig,
    LRSchedulerConfig,
)

from .config_types import (
    DTYPES,
    FORMAT_VERSION,
    IDENTITY,
    MIN_MAX,
    NORMALIZATIONS,
    FormatVersion,
    Names,
    Normalizations,
    Regions,
    check_features,
    is_region,
    reasons_shown,
)

ABOVE_0 = (lambda v: 0 < v < math.inf, "above 0 and finite")
AT_LEAST_0 = (lambda v: 0 <= v < math.inf, "at least 0 and finite")
SHARE = (lambda v: 0 <= v <= 1, "in [0, 1]")
# Per field, whether a value is allowed, and what is, in words. The upper limits are far beyond any use: a
# file that asks for more would fill the memory.
ALLOWED = {
    "dtype": (lambda v: v in DTYPES, f"one of {', '.join(DTYPES)}"),
    "cameras": (lambda v: v is None or 0 < len(v) == len(set(v)), "None or a list of different image keys"),
    "camera_regions": (
        lambda v: all(map(is_region, v.values())),
        "{image key: [top, left, height, width]}, in shares of the picture, of a part that lies in it",
    ),
    "image_size": (lambda v: 1 <= v <= 4096, "at least 1 pixel, and at most 4096"),
    "image_fit": (lambda v: v in ("squash", "letterbox", "crop"), "squash, letterbox or crop"),
    "crop_ratio": (lambda v: 0 < v <= 1, "in (0, 1]"),
    "crop_rounding": (lambda v: v in ("down", "even"), "down or even"),
    "chunk_size": (lambda v: 1 <= v <= 1024, "at least 1, and at most 1024"),
    "num_bins": (lambda v: 2 <= v <= 100_000, "at least 2, and at most 100000"),
    "action_norm": (lambda v: v in ("dataset", "task"), "dataset or task"),
    "n_obs_steps": (lambda v: v == 1, "1 (VLA-0 has no history)"),
    **dict.fromkeys(["jitter_brightness", "jitter_contrast", "jitter_saturation"], SHARE),
    "jitter_hue": (lambda v: 0 <= v <= 0.5, "in [0, 0.5]"),
    **dict.fromkeys(["action_mask_prob", "action_mask_skip_prob"], SHARE),
    **dict.fromkeys(["optimizer_lr", "optimizer_eps", "server_timeout"], ABOVE_0),
    "optimizer_betas": (lambda v: len(v) == 2 and all(0 <= b < 1 for b in v), "two numbers in [0, 1)"),
    **dict.fromkeys(["optimizer_weight_decay", "optimizer_grad_clip_norm"], AT_LEAST_0),
    "ensemble_size": (lambda v: v >= 1, "at least 1"),
    "ensemble_weight": (lambda v: 0 < v <= 1, "in (0, 1]"),
    "draft_length": (lambda v: v is None or 0 <= v <= 63, "None or in 0..63"),
    **dict.fromkeys(["scheduler_warmup_steps", "scheduler_decay_steps", "scheduler_decay_lr"], AT_LEAST_0),
    **dict.fromkeys(["temperature", "empty_cameras"], AT_LEAST_0),
    "server": (lambda v: v is None or re.match("https?://", v), "a URL that begins with http:// or https://"),
}


def _check(name: str, value: object, allowed: Callable[..., object], what: str) -> None:
    with suppress(TypeError):  # None, for example, has no order
        if allowed(value):
            return
    raise ValueError(f"{name}={value!r} is not allowed: it must be {what}.")


@PreTrainedConfig.register_subclass("vla0")
@dataclass
class VLA0Config(PreTrainedConfig):
    """Everything that changes what the model sees or says; saved as `config.json` with each checkpoint.

    Fields are in the order in which a user meets them; [...] begins a group. Defaults follow the published
    LIBERO recipe. Sources: "paper" is VLA-0, arXiv 2510.13054; "NVlabs" is its code, NVlabs/vla0, with the
    key in the config.yaml of a run; "vla0-trl" and "TinyVLA" are reimplementations.

    Raises:
        ValueError: a field is out of its range; the message names the field, its value and what is allowed.
    """

    # Version of the checkpoint's format, written by this package; a checkpoint without it has version 1.
    format_version: FormatVersion = FORMAT_VERSION

    # [1. What to fine-tune]
    # Hub id or folder of the VLM: Qwen2-VL, Qwen2.5-VL, Qwen3-VL, SmolVLM2, InternVL, or Gemma 3 (which
    # decodes row by row, without this package's fast decoder). Read for a fresh policy only: checkpoints
    # carry their own VLM files. Source: paper, section 4.1.
    vlm: str = "Qwen/Qwen2.5-VL-3B-Instruct"
    # Commit, branch or tag of `vlm` on the Hub; None takes the newest.
    vlm_revision: str | None = None
    # Data type of weights and computation: bfloat16, float16 or float32. LeRobot also sets autocast by it.
    dtype: str = "bfloat16"
    # Transformers' attention: sdpa, eager or flash_attention_2 (falls back to sdpa, with a warning, where the
    # package flash-attn is not installed); None lets Transformers choose.
    attn_implementation: str | None = None
    # Leave the vision encoder as it is and train the language model only.
    freeze_vision: bool = False

    # [2. Cameras and pictures]
    # Image keys in the order in which they are shown, as in '[observation.images.front,
    # observation.images.wrist]'; None takes all of the data set, in its order.
    cameras: Names | None = None
    # Cameras of the checkpoint that may be missing where it acts or is trained on; the model sees a black
    # picture in the place of each. At least 0; others that are missing are an error.
    empty_cameras: int = 0
    # Part of a camera's picture that the model sees instead of the whole: {image key: [top, left, height,
    # width]} in shares of the picture, each in [0, 1]. For objects that are small in it: the part may have
    # fewer pixels than image_size, and is enlarged then.
    camera_regions: Regions = field(default_factory=dict)
    # Side in pixels that each camera is resized to: a multiple of 28 for Qwen2.5-VL, Qwen2-VL and InternVL,
    # of 32 for Qwen3-VL, of 64 for SmolVLM2 (2.2B: 42); 896 for Gemma 3. Source: NVlabs, IMAGE.img_size.
    image_size: int = 224
    # How a camera that is not square becomes a square of image_size: "squash" changes its aspect ratio, as
    # the original does; "letterbox" keeps it, with black bars; "crop" takes the middle square.
    image_fit: str = "squash"
    # Share of height and width that is kept, in (0, 1]: random crop in training, centre crop otherwise; 1
    # keeps the whole image. Source: NVlabs, IMAGE.crop_img.
    crop_ratio: float = 0.875
    # Where the centre crop begins if it lies between two pixels: "down" at the lower one, as vla0-trl and
    # TinyVLA, "even" at the even one, as NVlabs. No difference at 256×256 with the defaults.
    crop_rounding: str = "down"
    # True: cameras side by side in one picture. False: one picture per camera, which SmolVLM2, InternVL and
    # Gemma 3 need with several cameras. Source: NVlabs, tiled_rgb_imgs.
    tile_images: bool = True
    # Antialiasing of the resize, as vla0-trl and TinyVLA have it; NVlabs resizes without. No difference where
    # the crop has image_size pixels already, as at 256×256 with the defaults.
    resize_antialias: bool = True
    # Write "Picture 1: " before each picture, as NVlabs does (add_vision_id); vla0-trl and TinyVLA do not.
    # Only Qwen's chat templates know it.
    add_vision_id: bool = True

    # [3. Actions as text]
    # Timesteps written per prediction (H in the paper), at least 1. Source: NVlabs, horizon.
    chunk_size: int = 8
    # Largest integer an action is written as (B in the paper), at least 2. Source: NVlabs, num_bins_actions.
    num_bins: int = 1000
    # "dataset": one range of the actions for all of the data set (paper, section 3). "task": one for each
    # instruction, so that the integers resolve the motions of a task more finely; an instruction that was not
    # trained on uses the data set's range.
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
    # Observations shown to the model; only 1 is allowed. Source: NVlabs, history.
    n_obs_steps: int = 1

    # [4. Training]
    # Strength of the colour jitter, drawn per image and camera; brightness is multiplied by a factor from 1 -
    # strength to 1 + strength. In [0, 1], 0 switches it off. Source of all four: vla0-trl, configs/vla0.yaml.
    jitter_brightness: float = 0.2
    # The same for contrast.
    jitter_contrast: float = 0.2
    # The same for saturation.
    jitter_saturation: float = 0.2
    # Hue turns by up to this share of the colour circle, to either side. In [0, 0.5], 0 switches it off.
    jitter_hue: float = 0.05
    # Masked action augmentation: a share drawn from U(0, action_mask_prob) of the answer's characters is
    # shown to the model as "?" and left out of the loss, so that it cannot just continue its own text. In
    # [0, 1]. Source: paper, section 3; NVlabs, action_mask_aug_per.
    action_mask_prob: float = 0.4
    # Share of training examples left unmasked, in [0, 1]. Source: NVlabs.
    action_mask_skip_prob: float = 0.1
    # Timesteps past the episode's end repeat its last action. False trains on them, as NVlabs does; True
    # leaves them out of the loss.
    do_mask_loss_for_padding: bool = False
    # AdamW's learning rate, above 0. Source: NVlabs, TRAIN.lr (5e-6) times its 8 GPUs.
    optimizer_lr: float = 4e-5
    # AdamW's decay rates of its averages of the gradient and of the squared gradient.
    optimizer_betas: tuple[float, float] = (0.9, 0.999)
    # AdamW's constant in the denominator, above 0.
    optimizer_eps: float = 1e-8
    # AdamW's weight decay, at least 0. Source: NVlabs, TRAIN.l2.
    optimizer_weight_decay: float = 1e-10
    # Largest norm of the gradient; 0 does not clip. Source: vla0-trl, which does better with clipping.
    optimizer_grad_clip_norm: float = 1.0
    # Steps of linear warm-up to the learning rate, at least 0. Source: NVlabs, EXP.LR_SCHED (none).
    scheduler_warmup_steps: int = 0
    # Steps of a cosine down to scheduler_decay_lr, which shorter runs shorten; 0: constant learning rate.
    scheduler_decay_steps: int = 0
    # Learning rate at the end of the cosine, at least 0.
    scheduler_decay_lr: float = 4e-6
    # Recompute activations in the backward pass: less memory, about a third more time.
    gradient_checkpointing: bool = False
    # Load the language model of `vlm` in 4 bits, to train an adapter on it (QLoRA, arXiv 2305.14314: with
    # --peft.*; needs the extra [qlora]).
    load_in_4bit: bool = False
    # torch.compile the language model in training, whose first steps are then slow, and in acting on a CPU.
    # On a GPU, passes over new tokens run as CUDA graphs, recorded in the first chunks.
    compile_model: bool = False

    # [5. Acting]
    # Timesteps executed before predicting again, in 1..chunk_size; `select_action` decodes no more than are
    # used. The paper's evaluation has 1.
    n_action_steps: int = 8
    # Temporal ensembling: predictions averaged for one action, the newest included; 1 does not average. The
    # paper's evaluation has 8 with n_action_steps=1.
    ensemble_size: int = 1
    # Weight of an older prediction, in (0, 1], against 1 for the newest; 1 is the plain mean. Source: NVlabs.
    ensemble_weight: float = 0.5
    # False: every older prediction has ensemble_weight. True: ensemble_weight to the power of its age in
    # predictions, NVlabs' second version.
    ensemble_exponential: bool = False
    # Tokens drafted ahead and verified in one pass, in 0..63; changes the speed, never the actions. None
    # adapts to how many are accepted; with 0, only tokens that the grammar determines are fed ahead.
    draft_length: int | None = None
    # 0 decodes greedily; above 0 samples from the allowed tokens at this temperature.
    # Decoded greedily, a policy may stay where waiting is always the most likely action.
    temperature: float = 0.0
    # Decode on between calls of `select_action`: the first action of a prediction is returned as soon as it
    # is written. Not with ensemble_size > 1.
    stream: bool = False

    # [6. The VLM on a server]
    # OpenAI-compatible base URL (http://localhost:8000/v1) of a server that has the export (lerobot-vla0
    # export) of the checkpoint at --policy.path: the VLM runs there, no weights are loaded. For acting only;
    # never part of a checkpoint.
    server: str | None = None
    # Seconds until a request without a complete answer counts as lost, above 0; it is sent three times.
    server_timeout: float = 30.0
    # Name of the model on the server; None takes its only one.
    server_model: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        with reasons_shown():
            for name, (allowed, what) in ALLOWED.items():
                _check(name, getattr(self, name), allowed, what)
            steps, what = self.chunk_size, f"in 1..chunk_size ({self.chunk_size})"
            _check("n_action_steps", self.n_action_steps, lambda v: 1 <= v <= steps, what)
            if self.ensemble_size > 1 and self.n_action_steps == steps:
                raise ValueError(
                    f"ensemble_size={self.ensemble_size} has nothing to average: n_action_steps="
                    f"{self.n_action_steps} executes the whole chunk. Lower n_action_steps, for example to 1."
                )
            by_task = self.use_relative_actions and self.action_norm == "task"
            _check("use_relative_actions", by_task, lambda v: not v, "False with action_norm='task'")
            decay, warmup = self.scheduler_decay_steps, self.scheduler_warmup_steps
            what = f"0, or more than scheduler_warmup_steps ({warmup})"
            _check("scheduler_decay_steps", decay, lambda v: not v or v > warmup, what)
            streamed = self.stream and self.ensemble_size > 1
            _check("stream", streamed, lambda v: not v, "False with ensemble_size > 1")
            for kind, modes in NORMALIZATIONS.items():
                name, mode = f"normalization_mapping[{kind!r}]", self.normalization_mapping.get(kind)
                _check(name, mode, lambda v, m=modes: v in m, f"one of {', '.join(m.value for m in modes)}")

    def validate_features(self) -> None:
        """Checks input and output features, which LeRobot fills in from the data set or environment."""
        check_features(self)

    def _save_pretrained(self, save_directory: Path) -> None:
        saved = copy.copy(self)
        saved.server = None  # counts for who names it, not for whoever loads the checkpoint
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

    @property
    def jitter(self) -> tuple[float, float, float, float]:
        return self.jitter_brightness, self.jitter_contrast, self.jitter_saturation, self.jitter_hue

    def get_optimizer_preset(self) -> AdamWConfig:
        names = ("lr", "betas", "eps", "weight_decay", "grad_clip_norm")
        return AdamWConfig(**{name: getattr(self, f"optimizer_{name}") for name in names})

    def get_scheduler_preset(self) -> LRSchedulerConfig | None:
        steps, decay = self.scheduler_warmup_steps, self.scheduler_decay_steps
        if decay:
            return CosineDecayWithWarmupSchedulerConfig(
                num_warmup_steps=steps,
                num_decay_steps=decay,
                peak_lr=self.optimizer_lr,
                decay_lr=self.scheduler_decay_lr,
            )
        return ConstantWithWarmupSchedulerConfig(num_warmup_steps=steps) if steps else None

    # What LeRobot loads around a frame: no other observations, no rewards, a chunk of actions.
    observation_delta_indices = reward_delta_indices = None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.chunk_size))
