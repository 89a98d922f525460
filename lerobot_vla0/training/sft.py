"""`lerobot-vla0 sft`: supervised fine-tuning with TRL's SFTTrainer, on LeRobot's data, into LeRobot's
checkpoints.

TRL brings the loop: accumulation, several GPUs (DDP, FSDP), schedulers, trackers, resuming. Examples and
labels are the policy's own, as in lerobot-train; data sets, processors and files are LeRobot's. Several GPUs:

    accelerate launch --num_processes=8 -m lerobot_vla0.training.sft --config configs/sft_libero.yaml

The loss is the mean over all supervised tokens of a step, of all processes and accumulated batches together,
so how a global batch is split does not matter. lerobot-train averages the means of the processes.
"""

import random
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lerobot.configs.default import PeftConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.factory import make_dataset
from lerobot.policies.factory import make_policy, make_pre_post_processors
from safetensors.torch import load_file, load_model
from torch.utils.data import default_collate
from transformers import set_seed

from .. import backbone
from ..checkpoint import VLM_FOLDER, WEIGHTS, import_peft
from ..libero.assets import prepare_libero
from ..libero.evaluate import EvalConfig, evaluate
from ..libero.report import read_episodes
from ..libero.suites import episodes_of_suites
from ..modeling_vla0 import VLA0Policy
from ..options import parse_options
from ..processor_vla0 import ACTION_CLIPPED
from .sft_options import PROG, Arguments, parse

ADAPTER_WEIGHTS = "adapter_model.safetensors"  # PEFT's name


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
    options, training = arguments.options, arguments.training
    checkpoint = _checkpoint_to_resume(training)
    if options.use_lora:
        import_peft()
    if options.eval_after_train and training.process_index == 0:
        # Missing assets or libraries must not show after days of training.
        evaluation = parse_options(EvalConfig, PROG, ["--out=unused", *arguments.evaluation])
        for suite in evaluation.suite_list:
            prepare_libero(suite, evaluation.assets)
    set_seed(training.seed)  # of the adapters' first weights
    pipeline = _pipeline(arguments)
    with training.main_process_first(desc="data set"):  # one download for all processes
        _choose_episodes(arguments)
        dataset = make_dataset(pipeline)
    policy = make_policy(arguments.policy, ds_meta=dataset.meta)
    processors = _processors(arguments, policy, dataset)
    adapter = policy.wrap_with_peft(peft_cli_overrides=_lora(arguments)) if options.use_lora else None
    policy.train()
    save = partial(_save_checkpoint, policy=policy, adapter=adapter, processors=processors, pipeline=pipeline)
    trainer = _make_trainer(arguments, policy, adapter, processors[0], dataset, save)
    trained = [p.numel() for p in policy.parameters() if p.requires_grad]
    if trainer.is_world_process_zero():
        print(
            f"Training {sum(trained):,} of {sum(p.numel() for p in policy.parameters()):,} parameters on "
            f"{dataset.num_episodes} episodes, {dataset.num_frames:,} frames"
        )
    trainer.train(resume_from_checkpoint=checkpoint)
    final = Path(training.output_dir) / "final"
    if trainer.is_fsdp_enabled:  # one file, not shards
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(final))
    if trainer.is_world_process_zero():
        print(f"Wrote {final}")
        if arguments.policy.push_to_hub:
            _push(final, policy, adapter, processors, pipeline, dataset.meta)
        if options.eval_after_train:
            _evaluate(final, arguments, trainer, policy)
    return final


# ----------------------------------------------------------------------------------------------------- set-up


def _checkpoint_to_resume(training: Any) -> str | None:
    """Folder of the checkpoint to go on from; None starts afresh."""
    output = Path(training.output_dir)
    wanted = str(training.resume_from_checkpoint or False)  # YAML's true is a bool
    # trainer_state.json is written last: without it, the process was killed in the middle.
    complete = sorted(
        (path.parent for path in output.glob("checkpoint-*/trainer_state.json")),
        key=lambda path: int(path.name.removeprefix("checkpoint-")),
    )
    if wanted.lower() in ("false", "none"):
        if complete or (output / "final").exists():
            raise FileExistsError(
                f"output_dir={str(output)!r} holds a run already. Choose another one, or continue it with "
                "--resume_from_checkpoint true."
            )
        return None
    if wanted.lower() in ("true", "last"):
        if not complete:
            raise FileNotFoundError(
                f"resume_from_checkpoint={wanted!r}: {str(output)!r} holds no complete checkpoint-N."
            )
        return str(complete[-1])
    if not (Path(wanted) / "trainer_state.json").is_file():
        raise FileNotFoundError(
            f"resume_from_checkpoint={wanted!r} is no complete checkpoint of this trainer: there is no "
            "trainer_state.json in it. Give <output_dir>/checkpoint-N, or true for the last one."
        )
    return wanted


