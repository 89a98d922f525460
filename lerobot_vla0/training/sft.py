"""`lerobot-vla0 sft`: supervised fine-tuning with TRL's SFTTrainer, on LeRobot's data, into LeRobot's
checkpoints.

TRL brings the loop: accumulation, several GPUs (DDP, FSDP), schedulers, trackers, resuming. Examples and
labels are the policy's own, as in lerobot-train; data sets, processors and files are LeRobot's. Several GPUs:

    accelerate launch --num_processes=8 -m lerobot_vla0.cli sft --config_path=configs/sft_libero.yaml

The loss is the mean over all supervised tokens of an optimiser step, of all processes and accumulated batches
together, so it does not depend on how a global batch is split. lerobot-train averages the processes' means.
"""

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from lerobot.configs.default import DatasetConfig, PeftConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets.factory import make_dataset
from lerobot.policies.factory import make_policy, make_pre_post_processors
from torch import nn
from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

try:
    import trl  # noqa: F401
except ImportError as error:
    raise ImportError("TRL is not installed: pip install 'lerobot_policy_vla0[sft]'") from error

from ..checkpoint import import_peft
from ..cli import PolicyOptions
from ..dataset import read_metadata
from ..files import check_place
from ..libero.suites import episodes_of_suites
from ..modeling_vla0 import VLA0Policy
from ..processor_vla0 import used_features
from .trainer import TrainerOptions, VLA0Trainer


@dataclass(kw_only=True)
class SFTOptions(PolicyOptions):
    """What to train, on what, and how. `--policy.type=vla0` trains a new policy, `--policy.path=` a
    checkpoint or an adapter."""

    # As for lerobot-train: --dataset.repo_id=<Hub id>, --dataset.root=<local folder>, --dataset.episodes, ...
    dataset: DatasetConfig
    # Settings of TRL's SFTConfig: --trainer.max_steps, --trainer.learning_rate, ...
    trainer: TrainerOptions = field(default_factory=TrainerOptions)
    # As for lerobot-train, trains an adapter (needs peft): --peft.method_type=LORA --peft.r=16
    peft: PeftConfig | None = None
    # As for lerobot-train: {camera in the data set: camera of the checkpoint at --policy.path}.
    rename_map: dict[str, str] = field(default_factory=dict)
    # Train on the episodes of these LIBERO suites only, separated by commas: libero_spatial, libero_object,
    # libero_goal, libero_10, libero_90.
    train_suite: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        policy = self.require_policy("train what? --policy.type=vla0 for a new policy, or")
        if policy.push_to_hub and not policy.repo_id:
            raise ValueError("push_to_hub=True needs --policy.repo_id=<you>/<name>. Or set it to false.")
        if self.rename_map and policy.pretrained_path is None:
            raise ValueError(
                f"rename_map={self.rename_map!r} has no effect without --policy.path: a new policy takes the "
                "data set's names. Leave it out."
            )
        if self.peft is not None and policy.use_peft:
            raise ValueError(f"peft has no effect on the adapter {policy.pretrained_path}. Leave it out.")


def sft(options: SFTOptions) -> Path:
    """Trains and returns the folder of the final checkpoint, `<output_dir>/final`.

    `<output_dir>/checkpoint-N` are LeRobot checkpoints, too, with what resuming needs beside it.

    Raises:
        FileExistsError: `output_dir` holds another run, and `resume_from_checkpoint` is not set.
        FileNotFoundError: there is no checkpoint to resume from.
        ImportError: an adapter without peft.
        ValueError: nothing is left to train on, or a setting that does not fit data or model.
    """
    training, config = options.trainer, options.policy
    training.complete(config)
    resumed = _checkpoint_to_resume(training)
    if options.peft is not None or config.use_peft:
        import_peft()  # fails now if it is missing, not after the download of the data
    set_seed(training.seed)  # adapters get random weights
    pipeline = _pipeline(options)
    with training.main_process_first(desc="data set"):  # one download for all processes
        _choose_episodes(options)
        dataset = make_dataset(pipeline)
    policy = make_policy(config, ds_meta=dataset.meta, rename_map=options.rename_map)
    policy, adapter = _with_adapter(policy, pipeline)
    policy.get_optim_params()  # refuses weights that are on a server
    processors = _processors(policy, dataset, options.rename_map)
    trainer = VLA0Trainer(training, pipeline, dataset, policy.train(), processors, adapter)
    if trainer.is_world_process_zero():
        print(f"Training on {dataset.num_episodes} episodes, {dataset.num_frames:,} frames")
    trainer.train(resume_from_checkpoint=resumed and str(resumed))
    if trainer.state.global_step == 0:
        raise ValueError(
            f"nothing was trained: {dataset.num_frames} frames make no step. Lower trainer.per_device_train_"
            f"batch_size={training.per_device_train_batch_size}, or set dataloader_drop_last=false."
        )
    final = Path(training.output_dir) / "final"
    if trainer.is_fsdp_enabled:  # one file, not shards
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(final))
    if trainer.is_world_process_zero():
        print(f"Wrote {final}")
        if config.push_to_hub:
            _push(final, trainer)
    return final


