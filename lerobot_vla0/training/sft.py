"""`lerobot-vla0 sft`: supervised fine-tuning with TRL's SFTTrainer, on LeRobot's data, into LeRobot's
checkpoints.

TRL brings the loop: accumulation, several GPUs (DDP, FSDP), schedulers, trackers, resuming. Examples and
labels are the policy's own, as in lerobot-train; data sets, processors and files are LeRobot's. Several GPUs:

    accelerate launch --num_processes=8 -m lerobot_vla0.cli sft --config configs/sft_libero.yaml

The loss is the mean over all supervised tokens of an optimiser step, of all processes and accumulated batches
together, so it does not depend on how a global batch is split. lerobot-train averages the processes' means.
"""

import logging
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from huggingface_hub import HfApi, save_torch_state_dict
from lerobot.configs.default import PeftConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.factory import make_dataset
from lerobot.policies.factory import make_policy, make_pre_post_processors
from safetensors.torch import load_file, load_model
from torch.utils.data import default_collate
from transformers import set_seed

try:
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    raise ImportError("TRL is not installed: pip install 'lerobot_policy_vla0[sft]'") from error

from .. import backbone
from ..adapters import import_peft
from ..checkpoint import ADAPTER_WEIGHTS, VLM_FOLDER, WEIGHTS
from ..libero.assets import prepare_libero
from ..libero.evaluate import EvalConfig, evaluate
from ..libero.report import read_episodes
from ..libero.suites import episodes_of_suites
from ..modeling_vla0 import VLA0Policy
from ..options import load_policy_config
from ..processor_vla0 import ACTION_CLIPPED
from .sft_options import Arguments, checkpoint_to_resume, parse


def main(argv: list[str]) -> None:
    """Trains; options are those of sft_options.py."""
    sft(parse(argv))


def sft(arguments: Arguments) -> Path:
    """Trains and returns the folder of the final checkpoint, `<output_dir>/final`.

    `<output_dir>/checkpoint-N` are LeRobot checkpoints, too, with what resuming needs beside it.

    Raises:
        FileExistsError: `output_dir` holds another run, and `resume_from_checkpoint` was not given.
        FileNotFoundError: there is no checkpoint to resume from.
        ImportError: `use_lora` without peft, or `eval_after_train` without LIBERO.
        ValueError: no episode is left to train on, or a setting that does not fit data or model.
    """
    options, training, evaluation = arguments.options, arguments.training, arguments.evaluation
    checkpoint = checkpoint_to_resume(training)
    # Missing libraries or assets must show now, not after the download of the data or days of training.
    if options.use_lora:
        import_peft()
    if evaluation is not None and training.process_index == 0:
        for suite in evaluation.suite_list:
            prepare_libero(suite, evaluation.assets)
    set_seed(training.seed)  # adapters get random weights
    pipeline = _pipeline(arguments)
    with training.main_process_first(desc="data set"):  # one download for all processes
        _choose_episodes(arguments)
        dataset = make_dataset(pipeline)
    policy = make_policy(arguments.policy, ds_meta=dataset.meta)
    processors = _processors(policy, dataset)
    adapter = None
    if options.use_lora:
        lora = {**asdict(pipeline.peft), "lora_dropout": options.lora_dropout}
        adapter = policy.wrap_with_peft(peft_cli_overrides=lora)
    trainer = VLA0Trainer(training, pipeline, dataset, policy.train(), processors, adapter)
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    if trainer.is_world_process_zero():
        print(
            f"Training {trained:,} of {sum(p.numel() for p in policy.parameters()):,} parameters on "
            f"{dataset.num_episodes} episodes, {dataset.num_frames:,} frames"
        )
    trainer.train(resume_from_checkpoint=checkpoint)
    final = Path(training.output_dir) / "final"
    if trainer.is_fsdp_enabled:  # one file, not shards
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(final))
    if trainer.is_world_process_zero():
        print(f"Wrote {final}")
        if policy.config.push_to_hub:
            _push(final, trainer)
        if evaluation is not None:
            _evaluate(final, trainer, evaluation)
    return final


