"""VLA-0 as a LeRobot policy: a chat with a VLM, made of numbers (arXiv 2510.13054).

Training is supervised fine-tuning on "system prompt, pictures, instruction → integers"; acting is decoding
the integers under a grammar that admits nothing else. The pieces stand in examples.py (with images.py and
prompt.py), decoding.py, backbone.py.
"""

import logging
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelCard, snapshot_download
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_STATE
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoProcessor

from . import backbone
from .checkpoint import (
    ADAPTER_CONFIG,
    VLM_FOLDER,
    check_adapter,
    check_checkpoint,
    import_peft,
    is_bare_vlm,
)
from .configuration_vla0 import VLA0Config
from .convert.card import make_card, training_of
from .decoding import engine as decoding
from .decoding.drafting import AcceptanceRate, Drafter
from .decoding.ensembling import TemporalEnsembler
from .decoding.grammar import IntegerGrammar
from .decoding.prepack import Prepacked, can_prepack
from .decoding.server import Server
from .decoding.session import PromptCache, RowByRow, RowCache, encode_prefix
from .examples import ExampleMaker
from .loss import integer_error, linear_cross_entropy
from .processor_vla0 import ACTION_CLIPPED, STATISTICS
from .prompt import IGNORE
from .task_stats import TASK_RANGE, add_task_statistics

# Longest draft in symbols, tokens of a pass over all rows, and the chance below which a further symbol is not
# worth its cost, for one row. On two CPU cores each further token of a pass took 3 % of what the first one
# takes (`bench decode`, 0.5 billion parameters), and a right one saves about a fifth of a pass. A GPU takes
# as long as reading the weights does. With the rows the cost grows, until every token costs the same.
DRAFTS = {"cpu": (31, 64, 0.15), "cuda": (63, 512, 0.02)}
MOST_WORTH = 0.6


class Environment:
    """What the policy remembers of one environment of a batch of `rows`."""

    def __init__(self, policy: "VLA0Policy", rows: int) -> None:
        config = policy.config
        self.queue: deque[Tensor] = deque()  # actions (D,) to be executed
        self.ensembler = TemporalEnsembler(
            config.ensemble_size, config.ensemble_weight, config.ensemble_exponential
        )
        # The last chunk changes the speed only.
        self.drafter = None if policy.server else policy.make_drafter(policy.acceptance, rows)


