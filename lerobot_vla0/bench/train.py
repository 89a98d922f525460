"""`lerobot-vla0 bench train`: a training step here, against one that prepares sample by sample.

The other step is TinyVLA's: PIL images augmented one by one with torchvision, chat template and VLM processor
called for each sample, and the model's own loss over all positions and the whole vocabulary, as TRL's
SFTTrainer used to compute it (its present fused head is measured, too). All steps have the same random
weights, the same batch and AdamW on all parameters, and prepare batches in the training process, as
`--num_workers=0` does. Each measurement runs in a process of its own, since peak memory is a process's; modes
take turns.
"""

import random
import resource
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.transforms import v2

from ..examples import augmentation_generator
from ..files import check_place
from ..modeling_vla0 import VLA0Policy
from ..prompt import IGNORE, MASK_CHARACTER
from ..workers import worker_pool
from . import common

MODES = {
    "per_sample": "sample by sample, loss over all positions (as TinyVLA)",
    "per_sample_trl": "sample by sample, TRL's fused head",
    "ours_whole": "batched on tensors, loss at labelled positions, the system prompt in every row",
    "ours": "the same, the system prompt once per batch (what the policy does)",
}
INSTRUCTIONS = (
    "pick up the salad dressing and place it in the basket",
    "put the black bowl on the plate next to the ramekin",
    "open the middle drawer of the cabinet",
    "turn on the stove and put the moka pot on it",
)


@dataclass
class BenchTrainConfig:
    """What to measure."""

    # A VLM with random weights: small-random (30 million parameters and the vocabulary's 78),
    # qwen2.5-0.5b-random, qwen2.5-vl-3b-random.
    model: str = "small-random"
    # Of: per_sample, per_sample_trl (needs trl), ours_whole, ours.
    modes: list[str] = field(default_factory=lambda: list(MODES))
    batch_size: int = 8
    # Steps that are timed in each process, after one that is not.
    steps: int = 3
    # Processes for each mode, in turns.
    repeats: int = 2
    # None: float32 on the CPU, bfloat16 on a GPU.
    dtype: str | None = None
    # None: cuda where there is one.
    device: str | None = None
    # Folder for train.json.
    out: Path = Path("outputs/bench")
    seed: int = 0


def bench_train(config: BenchTrainConfig) -> dict[str, Any]:
    """Measures, prints a table, writes `train.json` and returns the results.

    Raises:
        ValueError: a name or number that is not allowed.
    """
    common.check_counts(config, "batch_size", "steps", "repeats")
    common.check_names("modes", config.modes, MODES)
    common.check_machine(config)
    if config.model not in common.SHAPES:
        raise ValueError(f"model={config.model!r} is none of {', '.join(common.SHAPES)}.")
    modes, out = list(config.modes), check_place(config.out, "folder")
    if "per_sample_trl" in modes and find_spec("trl") is None:
        modes.remove("per_sample_trl")
        print('per_sample_trl is left out: it needs trl (pip install "lerobot_policy_vla0[sft]").')
    steps = []
    for mode in modes * config.repeats:
        with worker_pool(1) as process:
            steps += process.submit(measure, config, common.SHAPES[config.model], mode).result()
    machine = steps[0]["machine"]
    rows = _summarize(pd.DataFrame(steps), config.batch_size)
    print(f"{config.model}: {machine}, batch {config.batch_size}, {rows['steps'][0]} steps each")
    _print_rows(rows)
    result = common.write_results(out / "train.json", config, machine, rows)
    print(f"Wrote {Path(config.out) / 'train.json'}")
    return result