class VLA0Trainer(SFTTrainer):
    """TRL's trainer on a policy's VLM: the policy makes the examples, and checkpoints are LeRobot's.

    Args:
        pipeline: the run as lerobot-train describes it, for train_config.json.
        dataset: of LeRobot; items are one timestep each.
        policy: in training mode.
        processors: the policy's pre- and postprocessor.
        adapter: the policy as a PEFT model, to train and save only the adapter; None trains the policy.
    """

    def __init__(
        self,
        training: SFTConfig,
        pipeline: TrainPipelineConfig,
        dataset: Any,
        policy: VLA0Policy,
        processors: tuple[Any, Any],
        adapter: Any = None,
    ) -> None:
        self.pipeline, self.dataset, self.policy = pipeline, dataset, policy
        self.processors, self.adapter = processors, adapter
        if pipeline.dataset.streaming:
            rows = datasets.IterableDataset.from_generator(lambda: iter(dataset))
            collate = default_collate
        else:
            # TRL takes data sets of the library `datasets` only: the rows are indices into LeRobot's.
            rows = datasets.Dataset.from_dict({"index": range(len(dataset))})
            collate = partial(_collate, dataset)
        super().__init__(
            model=policy.model,
            args=training,
            train_dataset=rows,
            data_collator=collate,
            processing_class=policy.vlm_processor,
        )
        # Divides the loss by the number of tokens of all processes and accumulated batches. Transformers does
        # not, because Qwen2.5-VL's own loss cannot take that number; TRL's, which is used here, can.
        self.model_accepts_loss_kwargs = True

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: Any) -> tuple:
        """The examples of one optimiser step, and the number of their supervised tokens.

        LeRobot's batches become examples here, not in the data loader's workers, because the images are
        augmented on the GPU.
        """
        # Seeds from these numbers alone: a resumed run augments as an uninterrupted one, and ranks, steps and
        # accumulated batches differ.
        args, step = self.args, self.state.global_step
        seeds = (f"{args.seed} {args.process_index} {step} {i}" for i in range(num_batches))
        examples = (
            self.example(batch, random.Random(seed).getrandbits(62))
            # The seeds first: zip then takes no batch that belongs to the next step.
            for seed, batch in zip(seeds, epoch_iterator, strict=False)
        )
        return super().get_batch_samples(examples, num_batches, device)

    def example(self, batch: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
        """The model's inputs and the labels (B, T) of a batch of the data set, augmented."""
        batch = {k: v.to(self.args.device) if torch.is_tensor(v) else v for k, v in batch.items()}
        for key in self.dataset.meta.camera_keys:
            if key in batch and batch[key].dtype == torch.uint8:  # as in lerobot-train
                batch[key] = batch[key].float() / 255
        batch = self.processors[0](batch)
        self._metrics["train"][ACTION_CLIPPED].append(batch[ACTION_CLIPPED].mean().item())  # TRL logs means
        generator = torch.Generator().manual_seed(seed)
        inputs, labels, _ = self.policy.examples.training_examples(batch, generator)
        return {**inputs, "labels": labels}

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: TRL's card would go into every checkpoint; a push writes the policy's own."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Writes a LeRobot checkpoint, as lerobot-train does.

        Args:
            state_dict: the VLM's weights, gathered from all processes (FSDP); None takes the policy's own.
        """
        folder, policy = Path(output_dir or self.args.output_dir), self.policy
        if self.adapter is None and state_dict is None:
            policy.save_pretrained(folder)
        else:
            policy.config.save_pretrained(folder)
            backbone.save_vlm(policy.model, policy.vlm_processor, folder / VLM_FOLDER)
            # `state_dict` has the VLM's names, the file those of the policy, or of the PEFT model around it.
            prefix = "model." if self.adapter is None else "base_model.model.model."
            weights = state_dict and {prefix + name: tensor for name, tensor in state_dict.items()}
            if self.adapter is None:
                # Not by `policy.save_pretrained`, which LeRobot 0.6.2 lets take no weights.
                save_torch_state_dict(weights, folder, max_shard_size=sys.maxsize)
            else:
                self.adapter.save_pretrained(folder, state_dict=weights)
        self.pipeline.steps = self.state.max_steps
        self.pipeline.save_pretrained(folder)
        for processor in self.processors:
            processor.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif self.adapter is not None:
            weights = load_file(folder / ADAPTER_WEIGHTS)
            import_peft().set_peft_model_state_dict(self.adapter, weights)
        else:
            load_model(self.policy, folder / WEIGHTS, device=self.policy.config.device)


def _collate(dataset: Any, rows: list[dict[str, int]]) -> dict[str, Any]:
    """A batch of LeRobot's data set. Runs in the data loader's workers, where it decodes the videos."""
    return default_collate([dataset[row["index"]] for row in rows])


# ------------------------------------------------------------------------------------------- before training


def _pipeline(arguments: Arguments) -> TrainPipelineConfig:
    """The run as lerobot-train describes it: makes the data set, and is saved as train_config.json."""
    options, training = arguments.options, arguments.training
    lora = PeftConfig(options.lora_target_modules, r=options.lora_r, lora_alpha=options.lora_alpha)
    return TrainPipelineConfig(
        dataset=arguments.dataset,
        policy=arguments.policy,
        output_dir=Path(training.output_dir),
        job_name=training.run_name,
        seed=training.seed,
        batch_size=training.per_device_train_batch_size * training.gradient_accumulation_steps,
        num_workers=max(1, training.dataloader_num_workers),  # a streaming data set needs one shard
        steps=max(0, training.max_steps),  # -1 until the trainer has counted the steps of its epochs
        save_freq=int(training.save_steps),
        log_freq=int(training.logging_steps),
        optimizer=arguments.policy.get_optimizer_preset(),
        peft=lora if options.use_lora else None,
    )


def _choose_episodes(arguments: Arguments) -> None:
    """Sets `dataset.episodes` to those of `train_suite` and `max_episodes`."""
    options, config = arguments.options, arguments.dataset
    if config.streaming and arguments.training.max_steps <= 0:
        raise ValueError("dataset.streaming=true has no length: say how long to train with --max_steps.")
    if options.train_suite is None and options.max_episodes is None:
        return
    meta = LeRobotDatasetMetadata(
        config.repo_id, root=config.root, revision=config.revision, repo_type=config.repo_type
    )
    episodes = list(range(meta.total_episodes)) if config.episodes is None else config.episodes
    if options.train_suite is not None:
        tasks = meta.episodes["tasks"] if "tasks" in meta.episodes.column_names else [[]]
        of_suite = set(episodes_of_suites(options.train_suite, tasks))
        episodes = [episode for episode in episodes if episode in of_suite]
        if not episodes:
            raise ValueError(f"dataset.episodes holds no episode of train_suite={options.train_suite!r}.")
    config.episodes = episodes[: options.max_episodes]


def _processors(policy: VLA0Policy, dataset: Any) -> tuple[Any, Any]:
    """Pre- and postprocessor with this data set's statistics, as lerobot-train makes them."""
    config, stats = policy.config, dataset.meta.stats
    replaced = {"norm_map": config.normalization_mapping, "stats": stats}
    features = {**config.input_features, **config.output_features}
    return make_pre_post_processors(
        config,
        dataset_stats=stats,
        # The rest is for those of a checkpoint (--policy.path).
        pretrained_path=config.pretrained_path and str(config.pretrained_path),
        preprocessor_overrides={
            "device_processor": {"device": config.device},
            "normalizer_processor": {"features": features, **replaced},
        },
        postprocessor_overrides={
            "unnormalizer_processor": {"features": config.output_features, **replaced},
        },
    )


# -------------------------------------------------------------------------------------------- after training


def _push(final: Path, trainer: VLA0Trainer) -> None:
    """Uploads the final checkpoint with its model card: what lerobot-train pushes.

    Not by LeRobot's `push_model_to_hub`: it would write all files a second time, needs the weights in this
    process (FSDP), and is deprecated in LeRobot 0.6.2.
    """
    config, pipeline = trainer.policy.config, trainer.pipeline
    card = trainer.policy.generate_model_card(cfg=pipeline, dataset_meta=trainer.dataset.meta)
    card.save(final / "README.md")
    api = HfApi()
    repo = api.create_repo(config.repo_id, private=config.private, exist_ok=True).repo_id
    commit = api.upload_folder(
        repo_id=repo, folder_path=final, commit_message="Upload policy weights, train config and readme"
    )
    logging.info(f"Model pushed to {commit.repo_url.url}")  # LeRobot's wording: its remote jobs wait for it


def _evaluate(final: Path, trainer: VLA0Trainer, config: EvalConfig) -> None:
    """`lerobot-vla0 eval` of the final checkpoint; the success rates are logged where the loss was."""
    # Makes room for the weights that the evaluation loads.
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()
    if not trainer.is_fsdp_enabled:
        trainer.policy.to("cpu")
    config.policy = load_policy_config(final)
    evaluate(config)
    successes: dict[str, list[bool]] = {}
    for (suite, _, _), episode in read_episodes(config.out).items():
        successes.setdefault(suite, []).append(episode["success"])
    trainer.log({f"eval_{suite}_success": sum(found) / len(found) for suite, found in successes.items()})
    trainer.save_state()
