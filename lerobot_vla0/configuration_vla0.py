"""LeRobot configuration of VLA-0 (`--policy.type=vla0`). Imports neither transformers nor a simulator."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import draccus
import torch
from draccus.utils import DecodingError
from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.optim import AdamWConfig
from lerobot.optim.schedulers import ConstantWithWarmupSchedulerConfig

# Data types of weights and computation, by their names in the config.
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Raised when a checkpoint of this package could no longer be read, or would act otherwise, in an older one.
# Adding a field does not count: an older version refuses a field that it does not know by name.
FORMAT_VERSION = 1


class FormatVersion(int):
    """A type of its own, so that reading a config.json refuses a newer version before it stumbles over the
    fields that the newer version has added."""


@draccus.decode.register(FormatVersion)
def _read_format_version(raw: object, path: Sequence[str]) -> FormatVersion:
    if not isinstance(raw, int) or raw < 1:
        raise DecodingError(path, f"{raw!r} is not allowed: it must be an integer from 1.")
    if raw > FORMAT_VERSION:
        raise DecodingError(
            path,
            f"version {raw} was written by a newer lerobot_policy_vla0; the one that is installed reads up "
            f"to {FORMAT_VERSION}. Upgrade: pip install --upgrade lerobot_policy_vla0",
        )
    return FormatVersion(raw)


@PreTrainedConfig.register_subclass("vla0")
@dataclass
class VLA0Config(PreTrainedConfig):
    """Everything that changes what the model sees or says; saved as `config.json` with each checkpoint.

    Defaults follow the published LIBERO recipe (arXiv 2510.13054, section 4.1, and its training code).

    Raises:
        ValueError: a field is out of its range; the message names the field, its value and what is allowed.
    """

    # Of the checkpoint; a checkpoint without it was written before it was recorded, and is of version 1.
    format_version: FormatVersion = FormatVersion(FORMAT_VERSION)  # noqa: RUF009 (an int)

    # --- backbone ---
    # Hub id or folder of the base VLM: Qwen2-VL, Qwen2.5-VL, Qwen3-VL, SmolVLM2, InternVL, or Gemma 3 (which
    # decodes row by row, without this package's fast decoder). Read only for a fresh policy: checkpoints
    # carry their own VLM files.
    vlm: str = "Qwen/Qwen2.5-VL-3B-Instruct"
    # Commit, branch or tag of `vlm` on the Hub.
    vlm_revision: str | None = None
    # Data type of weights and computation: bfloat16, float16 or float32. LeRobot also drives autocast from
    # it.
    dtype: str = "bfloat16"
    # Transformers attention backend (sdpa, flash_attention_2, eager); None lets Transformers choose.
    attn_implementation: str | None = None
    # Recompute activations in the backward pass: less memory, about a third more time.
    gradient_checkpointing: bool = False
    # Leave the vision encoder as it is and train the language model only.
    freeze_vision: bool = False
    # Load the language model of `vlm` in 4 bits, to train an adapter on it (QLoRA: with --peft.*; needs the
    # extra [qlora]).
    load_in_4bit: bool = False
    # torch.compile the language model in training. Pays off on GPUs in long runs; the first steps are slow.
    compile_model: bool = False

    # --- actions as text ---
    # Observations fed to the model; VLA-0 uses the current one only.
    n_obs_steps: int = 1
    # Timesteps written per prediction (the paper's H).
    chunk_size: int = 8
    # Timesteps executed before predicting again; only these are decoded by `select_action`.
    n_action_steps: int = 8
    # Largest integer an action is written as (the paper's B).
    num_bins: int = 1000
    # Append the robot's state to the instruction, as integers on the same grid. The paper uses none.
    use_state: bool = False
    # 0 decodes greedily; above 0 samples from the allowed tokens at this temperature.
    temperature: float = 0.0
    # Temporal ensembling: chunks averaged for one action, the newest included; 1 does not average. The
    # paper's evaluation uses 8 with n_action_steps=1.
    ensemble_size: int = 1
    # Weight of an older chunk against 1 for the newest; 1.0 is the plain mean.
    ensemble_weight: float = 0.5
    # False: every older chunk counts ensemble_weight. True: ensemble_weight to the power of its age.
    ensemble_exponential: bool = False
    # Decode on between calls of `select_action`: the first action of a chunk leaves as soon as it is written.
    stream: bool = False
    # Tokens guessed ahead and verified in one pass; changes the speed of acting, never the actions. None
    # adapts to how many are right; 0 guesses none (only tokens that the grammar forces ride along).
    draft_length: int | None = None

    # --- a server instead of weights ---
    # OpenAI-compatible base URL (http://localhost:8000/v1) of a server that has the export (lerobot-vla0
    # export) of the checkpoint at --policy.path: the VLM runs there, no weights are loaded. For acting only.
    server: str | None = None
    # Seconds without a byte from the server until a request counts as lost; it is sent three times.
    server_timeout: float = 30.0
    # Name of the model on the server; None takes its only one.
    server_model: str | None = None

    # --- images ---
    # Image keys in the order in which they are shown; None takes all of the data set, in its order.
    cameras: list[str] | None = None
    # Side in pixels that each camera is resized to; a multiple of 28 for Qwen2.5-VL, Qwen2-VL and InternVL,
    # of 32 for Qwen3-VL, of 64 for SmolVLM2 (2.2B: 42); 896 for Gemma 3.
    image_size: int = 224
    # Share of height and width kept: random crop in training, centre crop otherwise. 1.0 keeps the whole
    # image.
    crop_ratio: float = 0.875
    # True: cameras side by side in one picture. False: one picture per camera, which SmolVLM2, InternVL and
    # Gemma 3 need.
    tile_images: bool = True
    # Antialiasing of the resize. Matters only where one happens (not at 256×256 with the defaults).
    resize_antialias: bool = True
    # Write "Picture 1: " before each picture, as the original checkpoints do; vla0-trl and TinyVLA do not.
    # Only Qwen's chat templates know it.
    add_vision_id: bool = True

    # --- augmentation, in training only ---
    # Strengths of the colour jitter, drawn per image and camera; 0 switches one off.
    jitter_brightness: float = 0.2
    jitter_contrast: float = 0.2
    jitter_saturation: float = 0.2
    jitter_hue: float = 0.05
    # Masked action augmentation: a share drawn from U(0, action_mask_prob) of the answer's characters is
    # shown to the model as "?" and left out of the loss, so that it cannot just continue its own text.
    action_mask_prob: float = 0.4
    # Share of training examples left unmasked.
    action_mask_skip_prob: float = 0.1

    # --- loss ---
    # Timesteps past the episode's end repeat its last action. False trains on them as the original does,
    # True leaves them out of the loss.
    do_mask_loss_for_padding: bool = False

    # "dataset": one range of the actions for all of the data set. "task": one for each instruction, so that
    # the integers resolve the motions of a task more finely; an instruction that was not trained on uses the
    # data set's range.
    action_norm: str = "dataset"
    # MIN_MAX or QUANTILES for state and action: both map to the [-1, 1] that the integers cover.
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode.MIN_MAX,
            "ACTION": NormalizationMode.MIN_MAX,
        }
    )

    # --- optimiser preset ---
    optimizer_lr: float = 4e-5  # 5e-6 × 8 GPUs in the original
    optimizer_betas: tuple[float, float] = (0.9, 0.999)
    optimizer_eps: float = 1e-8
    optimizer_weight_decay: float = 1e-10
    optimizer_grad_clip_norm: float = 1.0  # 0 does not clip
    # Steps of linear warm-up to the constant learning rate.
    scheduler_warmup_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        self._check("n_obs_steps", self.n_obs_steps == 1, "1 (VLA-0 has no history)")
        self._check("chunk_size", self.chunk_size >= 1, "at least 1")
        self._check(
            "n_action_steps",
            1 <= self.n_action_steps <= self.chunk_size,
            f"in 1..chunk_size ({self.chunk_size})",
        )
        self._check("num_bins", self.num_bins >= 2, "at least 2")
        self._check("temperature", self.temperature >= 0, "at least 0")
        self._check("ensemble_size", self.ensemble_size >= 1, "at least 1")
        self._check("ensemble_weight", 0 < self.ensemble_weight <= 1, "in (0, 1]")
        if self.ensemble_size > 1 and self.n_action_steps == self.chunk_size:
            raise ValueError(
                f"ensemble_size={self.ensemble_size} has nothing to average: n_action_steps="
                f"{self.n_action_steps} executes the whole chunk. Lower n_action_steps, for example to 1."
            )
        self._check("stream", not (self.stream and self.ensemble_size > 1), "False with ensemble_size > 1")
        self._check(
            "draft_length", self.draft_length is None or 0 <= self.draft_length <= 63, "None or in 0..63"
        )
        self._check(
            "server",
            self.server is None or self.server.startswith(("http://", "https://")),
            "a URL that begins with http:// or https://",
        )
        self._check("server_timeout", self.server_timeout > 0, "above 0")
        cameras = self.cameras
        self._check("cameras", cameras is None or (cameras and len(set(cameras)) == len(cameras)),
                    "None or a list of different image keys")  # fmt: skip
        self._check("image_size", self.image_size >= 1, "at least 1 pixel")
        self._check("crop_ratio", 0 < self.crop_ratio <= 1, "in (0, 1]")
        for name in ("jitter_brightness", "jitter_contrast", "jitter_saturation"):
            self._check(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        self._check("jitter_hue", 0 <= self.jitter_hue <= 0.5, "in [0, 0.5]")
        for name in ("action_mask_prob", "action_mask_skip_prob"):
            self._check(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        self._check("action_norm", self.action_norm in ("dataset", "task"), "dataset or task")
        bounded = (NormalizationMode.MIN_MAX, NormalizationMode.QUANTILES, NormalizationMode.QUANTILE10)
        for kind, modes in {
            "STATE": bounded,  # integers need a bounded range
            "ACTION": bounded,
            "VISUAL": (NormalizationMode.IDENTITY,),  # the VLM's own image processor normalises
        }.items():
            mode = self.normalization_mapping.get(kind)
            if mode not in modes:
                raise ValueError(
                    f"normalization_mapping[{kind!r}]={mode} is not allowed: it must be one of "
                    f"{', '.join(m.value for m in modes)}."
                )
        for name in ("optimizer_lr", "optimizer_eps"):
            self._check(name, getattr(self, name) > 0, "above 0")
        for name in ("optimizer_weight_decay", "optimizer_grad_clip_norm", "scheduler_warmup_steps"):
            self._check(name, getattr(self, name) >= 0, "at least 0")

    def _check(self, name: str, ok: object, allowed: str) -> None:
        if not ok:
            raise ValueError(f"{name}={getattr(self, name)!r} is not allowed: it must be {allowed}.")

    def validate_features(self) -> None:
        """Checks input and output features, which LeRobot fills in from the data set or environment."""
        if self.action_feature is None:
            raise ValueError(
                f"VLA-0 needs an `action` feature; the data set or environment has "
                f"{sorted(self.output_features or {})}."
            )
        if len(self.action_feature.shape) != 1:
            raise ValueError(f"action must be a vector, got shape {tuple(self.action_feature.shape)}.")
        present = sorted(self.image_features)
        if not present:
            raise ValueError(
                "VLA-0 needs at least one camera: no image feature among "
                f"{sorted(self.input_features or {})}. Use a data set or environment with images."
            )
        unknown = [key for key in self.cameras or [] if key not in present]
        if unknown:
            raise ValueError(
                f"cameras={self.cameras!r} names {unknown}, which are not there. Present: {present}."
            )
        if self.use_state and self.robot_state_feature is None:
            raise ValueError(
                "use_state=True needs the feature observation.state; present are "
                f"{sorted(self.input_features or {})}. Set use_state=false."
            )

    @property
    def camera_keys(self) -> list[str]:
        """Image keys in prompt order."""
        return list(self.cameras or self.image_features)

    @property
    def jitter(self) -> tuple[float, float, float, float]:
        return self.jitter_brightness, self.jitter_contrast, self.jitter_saturation, self.jitter_hue

    def get_optimizer_preset(self) -> AdamWConfig:
        return AdamWConfig(
            lr=self.optimizer_lr,
            betas=self.optimizer_betas,
            eps=self.optimizer_eps,
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=self.optimizer_grad_clip_norm,
        )

    def get_scheduler_preset(self) -> ConstantWithWarmupSchedulerConfig | None:
        if self.scheduler_warmup_steps == 0:
            return None
        return ConstantWithWarmupSchedulerConfig(num_warmup_steps=self.scheduler_warmup_steps)

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        return None