def measure(config: BenchTrainConfig, shape: common.Shape, mode: str) -> list[dict[str, Any]]:
    """Trains for a few steps in this process.

    Returns:
        for each timed step `step_s` and `prepare_s`, the part of it for images, text and labels; and, equal
        for all, `mode`, `machine`, `loss` (of the batch without augmentation, before the first step), and
        `before_gib` and `peak_gib`, the most memory that the process (on a GPU, its tensors) had before the
        first step and at the end.
    """
    device = common.choose_device(config.device)
    dtype = config.dtype or ("float32" if device == "cpu" else "bfloat16")
    policy = common.random_policy(shape, config.seed, device=device, dtype=dtype)
    fused = {}
    if mode == "per_sample_trl":
        from trl.trainer.utils import add_fused_lm_head

        # As SFTTrainer adds it.
        add_fused_lm_head(policy.model, outputs=("log_probs", "entropy", "is_top1"))
        fused = {"fused_lm_head": True}
    batch, ours = make_batch(policy, config), mode.startswith("ours")
    if mode == "ours_whole":
        policy.examples.chat.num_shared = 0

    def prepare() -> tuple[Any, ...]:
        if ours:
            moved = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
            generator = augmentation_generator() if policy.training else None
            return policy.examples.training_examples(batch | moved, generator)
        inputs, labels = per_sample_inputs(policy, batch, augment=policy.training)
        return {key: value.to(device) for key, value in inputs.items()}, labels.to(device)

    def loss_of(inputs: dict[str, Tensor], labels: Tensor, *places: Tensor) -> Tensor:
        if ours:
            return policy.example_loss(inputs, labels, *places)[0]
        return policy.model(**inputs, labels=labels, use_cache=False, **fused).loss

    of_process = {"mode": mode, "machine": common.describe(policy), "before_gib": _memory_gib(device)}
    with torch.no_grad():
        of_process["loss"] = loss_of(*prepare()).item()
    policy.train()
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=1e-5)
    random.seed(config.seed)
    torch.manual_seed(config.seed)
    steps = []
    for _ in range(config.steps + 1):
        common.synchronize(policy)
        start = time.perf_counter()
        examples = prepare()
        common.synchronize(policy)
        prepared = time.perf_counter()
        loss_of(*examples).backward()
        optimizer.step()
        optimizer.zero_grad()
        common.synchronize(policy)
        steps.append({"step_s": time.perf_counter() - start, "prepare_s": prepared - start})
    of_process["peak_gib"] = _memory_gib(device)
    return [of_process | step for step in steps[1:]]  # the first one allocates


def make_batch(policy: VLA0Policy, config: BenchTrainConfig) -> dict[str, Any]:
    """A batch for the policy: images float (B, 3, 256, 256) in [0, 1], tasks, action bins (B, H, D)."""
    generator = torch.Generator().manual_seed(config.seed)
    rows, keys = config.batch_size, policy.config.camera_keys
    # Smooth pictures: colour jitter's conversion to HSV takes another time for noise than for photographs.
    coarse = torch.rand(len(keys), rows, 3, 16, 16, generator=generator)
    smooth = [torch.nn.functional.interpolate(camera, (256, 256), mode="bilinear") for camera in coarse]
    shape = (rows, policy.config.chunk_size, policy.examples.action_dim)
    return {key: (images * 255).round() / 255 for key, images in zip(keys, smooth, strict=True)} | {
        "task": [INSTRUCTIONS[i % len(INSTRUCTIONS)] for i in range(rows)],
        "action": torch.randint(policy.config.num_bins + 1, shape, generator=generator),
    }