def _lora(arguments: Arguments) -> dict[str, Any]:
    """As LeRobot's `wrap_with_peft` takes it; what is None is the policy's own default."""
    options = arguments.options
    if any("lm_head" in name for name in options.lora_target_modules or []):
        raise ValueError(
            "lora_target_modules names lm_head: TRL computes the loss from its plain weights, so an adapter "
            "there would never be trained. Leave it out."
        )
    return {
        "method_type": "LORA",
        "r": options.lora_r,
        "lora_alpha": options.lora_alpha,
        "lora_dropout": options.lora_dropout,
        "target_modules": options.lora_target_modules,
    }


def _pipeline(arguments: Arguments) -> TrainPipelineConfig:
    """The run in lerobot-train's words: makes LeRobot's data set, and becomes train_config.json."""
    options, training = arguments.options, arguments.training
    pipeline = TrainPipelineConfig(
        dataset=arguments.dataset,
        policy=arguments.policy,
        output_dir=Path(training.output_dir),
        job_name=training.run_name,
        seed=training.seed,
        batch_size=training.per_device_train_batch_size * training.gradient_accumulation_steps,
        num_workers=max(1, training.dataloader_num_workers),  # a streaming data set needs one shard
        steps=max(0, training.max_steps),
        save_freq=int(training.save_steps),
        log_freq=int(training.logging_steps),
        optimizer=arguments.policy.get_optimizer_preset(),
    )
    if options.use_lora:
        pipeline.peft = PeftConfig(
            target_modules=options.lora_target_modules, r=options.lora_r, lora_alpha=options.lora_alpha
        )
    return pipeline


def _choose_episodes(arguments: Arguments) -> None:
    """Sets `dataset.episodes` to those of `train_suite` and `max_episodes`."""
    options, config = arguments.options, arguments.dataset
    if options.max_episodes is not None and options.max_episodes < 1:
        raise ValueError(f"max_episodes={options.max_episodes} must be at least 1.")
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


def _processors(arguments: Arguments, policy: VLA0Policy, dataset: Any) -> tuple[Any, Any]:
    """Pre- and postprocessor with this data set's statistics, as lerobot-train makes them."""
    config, stats = policy.config, dataset.meta.stats
    if config.pretrained_path is None:
        return make_pre_post_processors(config, dataset_stats=stats)
    features = {**config.input_features, **config.output_features}
    norm_map = config.normalization_mapping
    return make_pre_post_processors(
        config,
        pretrained_path=str(config.pretrained_path),
        dataset_stats=stats,
        preprocessor_overrides={
            "device_processor": {"device": config.device},
            "normalizer_processor": {"features": features, "norm_map": norm_map, "stats": stats},
        },
        postprocessor_overrides={
            "unnormalizer_processor": {
                "features": config.output_features,
                "norm_map": norm_map,
                "stats": stats,
            },
        },
    )


# ---------------------------------------------------------------------------------------------------- trainer


