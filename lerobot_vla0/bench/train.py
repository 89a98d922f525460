"""`lerobot-vla0 bench train`: a training step here, against one that prepares sample by sample.

The other step is TinyVLA's: PIL images augmented one by one with torchvision, chat template and VLM processor
called for each sample, and the model's own loss over all positions and the whole vocabulary. Both steps have
the same random weights, the same batch and AdamW on all parameters, and prepare batches in the training
process. Each measurement runs in a process of its own, since peak memory is a process's; modes take turns.
"""

import random
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.transforms import v2

from ..chat import IGNORE, MASK_CHARACTER
from ..examples import augmentation_generator
from ..files import check_place
from ..libero.pool import worker_pool
from ..modeling_vla0 import VLA0Policy
from .random_vlm import (
    SHAPES,
    Shape,
    check_names,
    choose_device,
    describe,
    random_policy,
    synchronize,
    write_results,
)

MODES = ("per_sample", "ours")
INSTRUCTIONS = ("pick up the salad dressing and place it in the basket", "turn on the stove")


@dataclass
class BenchTrainConfig:
    """What to measure."""

    # A VLM with random weights: small-random (30 million parameters and the vocabulary's 78),
    # qwen2.5-0.5b-random, qwen2.5-vl-3b-random.
    model: str = "small-random"
    # Of: per_sample (as TinyVLA), ours.
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
        ValueError: a name that is not known.
    """
    check_names("modes", config.modes, MODES)
    check_names("model", [config.model], SHAPES)
    out, runs = check_place(config.out, "folder"), []
    for mode in config.modes * config.repeats:
        with worker_pool(1) as process:
            runs.append(process.submit(measure, config, SHAPES[config.model], mode).result())
    rows = []
    for mode in config.modes:
        of_mode = [run for run in runs if run["mode"] == mode]
        speeds = [config.batch_size / seconds for run in of_mode for seconds in run["step_s"]]
        prepare = median(seconds for run in of_mode for seconds in run["prepare_s"])
        rows.append({"mode": mode, "loss": of_mode[0]["loss"], "samples_per_s": median(speeds)})
        rows[-1] |= {"samples_per_s_min": min(speeds), "samples_per_s_max": max(speeds)}
        rows[-1] |= {"prepare_ms": 1000 * prepare / config.batch_size}
        rows[-1] |= {"peak_gib": max(run["peak_gib"] for run in of_mode)}
    return write_results(out / "train.json", config, runs[0]["machine"], rows)


def measure(config: BenchTrainConfig, shape: Shape, mode: str) -> dict[str, Any]:
    """Trains for a few steps in this process.

    Returns:
        `step_s` of each timed step, `prepare_s`, the part of it for images, text and labels, `loss` of the
        batch without augmentation before the first step, and `peak_gib`, the most memory of the process (on a
        GPU, of its tensors).
    """
    device = choose_device(config.device)
    dtype = config.dtype or ("float32" if device == "cpu" else "bfloat16")
    policy = random_policy(shape, config.seed, device=device, dtype=dtype)
    batch = make_batch(policy, config)

    def prepare() -> tuple[Any, ...]:
        if mode == "ours":
            moved = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
            generator = augmentation_generator() if policy.training else None
            return policy.examples.training_examples(batch | moved, generator)
        inputs, labels = per_sample_inputs(policy, batch, augment=policy.training)
        return {key: value.to(device) for key, value in inputs.items()}, labels.to(device)

    def loss_of(inputs: dict[str, Tensor], labels: Tensor, *places: Tensor) -> Tensor:
        if mode == "ours":
            return policy.example_loss(inputs, labels, *places)[0]
        return policy.model(**inputs, labels=labels, use_cache=False).loss

    result = {"mode": mode, "machine": describe(policy), "step_s": [], "prepare_s": []}
    with torch.no_grad():
        result["loss"] = loss_of(*prepare()).item()
    policy.train()
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=1e-5)
    random.seed(config.seed)
    torch.manual_seed(config.seed)
    for step in range(config.steps + 1):
        synchronize(policy)
        start = time.perf_counter()
        examples = prepare()
        synchronize(policy)
        prepared = time.perf_counter()
        loss_of(*examples).backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(policy)
        if step > 0:  # the first step allocates
            result["step_s"].append(time.perf_counter() - start)
            result["prepare_s"].append(prepared - start)
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on Linux
    result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else kib / 2**20
    return result


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
    tokenizer, tail = processor.tokenizer, processor.tokenizer.decode(chat.tail_ids)
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
        reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        messages = [*chat.messages(task), reply]
        text = processor.apply_chat_template(messages, tokenize=False, add_vision_id=config.add_vision_id)
        plain = {"images_kwargs": {"do_resize": False}, "return_tensors": "pt"}
        samples.append(processor(text=[text], images=[picture], **plain))
        ids = samples[-1]["input_ids"][0]
        labels = torch.full_like(ids, IGNORE)
        supervised = len(tokenizer.encode(answer + tail, add_special_tokens=False))
        labels[-supervised:] = ids[-supervised:]
        if augment and random.random() >= config.action_mask_skip_prob:
            count = int(random.uniform(0, config.action_mask_prob) * len(answer))
            masked = random.sample(range(supervised - len(chat.tail_ids)), count)
            positions = torch.tensor(masked, dtype=torch.long) + len(ids) - supervised
            ids[positions] = tokenizer.convert_tokens_to_ids(MASK_CHARACTER)
            labels[positions] = IGNORE
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
