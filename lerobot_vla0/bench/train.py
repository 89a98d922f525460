"""`lerobot-vla0 bench train`: a training step here, against one that prepares sample by sample.

The other step is TinyVLA's: PIL images augmented one by one with torchvision, chat template and the VLM's
processor called for each sample, and the model's own loss over all positions and the whole vocabulary, which
TRL's SFTTrainer computed. (Today's TRL has a fused head of its own; it is measured, too.) Same random
weights, same batch, AdamW on all parameters, everything in one process as `--num_workers=0` does it. Each
measurement has a process of its own, in turns: peak memory belongs to a process.
"""

import json
import multiprocessing
import random
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from ..modeling_vla0 import VLA0Policy
from ..prompt import IGNORE, MASK_CHARACTER
from .models import SHAPES, check_names, describe, random_policy, synchronize

VOCABULARY = 151936
# What two CPU cores can time at batch 8. A smaller body makes the vocabulary a larger part of the step.
SHAPES["small-random"] = (
    {
        "vocab_size": VOCABULARY, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 2,
    },
    {
        "depth": 4, "hidden_size": 320, "intermediate_size": 1280, "num_heads": 4,
        "fullatt_block_indexes": [3],
    },
)  # fmt: skip
MODES = {
    "per_sample": "sample by sample, loss over all positions (as TinyVLA)",
    "per_sample_trl": "sample by sample, TRL's fused head",
    "ours": "batched on tensors, loss at labelled positions (what the policy does)",
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
    # Of: per_sample, per_sample_trl (needs trl), ours.
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


@dataclass
class Measurement:
    """Of one process."""

    machine: str
    step_s: list[float]
    prepare_s: list[float]  # images, text and labels of a batch; part of step_s
    peak_gib: float  # of the process, or on the GPU, of its tensors
    before_gib: float  # the same before the first step: model and libraries
    loss: float  # of the batch without augmentation, before the first step


def bench_train(config: BenchTrainConfig) -> dict[str, Any]:
    """Measures, prints a table, writes `train.json` and returns the results.

    Raises:
        ValueError: a name or number that is not allowed.
    """
    for name in ("batch_size", "steps", "repeats"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1.")
    check_names("modes", config.modes, MODES)
    if config.model not in SHAPES:
        raise ValueError(f"model={config.model!r} is none of {', '.join(SHAPES)}.")
    modes = list(config.modes)
    if "per_sample_trl" in modes and find_spec("trl") is None:
        modes.remove("per_sample_trl")
        print('per_sample_trl is left out: it needs trl (pip install "lerobot_policy_vla0[sft]").')
    measured: dict[str, list[Measurement]] = {mode: [] for mode in modes}
    for _ in range(config.repeats):
        for mode in modes:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                measured[mode].append(process.submit(measure, config, SHAPES[config.model], mode).result())
    rows = [_row(mode, config.batch_size, measurements) for mode, measurements in measured.items()]
    for row in rows:
        row["speedup"] = row["samples_per_s"] / rows[0]["samples_per_s"]
        row["memory"] = row["peak_gib"] / rows[0]["peak_gib"]
        row["prepare_speedup"] = rows[0]["prepare_ms"] / row["prepare_ms"]
    packages = ("lerobot_policy_vla0", "torch", "torchvision", "transformers")
    result = {
        "model": config.model,
        "machine": measured[modes[0]][0].machine,
        "versions": {name: version(name) for name in packages},
        "settings": json.loads(json.dumps(asdict(config), default=str)),
        "results": rows,
    }
    print(f"{config.model}: {result['machine']}, batch {config.batch_size}, {rows[0]['steps']} steps each")
    _print_table(rows)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "train.json").write_text(json.dumps(result, indent=2))
    print(f"Wrote {out / 'train.json'}")
    return result


# ------------------------------------------------------------------------------------------- what is measured


def measure(config: BenchTrainConfig, shape: tuple[dict, dict], mode: str) -> Measurement:
    """Trains for a few steps in this process."""
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    config.dtype = config.dtype or ("float32" if device == "cpu" else "bfloat16")
    SHAPES[config.model] = shape  # a process of its own has only this module's
    policy = random_policy(config, device)
    if mode == "per_sample_trl":
        from trl.trainer.utils import add_fused_lm_head

        # As SFTTrainer adds it.
        add_fused_lm_head(policy.model, outputs=("log_probs", "entropy", "is_top1"))
    images, tasks, bins = _samples(policy, config)
    loss_of: Callable[[Any], Tensor]
    if mode == "ours":

        def prepare() -> Any:
            cameras = {key: image.to(device) for key, image in images.items()}
            return policy.training_inputs({**cameras, "task": tasks, "action": bins.to(device)})

        def loss_of(example: Any) -> Tensor:
            return policy.example_loss(*example)[0]

    else:

        def prepare() -> Any:
            inputs, labels = per_sample_inputs(policy, images, tasks, bins, augment=policy.training)
            return {k: v.to(device) for k, v in inputs.items()}, labels.to(device)

        def loss_of(example: Any) -> Tensor:
            inputs, labels = example
            fused = {"fused_lm_head": True} if mode == "per_sample_trl" else {}
            return policy.model(**inputs, labels=labels, use_cache=False, **fused).loss

    before = _memory_gib(device)
    with torch.no_grad():
        loss = loss_of(prepare()).item()
    policy.train()
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=1e-5)
    random.seed(config.seed)
    torch.manual_seed(config.seed)
    result = Measurement(describe(policy), [], [], 0.0, before, loss)
    for step in range(config.steps + 1):
        synchronize(policy)
        start = time.perf_counter()
        example = prepare()
        synchronize(policy)
        prepared = time.perf_counter()
        loss_of(example).backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(policy)
        if step:  # the first one allocates
            result.step_s.append(time.perf_counter() - start)
            result.prepare_s.append(prepared - start)
    result.peak_gib = _memory_gib(device)
    return result


