"""VLA-0 as a LeRobot policy: a VLM that writes actions as text (arXiv 2510.13054).

Training is supervised fine-tuning on "system prompt, pictures, instruction → integers"; acting decodes the
integers under a grammar that allows nothing else. Batches become chats in examples.py (with images.py and
prompt.py), chats become integers in decoding/, the VLM is in backbone.py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelCard
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor, nn

from . import adapters, backbone
from .checkpoint import HUB_OPTIONS, VLM_FOLDER, Checkpoint, check_checkpoint, readable
from .configuration_vla0 import VLA0Config
from .decoding.chunk_decoder import (
    ChunkDecoder,
    EpisodeState,
    Lock,
    as_seen_now,
    episode_rows,
    remember_look,
)
from .decoding.rtc import read_left_over, warn_of_averaged_chunks
from .decoding.server import ServerDecoder
from .examples import ExampleMaker, augmentation_generator
from .loss import answer_loss
from .processor_vla0 import ACTION_CLIPPED
from .training_data import prepare_data
from .training_pass import can_share_words, hidden_states


class VLA0Policy(PreTrainedPolicy):
    """An unmodified VLM (Qwen2.5-VL by default) that writes the next `chunk_size` actions as text.

    Batches come from the preprocessor: images float (B, 3, H, W) in [0, 1] under `config.camera_keys`, `task`
    a list of B instructions, `action` (training) int64 bins (B, chunk_size, D) in 0..num_bins. Actions go to
    the postprocessor as bins, too. Acting is as in evaluation mode, and changes no mode.

    Args:
        config: with `input_features` and `output_features` filled in (LeRobot's `make_policy` does).
        vlm_folder: build the VLM, without weights, from this folder instead of loading `config.vlm`.
        dataset_stats: given by LeRobot; not used, statistics live in the processors.
        dataset_meta: given by LeRobot's trainer; see `training_data.prepare_data`.

    Attributes:
        examples: makes the VLM's inputs and labels of a batch.
        decoder: a `ChunkDecoder`, or with `config.server` a `ServerDecoder`.
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
        self.model, self.vlm_processor = backbone.make_vlm(config, vlm_folder)
        self.examples = ExampleMaker(config, self.vlm_processor)
        if self.model is None:
            self.decoder = ServerDecoder(config, self.examples)
            # LeRobot counts a policy's parameters and asks them for the device.
            self.placeholder = nn.Parameter(torch.zeros(0, device=config.device), requires_grad=False)
        else:
            # LeRobot 0.6.2 reads it from the class, but the name depends on the VLM.
            type(self)._fsdp_wrap_modules = [backbone.block_name(self.model)]
            self.decoder = ChunkDecoder(config, self.model, self.examples)
        self._lock = Lock()  # of what acting remembers
        self.reset()

    def post_init(self) -> None:
        """LeRobot 0.6.2 would cast all tensors to `config.dtype` here. The VLM has that type already, but for
        the buffers of rotary embeddings, which must stay float32."""

    def get_optim_params(self) -> list[nn.Parameter]:
        self.decoder.require_weights()
        adapters.check_trainable(self.config)
        return [p for p in self.parameters() if p.requires_grad]

    def wrap_with_peft(
        self, peft_config: Any = None, peft_cli_overrides: dict[str, Any] | None = None
    ) -> nn.Module:
        """The policy as a PEFT model (`lerobot-train --peft.*`), fresh or from a checkpoint; only the adapter
        is trained and saved. The adapter's config names its base, the VLM or the checkpoint.

        Raises:
            ImportError: peft is not installed.
            ValueError: the targets include the language model's head.
        """
        adapters.import_peft()
        return adapters.record_base(self, super().wrap_with_peft(peft_config, peft_cli_overrides))

    def _get_default_peft_targets(self) -> dict[str, Any]:
        return adapters.default_targets(self.model)

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
        self.decoder.require_weights()
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}.")
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
        if changed and hasattr(self, "decoder"):
            self.decoder.release()  # its memory is needed, or the weights have changed
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Self:  # .to(), .cuda(), .float(), ...
        self.decoder.release()
        return super()._apply(*args, **kwargs)

    def reset(self, rows: Any = None) -> None:
        """Forgets queued actions and earlier chunks. Call at the start of every episode.

        Args:
            rows: that begin, as `episode_rows` takes them; None for all. With `stream` all look again.
        """
        with self._lock:
            begun = None if rows is None else episode_rows(rows, len(self._action_queue))
            if begun != []:
                self._stream: Iterator[Tensor] = iter(())
            # One per environment. LeRobot 0.6.2 clears the attribute of this name to drop queued actions.
            old: list[EpisodeState] = [] if begun is None else self._action_queue
            fresh = self.decoder.new_episodes(len(old))
            self._action_queue = [fresh[i] if i in begun else state for i, state in enumerate(old)]

    def stream_action_chunk(
        self, batch: dict[str, Any], steps: int | None = None, **rtc: Any
    ) -> Iterator[Tensor]:
        """Yields timestep after timestep, bins (B, D) as float32, as soon as every row has written it: all of
        the chunk, or the first `steps`. Other arguments are those of `predict_action_chunk`."""
        observation = self.examples.check(batch)
        left_over = read_left_over(observation, self.config, **rtc) if rtc else None
        episodes = self._action_queue
        if len(episodes) != len(observation):
            episodes = self.decoder.new_episodes(len(observation))
            # Remembered for the drafts of the next chunk, unless `select_action` acts in other environments.
            self._action_queue = self._action_queue or episodes
        steps = self.config.chunk_size if steps is None else steps
        return self.decoder.decode_chunk(observation, steps, episodes, left_over)

    def supports_rtc(self) -> bool:
        """Whether `lerobot-rollout --inference.type=rtc` works; asked before the robot is connected."""
        return not warn_of_averaged_chunks(self.config)

    @torch.compiler.disable
    def predict_action_chunk(self, batch: dict[str, Any], **rtc: Any) -> Tensor:
        """Actions as bins 0..num_bins, float32 (B, chunk_size, D); the postprocessor turns them into
        commands. Of this observation alone: never averaged with earlier chunks. Real-time chunking passes
        `inference_delay` and `prev_chunk_left_over`, see `decoding.rtc.read_left_over`."""
        return torch.stack(list(self.stream_action_chunk(batch, **rtc)), dim=1)

    @torch.compiler.disable
    def select_action(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """The next action as bins, float32 (B, D).

        Looks at the batch when `n_action_steps` actions of the last look are used up, and decodes no more
        timesteps of a chunk than will be used. Calls of several threads wait for each other.
        """
        config, observation = self.config, self.examples.check(batch)
        with self._lock:
            if len(self._action_queue) != len(observation):
                self.reset()
                self._action_queue = self.decoder.new_episodes(len(observation))
            episodes = self._action_queue
            if config.stream:
                if (action := next(self._stream, None)) is None:
                    self._stream = self.decoder.decode_chunk(observation, config.n_action_steps, episodes)
                    action = next(self._stream)
                    remember_look(episodes, observation)
                return as_seen_now(action, episodes, observation)
            # Environments that were reset at different times look at different times.
            rows = [row for row, episode in enumerate(episodes) if not episode.actions]
            if rows:
                # Later chunks are averaged with what this one says about their timesteps.
                steps = min(config.chunk_size, config.n_action_steps * config.ensemble_size)
                due, seen = [episodes[row] for row in rows], observation.take(rows)
                decoding = self.decoder.decode_chunk(seen, steps, due)
                remember_look(due, seen)
                for episode, chunk in zip(due, torch.stack(list(decoding), dim=1), strict=True):
                    episode.add_chunk(chunk, executed=config.n_action_steps)
            actions = torch.stack([episode.actions.popleft() for episode in episodes])
            return as_seen_now(actions, episodes, observation)

    def _save_pretrained(self, save_directory: Path, **kwargs: Any) -> None:
        # LeRobot 0.6.1 passes `state_dict`, in the main process; 0.6.2 passes nothing, in every process.
        self.decoder.require_weights()
        super()._save_pretrained(save_directory, **kwargs)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            backbone.save_vlm(self.model, self.vlm_processor, Path(save_directory) / VLM_FOLDER)

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
            ValueError: weights are truncated or do not fit, the action statistics are missing, or `config`
                disagrees with the checkpoint in the action dimension or `num_bins`.
        """
        hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        source = adapters.find_source(str(pretrained_name_or_path), config, revision=revision, **hub)
        policy = cls._load(source.base, source.config, strict, **kwargs)
        return adapters.apply_adapter(policy, source)

    @classmethod
    def _load(cls, found: Checkpoint, config: VLA0Config, strict: bool, **kwargs: Any) -> Self:
        """The policy of a checkpoint, or a fresh one on a VLM."""
        if found.kind == "vlm":
            config.vlm, config.vlm_revision = found.path, found.revision
            return cls(config, **kwargs).eval()
        weights = config.server is None
        check_checkpoint(found.folder, PreTrainedConfig.from_pretrained(found.folder), config, weights)
        kwargs["vlm_folder"] = found.folder / VLM_FOLDER
        if not weights:
            return cls(config, **kwargs).eval()
        # strict: LeRobot's default only warns about missing weights, and the policy would act at random.
        return super().from_pretrained(found.folder, config=config, strict=strict, **kwargs)

    @classmethod
    def _load_as_safetensor(cls, model: Self, model_file: str, map_location: str, strict: bool) -> Self:
        with readable(model_file):
            return super()._load_as_safetensor(model, model_file, map_location, strict)