def _checkpoint_to_resume(training: TrainerOptions) -> Path | None:
    """Folder of the checkpoint to continue from; None starts afresh."""
    output = check_place(training.output_dir, "folder", "trainer.output_dir")
    # Transformers' `get_last_checkpoint` takes also one that a killed run has not finished: this file is
    # written last.
    complete = output.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")
    steps = [int(step) for file in complete if (step := file.parent.name.rpartition("-")[2]).isdigit()]
    last = output / f"{PREFIX_CHECKPOINT_DIR}-{max(steps, default=0)}"
    wanted = str(training.resume_from_checkpoint or False).lower()
    if wanted == "false":
        if steps or (output / "final").exists():
            raise FileExistsError(
                f"trainer.output_dir={training.output_dir!r} holds a run already. Choose another one, or "
                "continue it with --trainer.resume_from_checkpoint=true."
            )
        return None
    folder = last if wanted == "true" else Path(training.resume_from_checkpoint)
    if not (folder / TRAINER_STATE_NAME).is_file():
        raise FileNotFoundError(f"resume_from_checkpoint={wanted}: {folder} is no complete checkpoint.")
    if training.process_index == 0:
        print(f"Resuming from {folder}")
    return folder


def _pipeline(options: SFTOptions) -> TrainPipelineConfig:
    """The run as lerobot-train describes it: makes the data set, and is saved as train_config.json."""
    training = options.trainer
    return TrainPipelineConfig(
        dataset=options.dataset,
        policy=options.policy,
        output_dir=Path(training.output_dir),
        seed=training.seed,
        batch_size=training.per_device_train_batch_size * training.gradient_accumulation_steps,
        num_workers=max(1, training.dataloader_num_workers),  # a streaming data set needs one shard
        save_freq=int(training.save_steps),
        log_freq=int(training.logging_steps),
        optimizer=options.policy.get_optimizer_preset(),
        peft=options.peft,
        rename_map=options.rename_map,
    )


def _choose_episodes(options: SFTOptions) -> None:
    """Checks that the data set can be read, and sets `dataset.episodes` to those of `train_suite`."""
    data, suite = options.dataset, options.train_suite
    meta = read_metadata(data.repo_id, data.root, revision=data.revision, repo_type=data.repo_type)
    if suite is not None:
        of_suite = episodes_of_suites(suite, meta.episodes["tasks"])
        data.episodes = [i for i in of_suite if data.episodes is None or i in data.episodes]
        if not data.episodes:
            raise ValueError(f"dataset.episodes holds no episode of train_suite={suite!r}.")
    if data.streaming and data.episodes is not None:
        raise ValueError(
            f"dataset.episodes={data.episodes} has no effect with dataset.streaming=true: LeRobot streams "
            "all episodes. Leave train_suite and dataset.episodes out, or streaming."
        )


def _with_adapter(policy: nn.Module, pipeline: TrainPipelineConfig) -> tuple[VLA0Policy, nn.Module | None]:
    """The policy, and the PEFT model around it if an adapter is trained."""
    if pipeline.policy.use_peft:  # --policy.path is an adapter, which LeRobot has put on its base
        saved = policy.active_peft_config
        pipeline.peft = PeftConfig(method_type=saved.peft_type.value, r=saved.r, lora_alpha=saved.lora_alpha)
        return policy.get_base_model(), policy
    if pipeline.peft is not None:
        return policy, policy.wrap_with_peft(peft_cli_overrides=asdict(pipeline.peft))
    return policy, None


def _processors(policy: VLA0Policy, dataset: Any, rename_map: dict[str, str]) -> tuple[Any, Any]:
    """Pre- and postprocessor with this data set's statistics, as lerobot-train makes them."""
    config, stats = policy.config, dataset.meta.stats
    of_data = {"norm_map": config.normalization_mapping, "stats": stats}
    changed = {
        "device_processor": {"device": config.device},
        "normalizer_processor": of_data | {"features": used_features(config)},
    }
    if rename_map:
        changed["rename_observations_processor"] = {"rename_map": rename_map}
    if config.use_relative_actions:
        changed["relative_actions_processor"] = {"action_names": config.action_feature_names}
    return make_pre_post_processors(
        config,
        dataset_stats=stats,
        # The rest is for those of a checkpoint (--policy.path).
        pretrained_path=config.pretrained_path and str(config.pretrained_path),
        preprocessor_overrides=changed,
        postprocessor_overrides={"unnormalizer_processor": of_data | {"features": config.output_features}},
    )


def _push(final: Path, trainer: VLA0Trainer) -> None:
    """Uploads the final checkpoint with its model card, as lerobot-train does. LeRobot's own function needs
    the weights in this process, which FSDP splits."""
    policy, run, api = trainer.policy, trainer.pipeline, HfApi()
    card = policy.generate_model_card(run.dataset.repo_id, cfg=run, dataset_meta=trainer.dataset.meta)
    card.save(final / "README.md")
    repo = api.create_repo(policy.config.repo_id, private=policy.config.private, exist_ok=True).repo_id
    message = "Upload policy weights, train config and readme"
    commit = api.upload_folder(repo_id=repo, folder_path=final, commit_message=message)
    logging.info(f"Model pushed to {commit.repo_url.url}")  # LeRobot's wording: its remote jobs wait for it
