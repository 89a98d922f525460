"""VLA-0 as a LeRobot policy: a VLM that writes actions as text (arXiv 2510.13054).

Training is supervised fine-tuning on "system prompt, pictures, instruction → integers"; acting decodes the
integers under a grammar that allows nothing else. Batches become chats in examples.py (with images.py and
chat.py), chats become integers in decoding/, the VLM is in vlm.py.
"""

from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelCard
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor, nn

from . import checkpoint, vlm
from .checkpoint import HUB_OPTIONS, VLM_FOLDER, Checkpoint, check_checkpoint
from .configuration_vla0 import VLA0Config
from .dataset import prepare_data
from .decoding.decoder import LOCK, Decoder, Plan
from .decoding.rtc import read_left_over, warn_of_averaged_chunks
from .decoding.server import ServerDecoder
from .examples import ExampleMaker, Observation, augmentation_generator
from .files import reading
from .loss import answer_loss
from .processor_vla0 import ACTION_CLIPPED
from .vlm import can_share_words, hidden_states


class VLA0Policy(PreTrainedPolicy):
    """An unmodified VLM (Qwen2.5-VL by default) that writes the next `chunk_size` actions as text.

    Batches come from the preprocessor: images float (B, 3, H, W) in [0, 1] under `config.camera_keys`, `task`
    a list of B instructions, `action` (training) int64 bins (B, chunk_size, D) in 0..num_bins. Actions go to
    the postprocessor as bins, too. Acting is as in evaluation mode, and changes no mode.

    Args:
        config: with `input_features` and `output_features` filled in (LeRobot's `make_policy` does).
        vlm_folder: build the VLM, without weights, from this folder instead of loading `config.vlm`.
        dataset_stats: passed by LeRobot; not used, statistics live in the processors.
        dataset_meta: passed by LeRobot's trainer; see `dataset.prepare_data`.
    """

    config_class = VLA0Config
    name = "vla0"

    def __init__(
        self,
        config: VLA0Config,
        dataset_stats: Any = None,
        dataset_meta: Any = None,
        vlm_folder: Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config)
        if dataset_meta is not None:
            prepare_data(config, dataset_meta)
        config.validate_features()
        self.model, self.vlm_processor = vlm.make_vlm(config, vlm_folder)
        self.examples = ExampleMaker(config, self.vlm_processor)
        if self.model is None:
            self.decoder = ServerDecoder(config, self.examples)
            # LeRobot counts a policy's parameters and asks them for the device.
            self.placeholder = nn.Parameter(torch.zeros(0, device=config.device), requires_grad=False)
        else:
            # LeRobot 0.6.2 reads it from the class, but the name depends on the VLM.
            type(self)._fsdp_wrap_modules = [vlm.block_name(self.model)]
            self.decoder = Decoder(config, self.model, self.examples)
        self.reset()

    def post_init(self) -> None:
        """LeRobot 0.6.2 would cast all tensors to `config.dtype` here. The VLM has that type already, but for
        the buffers of rotary embeddings, which must stay float32."""

    def get_optim_params(self) -> list[nn.Parameter]:
        self._require_weights()
        return [p for p in self.parameters() if p.requires_grad]

    def _require_weights(self) -> None:
        if self.model is None:
            raise ValueError(
                f"server={self.config.server!r}: the weights are on the server, so that this policy can act "
                "but not be trained or saved. Leave server out."
            )

    def wrap_with_peft(
        self, peft_config: Any = None, peft_cli_overrides: dict[str, Any] | None = None
    ) -> nn.Module:
        """The policy as a PEFT model (`lerobot-train --peft.*`): only the adapter is trained and saved. Its
        config names its base, the VLM or the checkpoint."""
        checkpoint.import_peft()
        return checkpoint.record_base(self, super().wrap_with_peft(peft_config, peft_cli_overrides))

    def _get_default_peft_targets(self) -> dict[str, Any]:
        return checkpoint.default_targets(self.model)

    def _validate_peft_config(self, peft_config: Any) -> None:
        """Allows what LeRobot refuses, adapters on a fresh policy: this one is a pretrained VLM."""

    def forward(self, batch: dict[str, Any], reduction: str = "mean") -> tuple[Tensor, dict[str, Any]]:
        """Cross-entropy of the answer's tokens. Augmented if and only if the policy is in training mode.

        Args:
            batch: see the class; with `action`, and `action_is_pad` (B, chunk_size) if padding is masked.
            reduction: "mean" over all supervised tokens of the batch, or "none": (B,), the mean of each
                example.

        Returns:
            The loss, and floats to log: `token_accuracy`; `action_error_bins`, the mean distance in bins
            between true and predicted integers, teacher-forced, over integers whose digits are all
            supervised; `action_clipped`, the share of action values outside the statistics.
        """
        self._require_weights()
        generator = augmentation_generator() if self.training else None
        loss, metrics = self.example_loss(*self.examples.training_examples(batch, generator), reduction)
        if ACTION_CLIPPED in batch:
            metrics[ACTION_CLIPPED] = batch[ACTION_CLIPPED].mean().item()
        return loss, metrics

    def example_loss(
        self, inputs: dict[str, Tensor], labels: Tensor, places: Tensor, reduction: str = "mean"
    ) -> tuple[Tensor, dict[str, float]]:
        """`forward` on what `ExampleMaker.training_examples` returns."""
        shared = self.examples.chat.num_shared if can_share_words(self.model, self.config) else 0
        hidden = hidden_states(self.model, inputs, shared)
        digit_ids = torch.tensor(self.examples.chat.digit_ids, device=labels.device)
        return answer_loss(hidden, self.model.lm_head.weight, labels, places, digit_ids, reduction)

    def train(self, mode: bool = True) -> Self:
        changed = mode != self.training
        super().train(mode)
        if changed and isinstance(getattr(self, "decoder", None), Decoder):
            self.decoder.release()  # its memory is needed, or the weights have changed
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Self:  # .to(), .cuda(), .float(), ...
        if isinstance(self.decoder, Decoder):
            self.decoder.release()
        return super()._apply(*args, **kwargs)

    def reset(self) -> None:
        """Forgets queued actions and earlier chunks. Call at the start of every episode."""
        # One plan per environment. LeRobot 0.6.2 clears the attribute of this name to drop queued actions.
        self._action_queue: list[Plan] = []

    def _plans(self, rows: int) -> list[Plan]:
        if len(self._action_queue) != rows:
            self._action_queue = [Plan() for _ in range(rows)]
        return self._action_queue

    def supports_rtc(self) -> bool:
        """Whether `lerobot-rollout --inference.type=rtc` works; asked before the robot is connected."""
        return not warn_of_averaged_chunks(self.config)

    @torch.compiler.disable
    def predict_action_chunk(self, batch: dict[str, Any], **rtc: Any) -> Tensor:
        """The next chunk as bins 0..num_bins, float32 (B, chunk_size, D); the postprocessor turns them into
        commands. Never averaged with earlier chunks. Real-time chunking passes `inference_delay` and
        `prev_chunk_left_over`, see `decoding.rtc.read_left_over`."""
        observation = self.examples.check(batch)  # B rows
        committed = read_left_over(observation, self.config, **rtc) if rtc else None
        with LOCK:
            plans = self._plans(len(observation))
            return self.decoder.decode(observation, self.config.chunk_size, plans, committed)

    @torch.compiler.disable
    def select_action(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """The next action as bins, float32 (B, D)."""
        observation = self.examples.check(batch)  # B rows
        with LOCK:
            return self.act(observation, self._plans(len(observation)))

    @torch.no_grad()
    def act(self, observation: Observation, plans: list[Plan]) -> Tensor:
        """The next action of each of B plans as bins, float32 (B, D). Predicts a chunk for plans without
        actions."""
        self.predict(observation, plans)
        actions = torch.stack([plan.actions.popleft() for plan in plans])
        if observation.origin is None:
            return actions
        # The postprocessor adds the present state; an action is relative to the state of its chunk.
        return actions + (torch.stack([plan.origin for plan in plans]) - observation.origin)

    @torch.no_grad()
    def predict(self, observation: Observation, plans: list[Plan]) -> None:
        """Decodes a chunk for each plan without actions, and queues its first `n_action_steps`."""
        # Environments that were reset at different times predict at different times.
        rows = [row for row, plan in enumerate(plans) if not plan.actions]
        if not rows:
            return
        # No more timesteps than are executed or, with ensembling, averaged with those of later chunks.
        config = self.config
        steps = min(config.chunk_size, config.n_action_steps * config.ensemble_size)
        observation, plans = observation.take(rows), [plans[row] for row in rows]
        chunks = self.decoder.decode(observation, steps, plans)  # (R, steps, D)
        origins = [None] * len(plans) if observation.origin is None else observation.origin
        for plan, chunk, origin in zip(plans, chunks, origins, strict=True):
            plan.add(chunk, origin, config)

    def _save_pretrained(self, save_directory: Path, **kwargs: Any) -> None:
        # LeRobot 0.6.1 passes `state_dict`, in the main process; 0.6.2 passes nothing, in every process.
        self._require_weights()
        super()._save_pretrained(save_directory, **kwargs)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            vlm.save_vlm(self.model, self.vlm_processor, Path(save_directory) / VLM_FOLDER)

    def generate_model_card(
        self, dataset_repo_id: str, *args: Any, cfg: Any = None, dataset_meta: Any = None, **kwargs: Any
    ) -> ModelCard:
        """README.md of a push, see convert/card.py. LeRobot 0.6.2 gives neither `cfg` nor `dataset_meta`."""
        from .convert.card import push_card  # nothing but a push needs it

        return push_card(self.config, dataset_repo_id, cfg, dataset_meta)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        revision: str | None = None,
        strict: bool = True,
        **kwargs: Any,
    ) -> Self:
        """Loads a checkpoint folder or Hub repo; needs neither the base VLM nor, for a folder, the network.
        An adapter is merged into its base. A bare VLM gives a fresh policy: LeRobot asks for one when it
        loads an adapter that was trained on a VLM.

        Args:
            config: overrides the checkpoint's own.
            kwargs: force_download, cache_dir, local_files_only, token of the Hub; arguments of the class.

        Raises:
            FileNotFoundError: a file of the checkpoint is missing.
            RuntimeError: weights are missing or do not fit.
            ValueError: a file is damaged, the action statistics are missing, or `config` disagrees with the
                checkpoint in the action dimension or `num_bins`.
        """
        path, hub = str(pretrained_name_or_path), {k: kwargs.pop(k) for k in HUB_OPTIONS if k in kwargs}
        adapter = config.pretrained_path if config is not None and config.use_peft else None
        # LeRobot's `make_policy` asks for the base of an adapter, which it puts on afterwards.
        only_base = adapter is not None and Path(adapter) != Path(path)
        if only_base:
            path, revision = str(adapter), config.pretrained_revision
        weights = config is None or config.server is None
        found = checkpoint.find_checkpoint(path, weights=weights, revision=revision, **hub)
        if config is None and found.config is None:
            raise ValueError(f"{path} holds a VLM and no policy. Train one: --policy.vlm={path}")
        config = config or found.config
        if found.base is None:
            return cls._load(found, config, strict, **kwargs)
        if config.server is not None:
            raise ValueError(f"server={config.server!r} with an adapter: first run lerobot-vla0 merge.")
        policy = cls._load(found.base, config, strict, **kwargs)
        checkpoint.check_adapter(policy, found.folder, found.base.path)
        return policy if only_base else checkpoint.merge_adapter(policy, found.folder)

    @classmethod
    def _load(cls, found: Checkpoint, config: VLA0Config, strict: bool, **kwargs: Any) -> Self:
        """The policy of a checkpoint, or a fresh one on a VLM."""
        if found.kind == "vlm":
            config.vlm, config.vlm_revision = found.path, found.revision
            return cls(config, **kwargs).eval()
        check_checkpoint(found, config)
        kwargs["vlm_folder"] = found.folder / VLM_FOLDER
        if config.server is not None:
            return cls(config, **kwargs).eval()
        # strict: LeRobot's default only warns about missing weights, and the policy would act at random.
        return super().from_pretrained(found.folder, config=config, strict=strict, **kwargs)

    @classmethod
    def _load_as_safetensor(cls, model: Self, model_file: str, map_location: str, strict: bool) -> Self:
        with reading(model_file):
            return super()._load_as_safetensor(model, model_file, map_location, strict)
