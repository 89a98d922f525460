"""`lerobot-vla0 sft`: supervised fine-tuning with TRL's SFTTrainer, on LeRobot's data, into LeRobot's
checkpoints.

TRL brings the loop: accumulation, several GPUs (DDP, FSDP), schedulers, trackers, resuming. Examples and
labels are the policy's own, as in lerobot-train; data sets, processors and files are LeRobot's. Several GPUs:

    accelerate launch --num_processes=8 -m lerobot_vla0.cli sft --config configs/sft_libero.yaml

The loss is the mean over all supervised tokens of an optimiser step, of all processes and accumulated batches
together, so it does not depend on how a global batch is split. lerobot-train averages the processes' means.
"""

import logging
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from lerobot.configs.default import PeftConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets.factory import make_dataset
from lerobot.policies.factory import make_policy, make_pre_post_processors
from transformers import set_seed

try:
    import trl  # noqa: F401
except ImportError as error:
    raise ImportError("TRL is not installed: pip install 'lerobot_policy_vla0[sft]'") from error

from ..adapters import import_peft
from ..files import new_folder, read_json
from ..libero.assets import prepare_libero
from ..libero.evaluate import EvalConfig, evaluate
from ..libero.report import read_episodes
from ..libero.suites import episodes_of_suites
from ..modeling_vla0 import VLA0Policy
from ..options import load_policy_config
from ..processor_vla0 import used_features
from ..training_data import read_metadata
from .resume import checkpoint_to_resume, step_of
from .sft_options import Arguments, parse
from .trainer import VLA0Trainer


def main(argv: list[str]) -> None:
    """Trains; options are those of sft_options.py."""
    sft(parse(argv))


def sft(arguments: Arguments) -> Path:
    """Trains and returns the folder of the final checkpoint, `<output_dir>/final`.

    `<output_dir>/checkpoint-N` are LeRobot checkpoints, too, with what resuming needs beside it.

    Raises:
        FileExistsError: `output_dir` holds another run, and `resume_from_checkpoint` was not given.
        FileNotFoundError: there is no checkpoint to resume from.
        ImportError: `use_lora` or an adapter without peft, or `eval_after_train` without LIBERO.
        ValueError: nothing is left to train on, or a setting that does not fit data or model.
    """
    options, training, evaluation = arguments.options, arguments.training, arguments.evaluation
    checkpoint = checkpoint_to_resume(training)
    final = Path(training.output_dir) / "final"
    # Missing libraries or assets must show now, not after the download of the data or days of training.
    if options.use_lora or arguments.policy.use_peft:
        import_peft()
    if evaluation is not None and training.process_index == 0:
        for suite in evaluation.suite_list:
            prepare_libero(suite, evaluation.assets)
    set_seed(training.seed)  # adapters get random weights
    pipeline = _pipeline(arguments)
    with training.main_process_first(desc="data set"):  # one download for all processes
        _choose_episodes(arguments)
        dataset = make_dataset(pipeline)
    policy = make_policy(arguments.policy, ds_meta=dataset.meta, rename_map=pipeline.rename_map)
    adapter = None
    if arguments.policy.use_peft:  # --policy.path is an adapter, which LeRobot has put on its base
        adapter, policy = policy, policy.get_base_model()
        saved = adapter.active_peft_config
        pipeline.peft = PeftConfig(method_type=saved.peft_type.value, r=saved.r, lora_alpha=saved.lora_alpha)
    elif options.use_lora:
        lora = {**asdict(pipeline.peft), "lora_dropout": options.lora_dropout}
        adapter = policy.wrap_with_peft(peft_cli_overrides=lora)
    policy.get_optim_params()  # refuses weights that are not there or cannot be trained
    processors = _processors(policy, dataset, pipeline.rename_map)
    trainer = VLA0Trainer(training, pipeline, dataset, policy.train(), processors, adapter)
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    if trainer.is_world_process_zero():
        print(
            f"Training {trained:,} of {sum(p.numel() for p in policy.parameters()):,} parameters on "
            f"{dataset.num_episodes} episodes, {dataset.num_frames:,} frames"
        )
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    step = trainer.state.global_step
    if step == 0:
        raise ValueError(
            f"nothing was trained: {dataset.num_frames} frames make no step of per_device_train_batch_size="
            f"{training.per_device_train_batch_size} on {training.world_size} processes with "
            f"dataloader_drop_last={training.dataloader_drop_last} and num_train_epochs="
            f"{training.num_train_epochs}. Lower the batch size, or set dataloader_drop_last=false."
        )
    if checkpoint is not None and step_of(checkpoint) == step == _steps_of(final):
        print(
            f"The run had finished: {final} is unchanged. To train on, raise max_steps or num_train_epochs."
        )
    else:
        if trainer.is_fsdp_enabled:  # one file, not shards
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        writes = trainer.is_world_process_zero()
        with new_folder(final, replace=True) if writes else nullcontext(final) as folder:
            trainer.save_model(str(folder))
        if writes:
            print(f"Wrote {final}")
            if policy.config.push_to_hub:
                _push(final, trainer)
    if evaluation is not None and trainer.is_world_process_zero():
        _evaluate(final, trainer, evaluation)
    return final