def per_sample_inputs(
    policy: VLA0Policy, batch: dict[str, Any], augment: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs and labels (B, T) of `ExampleMaker.training_examples`, prepared sample by sample from PIL
    images on the CPU. `augment`: random crop, colour jitter and masked action text."""
    config, processor, chat = policy.config, policy.vlm_processor, policy.examples.chat
    tokenizer = processor.tokenizer
    tail = tokenizer.decode(chat.tail_ids)
    samples, all_labels = [], []
    for row, task in enumerate(batch["task"]):
        views = []
        for key in config.camera_keys:
            view = v2.functional.to_pil_image(batch[key][row])
            side = int(view.height * config.crop_ratio)
            view = (v2.RandomCrop(side) if augment else v2.CenterCrop(side))(view)
            view = v2.Resize([config.image_size] * 2)(view)
            views.append(v2.ColorJitter(*config.jitter)(view) if augment else view)
        picture = Image.fromarray(np.concatenate([np.asarray(view) for view in views], axis=1))
        answer = " ".join(map(str, batch["action"][row].flatten().tolist()))
        messages = [
            *chat.messages(task),
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        text = processor.apply_chat_template(messages, tokenize=False, add_vision_id=config.add_vision_id)
        sample = processor(
            text=[text], images=[picture], images_kwargs={"do_resize": False}, return_tensors="pt"
        )
        ids = sample["input_ids"][0]
        labels = torch.full_like(ids, IGNORE)
        supervised = len(tokenizer.encode(answer + tail, add_special_tokens=False))
        labels[-supervised:] = ids[-supervised:]
        if augment and random.random() >= config.action_mask_skip_prob:
            hidden = random.sample(
                range(supervised - len(chat.tail_ids)),
                int(random.uniform(0, config.action_mask_prob) * len(answer)),
            )
            places = torch.tensor(hidden, dtype=torch.long) + len(ids) - supervised
            ids[places] = tokenizer.convert_tokens_to_ids(MASK_CHARACTER)
            labels[places] = IGNORE
        samples.append(sample)
        all_labels.append(labels)
    rows = [sample["input_ids"][0] for sample in samples]
    ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    inputs = {
        "input_ids": ids,
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "mm_token_type_ids": (ids == processor.image_token_id).int(),
        "pixel_values": torch.cat([sample["pixel_values"] for sample in samples]),
        "image_grid_thw": torch.cat([sample["image_grid_thw"] for sample in samples]),
    }
    return inputs, pad_sequence(all_labels, batch_first=True, padding_value=IGNORE)


def _memory_gib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def _summarize(steps: pd.DataFrame, batch_size: int) -> pd.DataFrame:
    """One row per mode; the first mode is what the others are compared with."""
    modes = steps.groupby("mode", sort=False)
    rows = modes.agg(steps=("step_s", "size"), loss=("loss", "first"))
    rows["samples_per_s"] = batch_size / modes["step_s"].median()
    rows["samples_per_s_min"] = batch_size / modes["step_s"].max()
    rows["samples_per_s_max"] = batch_size / modes["step_s"].min()
    rows["prepare_ms"] = 1000 * modes["prepare_s"].median() / batch_size
    rows[["peak_gib", "before_gib"]] = modes[["peak_gib", "before_gib"]].max()
    rows["speedup"] = rows["samples_per_s"] / rows["samples_per_s"].iloc[0]
    rows["memory"] = rows["peak_gib"] / rows["peak_gib"].iloc[0]
    rows["prepare_speedup"] = rows["prepare_ms"].iloc[0] / rows["prepare_ms"]
    return rows.reset_index()


def _print_rows(rows: pd.DataFrame) -> None:
    common.print_table(
        pd.DataFrame(
            {
                "mode": row.mode,
                "samples/s (min–max)": f"{row.samples_per_s:.2f} "
                f"({row.samples_per_s_min:.2f}–{row.samples_per_s_max:.2f})",
                "speed": f"{row.speedup:.2f}×",
                "prepare, ms a sample": f"{row.prepare_ms:.1f} ({row.prepare_speedup:.1f}× faster)",
                "peak memory, GiB": f"{row.peak_gib:.2f} ({row.memory:.2f}×)",
                "loss": f"{row.loss:.6f}",
            }
            for row in rows.itertuples()
        )
    )
    for row in rows.itertuples():
        print(f"  {row.mode}: {MODES[row.mode]}; {row.before_gib:.2f} GiB before the first step")