def _samples(policy: VLA0Policy, config: BenchTrainConfig) -> tuple[dict[str, Tensor], list[str], Tensor]:
    """A batch as LeRobotDataset's items make it: float images (B, 3, 256, 256) in [0, 1] per camera, tasks,
    bins (B, H, D)."""
    generator = torch.Generator().manual_seed(config.seed)
    rows, horizon = config.batch_size, policy.config.chunk_size
    # Smooth pictures: noise would make the conversion to HSV cheaper or dearer than photographs.
    coarse = torch.rand(len(policy.config.camera_keys), rows, 3, 16, 16, generator=generator)
    smooth = [torch.nn.functional.interpolate(c, (256, 256), mode="bilinear") for c in coarse]
    images = {
        key: (image * 255).round() / 255 for key, image in zip(policy.config.camera_keys, smooth, strict=True)
    }
    tasks = [INSTRUCTIONS[i % len(INSTRUCTIONS)] for i in range(rows)]
    shape = (rows, horizon, policy.action_dim)
    return images, tasks, torch.randint(policy.config.num_bins + 1, shape, generator=generator)


def per_sample_inputs(
    policy: VLA0Policy, images: dict[str, Tensor], tasks: list[str], bins: Tensor, augment: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """The same example as `policy.training_inputs`, prepared sample by sample from PIL images.

    Args:
        images: float (B, 3, H, W) in [0, 1] per camera.
        augment: random crop, colour jitter and masked action text.

    Returns:
        (model inputs, labels (B, T)), on the CPU.
    """
    config, processor = policy.config, policy.vlm_processor
    system = policy.chat.system_prompt
    tail = processor.tokenizer.decode(policy.chat.tail_ids)
    pad = processor.tokenizer.pad_token_id
    examples = []
    for row, task in enumerate(tasks):
        views = []
        for key in config.camera_keys:
            view = v2.functional.to_pil_image(images[key][row])
            side = int(view.height * config.crop_ratio)
            view = (v2.RandomCrop(side) if augment else v2.CenterCrop(side))(view)
            view = v2.Resize([config.image_size] * 2)(view)
            views.append(v2.ColorJitter(*config.jitter)(view) if augment else view)
        picture = Image.fromarray(np.concatenate([np.asarray(view) for view in views], axis=1))
        answer = " ".join(map(str, bins[row].flatten().tolist()))
        messages = [
            {"role": "system", "content": [{"type": "text", "text": system}]},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": task}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        text = processor.apply_chat_template(messages, tokenize=False, add_vision_id=config.add_vision_id)
        example = processor(
            text=[text], images=[picture], images_kwargs={"do_resize": False}, return_tensors="pt"
        )
        ids = example["input_ids"][0]
        labels = torch.full_like(ids, IGNORE)
        supervised = len(processor.tokenizer.encode(answer + tail, add_special_tokens=False))
        labels[-supervised:] = ids[-supervised:]
        if augment and random.random() >= config.action_mask_skip_prob:
            hidden = random.sample(
                range(supervised - len(policy.chat.tail_ids)),
                int(random.uniform(0, config.action_mask_prob) * len(answer)),
            )
            places = torch.tensor(hidden, dtype=torch.long) + len(ids) - supervised
            ids[places] = processor.tokenizer.convert_tokens_to_ids(MASK_CHARACTER)
            labels[places] = IGNORE
        examples.append((ids, labels, example))
    ids = torch.nn.utils.rnn.pad_sequence([e[0] for e in examples], batch_first=True, padding_value=pad)
    labels = torch.nn.utils.rnn.pad_sequence([e[1] for e in examples], batch_first=True, padding_value=IGNORE)
    inputs = {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < torch.tensor([[len(e[0])] for e in examples])).long(),
        "mm_token_type_ids": (ids == processor.image_token_id).int(),
        "pixel_values": torch.cat([e[2]["pixel_values"] for e in examples]),
        "image_grid_thw": torch.cat([e[2]["image_grid_thw"] for e in examples]),
    }
    return inputs, labels


def _memory_gib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


# ----------------------------------------------------------------------------------------------------- report


def _row(mode: str, batch_size: int, measurements: list[Measurement]) -> dict[str, Any]:
    steps = [seconds for m in measurements for seconds in m.step_s]
    return {
        "mode": mode,
        "steps": len(steps),
        "samples_per_s": batch_size / median(steps),
        "samples_per_s_min": batch_size / max(steps),
        "samples_per_s_max": batch_size / min(steps),
        "prepare_ms": 1000 * median(s for m in measurements for s in m.prepare_s) / batch_size,
        "peak_gib": max(m.peak_gib for m in measurements),
        "before_gib": max(m.before_gib for m in measurements),
        "loss": measurements[0].loss,
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    print(f"  {'mode':16}{'samples/s (min–max)':>24}{'speed':>8}{'prepare, ms a sample':>23}", end="")
    print(f"{'peak memory, GiB':>24}{'loss':>11}")
    for row in rows:
        rate = f"{row['samples_per_s']:.2f} ({row['samples_per_s_min']:.2f}–{row['samples_per_s_max']:.2f})"
        prepare = f"{row['prepare_ms']:.1f} ({row['prepare_speedup']:.1f}× faster)"
        memory = f"{row['peak_gib']:.2f} ({row['memory']:.2f}×)"
        print(f"  {row['mode']:16}{rate:>24}{row['speedup']:>7.2f}×{prepare:>23}{memory:>24}", end="")
        print(f"{row['loss']:>11.6f}")
    for row in rows:
        print(f"  {row['mode']}: {MODES[row['mode']]}; {row['before_gib']:.2f} GiB before the first step")
