"""TRL's trainer on a policy: the policy makes the examples, and checkpoints are LeRobot's."""

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from huggingface_hub import save_torch_state_dict
from lerobot.configs.train import TrainPipelineConfig
from lerobot.utils.collate import lerobot_collate_fn
from safetensors.torch import load_file, load_model
from transformers import SchedulerType
from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig, SFTTrainer

from .. import vlm
from ..checkpoint import ADAPTER_WEIGHTS, VLM_FOLDER, WEIGHTS, import_peft
from ..configuration_vla0 import VLA0Config
from ..modeling_vla0 import VLA0Policy
from ..processor_vla0 import ACTION_CLIPPED

# Settings of the trainer, and the policy's fields that are their defaults and record them.
POLICY_FIELDS = {
    "learning_rate": "optimizer_lr",
    "weight_decay": "optimizer_weight_decay",
    "max_grad_norm": "optimizer_grad_clip_norm",
    "gradient_checkpointing": "gradient_checkpointing",
}


@dataclass
class TrainerOptions(SFTConfig):
    """TRL's SFTConfig (https://huggingface.co/docs/trl/sft_trainer); here are the settings with another
    default."""

    output_dir: str = "outputs/sft"
    # None: as the policy's config says.
    learning_rate: float | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    gradient_checkpointing: bool | None = None
    lr_scheduler_type: SchedulerType | str = "constant_with_warmup"  # constant without warmup_steps
    save_steps: float = 5000
    report_to: list[str] | str | None = "none"  # lists first: TRL's order of types would read them as text
    dataloader_num_workers: int = 4
    # The rows of the data set are indices; the trainer makes the examples.
    remove_unused_columns: bool = False
    dataset_kwargs: dict[str, Any] | None = field(default_factory=lambda: {"skip_prepare_dataset": True})
    max_length: int | None = None
    use_liger_kernel: bool = False  # its kernels do not know this policy's loss

    def __post_init__(self) -> None:
        """Waits for `complete`: the defaults depend on the policy."""

    def complete(self, policy: VLA0Config) -> None:
        """Takes what is None from the policy's config, and writes there how it is trained."""
        for name, field_name in POLICY_FIELDS.items():
            if getattr(self, name) is None:
                setattr(self, name, getattr(policy, field_name))
            setattr(policy, field_name, getattr(self, name))
        if self.bf16 is None:
            on_gpu = is_torch_bf16_gpu_available() and not self.use_cpu
            self.bf16 = on_gpu and not self.fp16 and policy.dtype == "bfloat16"
        super().__post_init__()
        policy.device = self.device.type


class VLA0Trainer(SFTTrainer):
    """Trains a policy's VLM, or its adapter, on LeRobot's data set. `pipeline` is the run as lerobot-train
    describes it, `processors` are the policy's two, `adapter` is the PEFT model around it or None."""

    def __init__(
        self,
        training: TrainerOptions,
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
            collate = lerobot_collate_fn
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
        policy.config.save_pretrained(folder)
        vlm.save_vlm(policy.model, policy.vlm_processor, folder / VLM_FOLDER)
        # `state_dict` has the VLM's names, the file those of the policy, or of the PEFT model around it.
        prefix = "model." if self.adapter is None else "base_model.model.model."
        weights = state_dict and {prefix + name: tensor for name, tensor in state_dict.items()}
        if self.adapter is None:
            save_torch_state_dict(weights or policy.state_dict(), folder, max_shard_size=sys.maxsize)
        else:
            self.adapter.save_pretrained(folder, state_dict=weights)
        # More than `max_steps` if that was lowered after a checkpoint of a later step.
        self.pipeline.steps = max(self.state.max_steps, self.state.global_step)
        self.pipeline.save_pretrained(folder)
        for processor in self.processors:
            processor.save_pretrained(folder)

    def _run_epoch(self, **arguments: Any) -> None:
        """Nothing for a run that is finished: resumed, Transformers would train it a further step."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**arguments)
        else:
            self.control.should_training_stop = True

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
    return lerobot_collate_fn([dataset[row["index"]] for row in rows])