def _make_trainer(
    arguments: Arguments, policy: VLA0Policy, adapter: Any, preprocess: Any, dataset: Any, save: Any
) -> Any:
    """TRL's SFTTrainer on the policy's VLM, fed by the policy."""
    import datasets
    from trl import SFTTrainer

    training = arguments.training

    class VLA0Trainer(SFTTrainer):
        def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: Any) -> tuple:
            """Trainer's batches of one optimiser step. Here, not in the loader's workers, LeRobot's batches
            become examples: on the device, and free to decode video there."""
            # No global state: a resumed run repeats the draws, and no two ranks, steps or epochs share them.
            seeds = (
                f"{training.seed} {training.process_index} {self.state.global_step} {i}"
                for i in range(num_batches)
            )
            examples = (
                self.example(batch, random.Random(seed).getrandbits(62))
                for seed, batch in zip(seeds, epoch_iterator, strict=False)
            )
            return super().get_batch_samples(examples, num_batches, device)

        def example(self, batch: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
            """Inputs and labels of a batch of the data set."""
            batch = {k: v.to(training.device) if torch.is_tensor(v) else v for k, v in batch.items()}
            for key in dataset.meta.camera_keys:
                if key in batch and batch[key].dtype == torch.uint8:  # as in lerobot-train
                    batch[key] = batch[key].float() / 255
            batch = preprocess(batch)
            self._metrics["train"][ACTION_CLIPPED].append(batch[ACTION_CLIPPED].mean().item())
            generator = torch.Generator().manual_seed(seed)
            inputs, labels, _ = policy.examples.training_inputs(batch, generator)
            return {**inputs, "labels": labels}

        def create_model_card(self, *arguments: Any, **names: Any) -> None:
            """LeRobot's card goes to the Hub; TRL's would explain text generation."""

        def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
            save(Path(output_dir or training.output_dir), steps=self.state.max_steps, state_dict=state_dict)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            folder = Path(resume_from_checkpoint)
            if self.is_fsdp_enabled:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            elif adapter is not None:
                from peft import set_peft_model_state_dict

                set_peft_model_state_dict(adapter, load_file(folder / ADAPTER_WEIGHTS))
            else:
                load_model(policy, folder / WEIGHTS, device=policy.config.device)

    if dataset_is_streaming := arguments.dataset.streaming:
        # TRL takes `datasets`' classes only.
        train_dataset = datasets.IterableDataset.from_generator(lambda: iter(dataset))
    else:
        train_dataset = datasets.Dataset.from_dict({"index": range(len(dataset))})
    trainer = VLA0Trainer(
        model=policy.model,
        args=training,
        train_dataset=train_dataset,
        data_collator=default_collate if dataset_is_streaming else partial(_collate, dataset),
        processing_class=policy.vlm_processor,
    )
    # Tokens are counted over processes and accumulated batches. Qwen2.5-VL says that its own loss cannot take
    # the count; TRL's, which is computed here, can.
    trainer.model_accepts_loss_kwargs = True
    return trainer


def _collate(dataset: Any, rows: list[dict[str, int]]) -> dict[str, Any]:
    """Runs in the loader's workers: decodes what the indices stand for."""
    return default_collate([dataset[row["index"]] for row in rows])


# ------------------------------------------------------------------------------------------------ checkpoints


def _save_checkpoint(
    folder: Path,
    *,
    policy: VLA0Policy,
    adapter: Any,
    processors: tuple[Any, Any],
    pipeline: TrainPipelineConfig,
    steps: int,
    state_dict: dict[str, Any] | None = None,
) -> None:
    """A LeRobot checkpoint, as lerobot-train writes it.

    Args:
        state_dict: of the VLM, gathered from all processes (FSDP); None takes the policy's own weights.
    """
    pipeline.steps = steps
    if adapter is None:
        weights = state_dict and {f"model.{name}": value for name, value in state_dict.items()}
        policy.save_pretrained(folder, state_dict=weights)
    else:
        weights = state_dict and {f"base_model.model.model.{n}": value for n, value in state_dict.items()}
        adapter.save_pretrained(folder, state_dict=weights)
        policy.config.save_pretrained(folder)
        backbone.save_vlm(policy.model, policy.vlm_processor, folder / VLM_FOLDER)
    pipeline.save_pretrained(folder)
    for processor in processors:
        processor.save_pretrained(folder)


def _push(
    final: Path,
    policy: VLA0Policy,
    adapter: Any,
    processors: tuple[Any, Any],
    pipeline: TrainPipelineConfig,
    meta: LeRobotDatasetMetadata,
) -> None:
    """To the Hub by LeRobot's own code: the layout and card of lerobot-train."""
    if adapter is not None:
        policy.push_model_to_hub(pipeline, peft_model=adapter, dataset_meta=meta)
    else:
        # Read back: with FSDP no process holds all weights.
        policy.push_model_to_hub(pipeline, state_dict=load_file(final / WEIGHTS), dataset_meta=meta)
    for processor in processors:
        processor.push_to_hub(policy.config.repo_id)


def _evaluate(final: Path, arguments: Arguments, trainer: Any, policy: VLA0Policy) -> None:
    """`lerobot-vla0 eval` of the final checkpoint; success rates go where the loss went."""
    # The memory is needed for the weights' second copy.
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()
    if not trainer.is_fsdp_enabled:
        policy.to("cpu")
    out = Path(arguments.training.output_dir) / "eval"
    options = [f"--policy.path={final}", f"--out={out}", *arguments.evaluation]
    evaluate(parse_options(EvalConfig, PROG, options))
    successes: dict[str, list[bool]] = {}
    for (suite, _, _), episode in read_episodes(out).items():
        successes.setdefault(suite, []).append(episode["success"])
    rates = {f"eval_{suite}_success": sum(found) / len(found) for suite, found in successes.items()}
    trainer.log(rates)
    trainer.save_state()


if __name__ == "__main__":
    from ..cli import main as cli  # user errors end in one message

    cli(["sft", *sys.argv[1:]])
