"""What a CPU cannot show: every tensor must be on the GPU, and compiled passes run as CUDA graphs."""

import pytest
import torch
from conftest import make_batch, make_config, make_stats, observation, randomise

from lerobot_vla0.bench.decode import BenchDecodeConfig, bench_decode
from lerobot_vla0.modeling_vla0 import VLA0Policy
from lerobot_vla0.processor_vla0 import make_vla0_pre_post_processors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make(vlm, device: str, **settings):
    """A policy with random weights, the same on each device, and its processors."""
    config = make_config(vlm, device=device, **settings)
    policy = VLA0Policy(config).eval()
    policy.to("cpu")
    randomise(policy)
    return policy.to(device), *make_vla0_pre_post_processors(config, make_stats())


SETTINGS = [
    {},
    {"use_state": True},
    {"ensemble_size": 3, "n_action_steps": 2},
    {"n_action_steps": 2, "stream": True},
    {"use_relative_actions": True, "relative_exclude_joints": []},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@torch.no_grad()
def test_acts_as_on_the_cpu(tiny_vlm, settings):
    if "use_relative_actions" in settings:
        state = make_config(tiny_vlm).output_features["action"].shape
        inputs = make_config(tiny_vlm).input_features
        inputs["observation.state"] = type(inputs["observation.state"])(
            inputs["observation.state"].type, state
        )
        settings = {**settings, "input_features": inputs}
    actions = []
    for device in ("cpu", "cuda"):
        policy, preprocess, postprocess = make(tiny_vlm, device, **settings)
        taken = []
        for seed in range(5):
            seen = observation(make_batch(rows=2, seed=seed))
            if "use_relative_actions" in settings:
                seen["observation.state"] = seen["observation.state"][:, :7]
            taken.append(postprocess(policy.select_action(preprocess(seen))).cpu())
        actions.append(torch.stack(taken))
    assert torch.equal(*actions)


@torch.no_grad()
def test_real_time_chunks_as_on_the_cpu(tiny_vlm):
    chunks = []
    for device in ("cpu", "cuda"):
        policy, preprocess, _ = make(tiny_vlm, device)
        batch = preprocess(observation(make_batch(rows=1)))
        first = policy.predict_action_chunk(batch)
        left = first[0, 3:]
        chunks.append(policy.predict_action_chunk(batch, inference_delay=2, prev_chunk_left_over=left).cpu())
        assert torch.equal(chunks[-1][0, :2], left[:2].cpu())
    assert torch.equal(*chunks)


@torch.no_grad()
def test_compiled_passes_give_the_same(tiny_vlm):
    batches = [make_batch(rows=2, seed=seed) for seed in range(3)]
    chunks = []
    for compiled in (False, True):
        policy, preprocess, _ = make(tiny_vlm, "cuda", compile_model=compiled)
        chunks.append([policy.predict_action_chunk(preprocess(observation(batch))) for batch in batches])
    assert all(torch.equal(*pair) for pair in zip(*chunks, strict=True))


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True, "freeze_vision": True}], ids=str)
def test_learns_in_bfloat16(tiny_vlm, settings):
    policy, preprocess, _ = make(tiny_vlm, "cuda", dtype="bfloat16", **settings)
    policy.train()
    batch = preprocess(make_batch(rows=4))
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=1e-3)
    losses = []
    for _ in range(30):
        loss, metrics = policy.forward(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0] and 0 <= metrics["token_accuracy"] <= 1


def test_bench_decode(tmp_path):
    config = BenchDecodeConfig(
        model="small-random", workloads=["recorded_masked"], dtype="float32", repeats=1, out=tmp_path
    )
    rows = bench_decode(config)["results"]
    assert {row["mode"]: row["identical"] for row in rows} == {row["mode"]: 2 for row in rows}