class VLA0Policy(PreTrainedPolicy):
    """A VLM (Qwen2.5-VL for one), unmodified, that writes the next `chunk_size` actions as text.

    Batches come from the preprocessor: images float (B, 3, H, W) in [0, 1] under `config.camera_keys`, `task`
    a list of B instructions, `action` (training) int64 bins (B, chunk_size, D) in 0..num_bins. Actions go to
    the postprocessor as bins, too.

    Args:
        config: with `input_features` and `output_features` filled in (LeRobot's `make_policy` does).
        vlm_folder: build the VLM, without weights, from this folder instead of loading `config.vlm`.
        dataset_stats: given by LeRobot; not used, statistics live in the processors.
        dataset_meta: given by LeRobot; with `action_norm="task"`, the statistics of each task are added to
            `dataset_meta.stats`, which the processors get.
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
        config.validate_features()
        if config.action_norm == "task" and dataset_meta is not None:
            names = STATISTICS[config.normalization_mapping["ACTION"]]
            add_task_statistics(dataset_meta, names, config.num_bins)
        if config.server is not None:
            self._init_server(vlm_folder)
            return
        self.server = None
        load = {"dtype": config.dtype, "attn_implementation": config.attn_implementation}
        if vlm_folder is None:
            self.model, self.vlm_processor = backbone.load_vlm(
                config.vlm, revision=config.vlm_revision, load_in_4bit=config.load_in_4bit, **load
            )
        elif config.load_in_4bit:
            raise ValueError(
                "load_in_4bit=True starts from a VLM, not from a VLA-0 checkpoint. Set load_in_4bit=false."
            )
        else:
            self.model, self.vlm_processor = backbone.build_vlm(vlm_folder, **load)
        self.examples = ExampleMaker(config, self.vlm_processor)
        self.chat, self.action_dim = self.examples.chat, self.examples.action_dim
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config.freeze_vision:
            for module in backbone.vision_modules(self.model):
                module.requires_grad_(False)
        if config.compile_model:
            # The language model alone: the vision encoder reads sizes on the CPU, which breaks the graph.
            backbone.language_model(self.model).compile(dynamic=True)
        if not backbone.has_prompt_cache(self.model):
            logging.warning(
                f"{self.model.config.model_type}: acting decodes row by row on Transformers' own cache, the "
                "same actions in more time than with the other VLMs (see --help of vlm)."
            )
        # Position embeddings are float32 buffers whatever the weights are, so move the device, never the
        # dtype.
        self.model.to(config.device)

        self.grammar = IntegerGrammar(
            config.chunk_size * self.action_dim,
            config.num_bins,
            self.chat.digit_ids,
            self.chat.space_id,
            self.chat.end_id,
        )
        self.acceptance = AcceptanceRate()
        self._row_cache = RowCache()
        # Tokens behind a prompt: the longest answer, and a draft that reaches beyond it.
        self._room = self.grammar.max_tokens + 64
        self._prefix: list[tuple[Tensor, Tensor]] | None = None
        self._prepacked: Prepacked | None = None
        self._weights: list[tuple[int, int]] = []  # storage and number of changes, when both were made
        self.reset()

    def _init_server(self, vlm_folder: Path | None) -> None:
        if vlm_folder is None:
            raise ValueError(
                f"server={self.config.server!r} is for acting with a trained checkpoint, which is the export "
                "that the server has: give it with --policy.path, or leave server out."
            )
        self.vlm_processor = AutoProcessor.from_pretrained(vlm_folder)
        self.examples = ExampleMaker(self.config, self.vlm_processor)
        self.chat, self.action_dim = self.examples.chat, self.examples.action_dim
        self.server = Server(self.config, self.examples)
        # LeRobot counts parameters and asks them for the device.
        self.nothing = nn.Parameter(torch.zeros(0, device=self.config.device), requires_grad=False)
        self.reset()

    def get_optim_params(self) -> list[nn.Parameter]:
        self._check_has_weights()
        if self.config.load_in_4bit and not self.config.use_peft:
            raise ValueError(
                "load_in_4bit=True: weights of 4 bits cannot be trained themselves. Train an adapter on them "
                "(--peft.method_type=LORA), or set load_in_4bit=false."
            )
        return [p for p in self.parameters() if p.requires_grad]

    # --------------------------------------------------------------------------------------------------- PEFT

    def wrap_with_peft(
        self, peft_config: Any = None, peft_cli_overrides: dict[str, Any] | None = None
    ) -> nn.Module:
        """The policy as a PEFT model (`lerobot-train --peft.*`), fresh or from a checkpoint; only the adapter
        is trained and saved. The adapter remembers its base, the VLM or the checkpoint.

        Raises:
            ImportError: peft is not installed.
            ValueError: the targets include the language model's head.
        """
        import_peft()
        wrapped = super().wrap_with_peft(peft_config, peft_cli_overrides)
        if type(self.model.lm_head) is not nn.Linear:
            raise ValueError(
                "peft.target_modules (or full_training_modules) includes lm_head: acting computes a few rows "
                "of its own weights and would leave the adapter out. Choose layers below it; the default is "
                f"{self._get_default_peft_targets()['target_modules']!r}."
            )
        config, saved = self.config, wrapped.active_peft_config
        if config.pretrained_path:
            base, saved.revision = str(config.pretrained_path), config.pretrained_revision
        else:
            base, saved.revision = config.vlm, config.vlm_revision
        # A relative path would mean another folder to a process that starts elsewhere.
        saved.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
        trained, total = wrapped.get_nb_trainable_parameters()
        logging.info(f"PEFT trains {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %).")
        return wrapped

    def _get_default_peft_targets(self) -> dict[str, Any]:
        # All linear layers of the language model, as in QLoRA (arXiv 2305.14314, section 4); of the vision
        # encoder none.
        return {
            "target_modules": rf".*{backbone.family(self.model).text}\.layers\.\d+\."
            r"(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
        }

    def _validate_peft_config(self, peft_config: Any) -> None:
        """LeRobot refuses adapters on a fresh policy; here it is a pretrained VLM."""

    def _check_has_weights(self) -> None:
        if self.server is not None:
            raise ValueError(
                f"server={self.config.server!r}: the weights are on the server, so that this policy can act "
                "but not train or be saved. Leave server out."
            )

    # ----------------------------------------------------------------------------------------------- training

    def training_inputs(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The supervised fine-tuning example: (model inputs, labels (B, T), place values (B, T)).

        Augmented if and only if the policy is in training mode.
        """
        generator = self._augmentation_generator() if self.training else None
        return self.examples.training_inputs(batch, generator)

    @staticmethod
    def _augmentation_generator() -> torch.Generator:
        """Seeded by one draw from Python's global generator plus the rank.

        LeRobot checkpoints the global generators, so a resumed run repeats the draws; PyTorch's is one draw
        off after resuming, because a data loader takes one when it starts. All ranks are seeded alike and
        would draw the same augmentations.
        """
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return torch.Generator().manual_seed(random.getrandbits(62) + rank)

    def forward(self, batch: dict[str, Any], reduction: str = "mean") -> tuple[Tensor, dict[str, Any]]:
        """Cross-entropy of the answer's tokens.

        Args:
            batch: see the class; with `action`, and `action_is_pad` (B, chunk_size) if padding is masked.
            reduction: "mean" over all supervised tokens of the batch, or "none": (B,), the mean of each
                example.

        Returns:
            The loss, and floats to log: `token_accuracy`; `action_error_bins`, the mean distance in bins
            between true and predicted integers, teacher-forced, over integers whose digits are all
            supervised; `action_clipped`, the share of action values outside the statistics.
        """
        self._check_has_weights()
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}.")
        loss, metrics = self.example_loss(*self.training_inputs(batch), reduction)
        if ACTION_CLIPPED in batch:
            metrics[ACTION_CLIPPED] = batch[ACTION_CLIPPED].mean().item()
        return loss, metrics

    def example_loss(
        self, inputs: dict[str, Tensor], labels: Tensor, places: Tensor, reduction: str = "mean"
    ) -> tuple[Tensor, dict[str, float]]:
        """`forward` behind `training_inputs`: the loss and what is logged of the model's predictions."""
        hidden = backbone.hidden_states(self.model, inputs)
        # The token at position t is predicted at t - 1; logits are computed for supervised positions only.
        labels, places = labels[:, 1:], places[:, 1:]
        supervised = labels != IGNORE
        targets = labels[supervised]  # (N,)
        digit_ids = torch.tensor(self.chat.digit_ids, device=targets.device)
        losses, predicted, digits = linear_cross_entropy(
            hidden[:, :-1][supervised], self.model.lm_head.weight, targets, digit_ids
        )
        true = (targets[:, None] == digit_ids).float().argmax(-1)  # 0 where the target is no digit
        metrics = {
            "token_accuracy": (predicted == targets).float().mean().item(),
            "action_error_bins": integer_error(digits - true, supervised, places),
        }
        if reduction == "mean":
            return losses.mean(), metrics
        rows = supervised.nonzero()[:, 0]
        sums = losses.new_zeros(len(labels)).index_add(0, rows, losses)
        return sums / supervised.sum(1).clamp(min=1), metrics

    # ------------------------------------------------------------------------------------------------- acting

    def reset(self, rows: list[int] | None = None) -> None:
        """Forgets queued actions and earlier chunks. Call at the start of every episode.

        Args:
            rows: of a batch of environments, those whose episodes begin; None for all. The others go on
                undisturbed, except with `stream`, where all rows are written together and look again.
        """
        self._stream: Iterator[Tensor] = iter(())
        if rows is None:
            self._environments: list[Environment] = []
        for row in (rows or []) if self._environments else []:
            self._environments[row] = Environment(self, len(self._environments))

    def make_drafter(self, acceptance: AcceptanceRate | None = None, rows: int = 1) -> Drafter:
        """A drafter for one of `rows` that are written together, as `config.draft_length` asks for."""
        length, worth = self.config.draft_length, 0.0
        if length is None:
            length, tokens, worth = DRAFTS["cpu" if self.model.device.type == "cpu" else "cuda"]
            length = min(length, max(1, tokens // rows))
        return Drafter(self.grammar, self.action_dim, length, min(MOST_WORTH, rows * worth), acceptance)

    def _environments_of(self, batch: dict[str, Any]) -> list["Environment"]:
        rows = self.examples.rows(batch)
        if len(self._environments) != rows:
            self.reset()
            self._environments = [Environment(self, rows) for _ in range(rows)]
        return self._environments

    @torch.no_grad()
    def stream_action_chunk(self, batch: dict[str, Any], steps: int | None = None) -> Iterator[Tensor]:
        """Yields timestep after timestep, bins (B, D) as float32, as soon as every row has written it.

        Args:
            batch: as for `predict_action_chunk`; images are read when the first timestep is asked for.
            steps: timesteps to write; None writes all of the chunk.
        """
        steps = self.config.chunk_size if steps is None else steps
        yield from self._write(batch, steps, self._environments_of(batch))

    def _write(
        self, batch: dict[str, Any], steps: int, environments: list["Environment"]
    ) -> Iterator[Tensor]:
        """The timesteps of chunks, (rows, D) each, one row per environment."""
        if self.server is not None:
            to_bins = self._bins_of_data_set(batch)
            device = batch[self.config.camera_keys[0]].device
            chunks = self.server.chunks(batch).to(device, torch.float32)
            yield from (to_bins(chunks[:, step]) for step in range(steps))
            return
        training = self.training
        if training:
            self.eval()
        try:
            inputs = self.examples.acting_inputs(batch)
            cache = self.prompt_cache(inputs)
            drafters = [environment.drafter for environment in environments]
            if self.config.temperature > 0:
                # With a memory, samples would depend on what was drafted before, not on the seed alone.
                drafters = [self.make_drafter(rows=len(environments)) for _ in environments]
            for drafter in drafters:
                drafter.start()
            writing = decoding.decode_stream(
                cache,
                self.grammar,
                len(drafters),
                count=steps * self.action_dim,
                drafters=drafters,
                temperature=self.config.temperature,
            )
            to_bins = self._bins_of_data_set(batch)
            given = 0
            for decoded in writing:
                integers = decoded.integers
                while given < steps and all(len(row) >= (given + 1) * self.action_dim for row in integers):
                    step = [row[given * self.action_dim :][: self.action_dim] for row in integers]
                    yield to_bins(torch.tensor(step, dtype=torch.float32, device=inputs["input_ids"].device))
                    given += 1
        finally:
            if training:
                self.train()
        for drafter, answer in zip(drafters, integers, strict=True):
            executed = min(steps, self.config.n_action_steps)
            drafter.remember(answer[: steps * self.action_dim], executed)

    def prompt_cache(self, inputs: dict[str, Tensor]) -> decoding.Model:
        """The VLM behind prompts, for decoding. With compile_model one at a time: they share buffers."""
        if not backbone.has_prompt_cache(self.model):
            return RowByRow(self.model, inputs, self.grammar.token_ids)
        compiled = self.config.compile_model
        prefix = self._prompt_prefix(inputs)
        if self._prepacked is None and not compiled and can_prepack(self.model):
            self._prepacked = Prepacked(backbone.language_model(self.model))
        return PromptCache(
            self.model,
            inputs,
            self.grammar.token_ids,
            self._room,
            prefix,
            self._row_cache if compiled else None,
            compiled,
            self._prepacked,
        )

    def _bins_of_data_set(self, batch: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        """Integers as written, (B, D) → bins of the data set's range, which the postprocessor knows: the
        same, or, with `action_norm="task"`, fractions."""
        if self.config.action_norm == "dataset":
            return lambda integers: integers
        if TASK_RANGE not in batch:
            raise ValueError(
                f"the batch has no {TASK_RANGE!r}, by which action_norm='task' reads integers. Pass the "
                "batch through the policy's preprocessor first."
            )
        low, high = ((batch[TASK_RANGE].float() + 1) / 2 * self.config.num_bins).unbind(1)
        width = (high - low) / self.config.num_bins
        return lambda integers: low.to(integers.device) + integers * width.to(integers.device)

    def _prompt_prefix(self, inputs: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of what every prompt begins with, the words before the first picture; kept until
        the weights change."""
        weights = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.model.parameters()]
        if weights != self._weights:
            self._prefix, self._prepacked, self._weights = None, None, weights
        if self._prefix is None:
            is_picture = inputs["input_ids"][0] == self.vlm_processor.image_token_id
            length = int(is_picture.int().argmax())
            self._prefix = encode_prefix(self.model, inputs["input_ids"][:1, :length])
        return self._prefix

    def train(self, mode: bool = True) -> Self:
        if mode:
            self._prefix = self._prepacked = None  # memory that training needs
        return super().train(mode)

    @torch.compiler.disable
    def predict_action_chunk(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """Actions as bins 0..num_bins, float32 (B, chunk_size, D); the postprocessor turns them into
        commands. Of this observation alone: never averaged with earlier chunks."""
        return torch.stack(list(self.stream_action_chunk(batch)), dim=1)

    @torch.compiler.disable
    def select_action(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """The next action as bins, float32 (B, D).

        Looks at the batch when `n_action_steps` actions of the last look are used up, and writes no more of a
        chunk than will be used.
        """
        config, environments = self.config, self._environments_of(batch)
        if config.stream:
            action = next(self._stream, None)
            if action is None:
                self._stream = self._write(batch, config.n_action_steps, environments)
                action = next(self._stream)
            return action
        # After a reset of some rows, they look again at other times than the rest.
        rows = [row for row, environment in enumerate(environments) if not environment.queue]
        if rows:
            self.examples.instructions(batch)  # raises if their number does not fit
            tasks = [batch["task"]] if isinstance(batch["task"], str) else batch["task"]
            looks = {
                key: batch[key][rows] for key in (*config.camera_keys, OBS_STATE, TASK_RANGE) if key in batch
            }
            looks["task"] = [tasks[row] for row in rows]
            # Later chunks are averaged with what this one says about their timesteps.
            steps = min(config.chunk_size, config.n_action_steps * config.ensemble_size)
            chunks = torch.stack(list(self._write(looks, steps, [environments[row] for row in rows])), dim=1)
            for row, chunk in zip(rows, chunks, strict=True):
                average = environments[row].ensembler.add(chunk, executed=config.n_action_steps)
                environments[row].queue.extend(average[: config.n_action_steps])
        return torch.stack([environment.queue.popleft() for environment in environments])

    # -------------------------------------------------------------------------------------------- checkpoints

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        self._check_has_weights()
        super()._save_pretrained(save_directory, state_dict=state_dict)
        backbone.save_vlm(self.model, self.vlm_processor, Path(save_directory) / VLM_FOLDER)

    def generate_model_card(
        self,
        dataset_repo_id: str,
        model_type: str,
        license: str | None,
        tags: list[str] | None,
        cfg: Any = None,
        dataset_meta: Any = None,
    ) -> ModelCard:
        """README.md of a push. Warns if an adapter's base is a folder of this machine."""
        base = str(self.config.pretrained_path or self.config.vlm)
        if self.config.use_peft and Path(base).is_dir():
            logging.warning(
                f"the adapter's base is the folder {base}: what was pushed loads on this machine only. Push "
                f"the base, too, and name it as base_model_name_or_path in {ADAPTER_CONFIG}, or push what "
                "`lerobot-vla0 merge` writes."
            )
        action_range, dataset = None, None
        if dataset_meta is not None:
            names = STATISTICS[self.config.normalization_mapping["ACTION"]]
            action_range = {name: dataset_meta.stats[ACTION][name] for name in names}
            dataset = {"episodes": dataset_meta.total_episodes, "frames": dataset_meta.total_frames}
        return make_card(self.config, training_of(cfg), action_range, dataset=dataset)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        force_download: bool = False,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str | None = None,
        strict: bool = True,
        **kwargs: Any,
    ) -> Self:
        """Loads a checkpoint folder or Hub repo; needs neither the base VLM nor, for a folder, the network.

        An adapter checkpoint needs its base and is folded into it. A bare VLM gives a fresh policy (what
        LeRobot asks for when it loads an adapter that was trained on one).

        Raises:
            FileNotFoundError: a file of the checkpoint is missing.
            ValueError: weights are truncated or do not fit, the action statistics are missing, or `config`
                disagrees with the checkpoint in the action dimension or `num_bins`.
        """
        hub = {
            "revision": revision,
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
            "token": token,
        }
        path = str(pretrained_name_or_path)
        # LeRobot loads an adapter's base with the adapter's config.
        adapter = config.pretrained_path if config is not None and config.use_peft else None
        adapter = None if str(adapter) == path else adapter
        try:
            bare = is_bare_vlm(path, **hub)
        except FileNotFoundError as error:
            if adapter is None:
                raise
            raise FileNotFoundError(
                f"the base of the adapter {adapter} is not there: {error} If it has moved, correct "
                f"base_model_name_or_path in {ADAPTER_CONFIG}."
            ) from error
        if bare:
            if config is None:
                raise ValueError(
                    f"{path} holds a VLM and no policy. Train one: --policy.type=vla0 --policy.vlm={path}"
                )
            config.vlm, config.vlm_revision = path, revision
            policy = cls(config, **kwargs).eval()
        else:
            folder = Path(path)
            if not folder.is_dir():
                # Of a policy whose VLM is on a server only the processors' statistics.
                tensors = "policy_*.safetensors" if config is not None and config.server else "*.safetensors"
                folder = Path(snapshot_download(path, allow_patterns=["*.json", tensors], **hub))
            saved = PreTrainedConfig.from_pretrained(folder)
            config = saved if config is None else config
            if config.server is not None:
                if config.use_peft or (folder / ADAPTER_CONFIG).is_file():
                    raise ValueError(
                        f"server={config.server!r} with the adapter {path}: fold it into its base first "
                        "(lerobot-vla0 merge), and export and serve the result."
                    )
                check_checkpoint(folder, saved, config, weights=False)
                return cls(config, vlm_folder=folder / VLM_FOLDER, **kwargs).eval()
            if (folder / ADAPTER_CONFIG).is_file():
                return cls._from_adapter(folder, config, **kwargs)
            check_checkpoint(folder, saved, config)
            # strict: LeRobot's default only warns about missing weights, and the policy would act at random.
            policy = super().from_pretrained(
                folder, config=config, strict=strict, vlm_folder=folder / VLM_FOLDER, **kwargs
            )
        if adapter is not None:
            check_adapter(policy, adapter, path, revision=config.pretrained_revision)
        return policy

    @classmethod
    def _from_adapter(cls, folder: Path, config: VLA0Config, **kwargs: Any) -> Self:
        """A plain policy, the adapter folded into the weights. (LeRobot's `make_policy` gives a `PeftModel`,
        which can go on training, and calls `from_pretrained` with the base.)"""
        peft = import_peft()
        adapter = peft.PeftConfig.from_pretrained(folder)
        # Folding into 4-bit weights would round what was learnt.
        config = replace(config, use_peft=True, pretrained_path=folder, load_in_4bit=False)
        policy = cls.from_pretrained(
            adapter.base_model_name_or_path, config=config, revision=adapter.revision, **kwargs
        )
        policy = peft.PeftModel.from_pretrained(policy, folder).merge_and_unload()
        config.use_peft, config.pretrained_path = False, None
        return policy.eval()

    @classmethod
    def _load_as_safetensor(cls, model: Self, model_file: str, map_location: str, strict: bool) -> Self:
        try:
            return super()._load_as_safetensor(model, model_file, map_location, strict)
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(
                f"{model_file} could not be loaded ({str(error).splitlines()[0]}). The file is truncated or "
                "belongs to another model: copy or download it again."
            ) from error