def _steps_of(final: Path) -> int | None:
    """The steps of the run that wrote it; None if it is not there."""
    file = final / "train_config.json"
    return read_json(file).get("steps") if file.is_file() else None


# ------------------------------------------------------------------------------------------- before training


def _pipeline(arguments: Arguments) -> TrainPipelineConfig:
    """The run as lerobot-train describes it: makes the data set, and is saved as train_config.json."""
    options, training = arguments.options, arguments.training
    if options.rename_map and arguments.policy.pretrained_path is None:
        raise ValueError(
            f"rename_map={options.rename_map!r} has no effect without --policy.path: a new policy takes the "
            "data set's names."
        )
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
        rename_map=options.rename_map,
    )


def _choose_episodes(arguments: Arguments) -> None:
    """Sets `dataset.episodes` to those of `train_suite` and `max_episodes`, if the data set can be read."""
    options, config = arguments.options, arguments.dataset
    if config.streaming and arguments.training.max_steps <= 0:
        raise ValueError("dataset.streaming=true has no length: say how long to train with --max_steps.")
    not_streamed = {
        "train_suite": options.train_suite,
        "max_episodes": options.max_episodes,
        "dataset.episodes": config.episodes,
    }
    for name, value in not_streamed.items():
        if config.streaming and value is not None:
            raise ValueError(
                f"{name}={value!r} has no effect with dataset.streaming=true: LeRobot streams all episodes. "
                "Leave one of them out; without streaming, the data set is downloaded."
            )
    meta = read_metadata(config.repo_id, config.root, revision=config.revision, repo_type=config.repo_type)
    known = range(meta.total_episodes)
    unknown = [episode for episode in config.episodes or [] if episode not in known]
    if unknown:
        raise ValueError(f"dataset.episodes names {unknown}; the data set has 0..{known[-1]}.")
    if options.train_suite is None and options.max_episodes is None:
        return
    episodes = list(known) if config.episodes is None else config.episodes
    if options.train_suite is not None:
        tasks = meta.episodes["tasks"] if "tasks" in meta.episodes.column_names else [[]]
        of_suite = set(episodes_of_suites(options.train_suite, tasks))
        episodes = [episode for episode in episodes if episode in of_suite]
        if not episodes:
            raise ValueError(f"dataset.episodes holds no episode of train_suite={options.train_suite!r}.")
    config.episodes = episodes[: options.max_episodes]


def _processors(policy: VLA0Policy, dataset: Any, rename_map: dict[str, str]) -> tuple[Any, Any]:
    """Pre- and postprocessor with this data set's statistics, as lerobot-train makes them."""
    config, stats = policy.config, dataset.meta.stats
    changed = {"rename_observations_processor": {"rename_map": rename_map}} if rename_map else {}
    replaced = {"norm_map": config.normalization_mapping, "stats": stats}
    if config.use_relative_actions:
        changed["relative_actions_processor"] = {"action_names": config.action_feature_names}
    return make_pre_post_processors(
        config,
        dataset_stats=stats,
        # The rest is for those of a checkpoint (--policy.path).
        pretrained_path=config.pretrained_path and str(config.pretrained_path),
        preprocessor_overrides={
            "device_processor": {"device": config.device},
            "normalizer_processor": {"features": used_features(config), **replaced},
            **changed,
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
    card = trainer.policy.generate_model_card(
        pipeline.dataset.repo_id, cfg=pipeline, dataset_meta=trainer.dataset.meta
    )
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
