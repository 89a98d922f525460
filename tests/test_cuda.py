"""What a CPU cannot show: every tensor must be on the GPU, and compiled passes run as CUDA graphs."""

from dataclasses import replace

import pytest
import torch
from conftest import make_batch, make_config, make_stats, observation, randomise, train_steps

from lerobot_vla0.decoding import decoder
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
    {"use_relative_actions": True, "relative_exclude_joints": []},
]


@pytest.fixture
def no_drafts(monkeypatch):
    """Makes later chunks without drafts: nearly one token per pass."""
    return lambda: monkeypatch.setattr(decoder, "DRAFTS", {"cuda": (0, 512, 0.0)})


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@torch.no_grad()
def test_drafts_and_graphs_change_no_action(tiny_vlm, settings, compiled, no_drafts):
    dim = 7 if "use_relative_actions" in settings else 8
    inputs = make_config(tiny_vlm).input_features
    inputs["observation.state"] = replace(inputs["observation.state"], shape=(dim,))
    runs = []
    for compile_model in (compiled, False):
        policy, preprocess, postprocess = make(
            tiny_vlm, "cuda", input_features=inputs, compile_model=compile_model, **settings
        )
        actions = []
        for seed in range(5):
            batch = observation(make_batch(rows=2, seed=seed))
            batch["observation.state"] = batch["observation.state"][:, :dim]
            actions.append(postprocess(policy.select_action(preprocess(batch))).cpu())
        runs.append(torch.stack(actions))
        no_drafts()
    assert torch.equal(*runs) and runs[0].abs().max() <= (3 if dim == 7 else 1)


@torch.no_grad()
def test_inputs_are_those_of_the_cpu(tiny_vlm):
    """Pictures to one of 256 levels, with equal text; so the first token is as likely."""
    batch = observation(make_batch(rows=2))
    inputs, logits = [], []
    for device in ("cpu", "cuda"):
        policy, preprocess, _ = make(tiny_vlm, device)
        inputs.append(policy.examples.acting_inputs(policy.examples.check(preprocess(batch))))
        assert {value.device.type for value in inputs[-1].values()} == {device}
        logits.append(torch.from_numpy(policy.decoder.session(inputs[-1]).start([[], []])))
    assert torch.equal(inputs[0]["input_ids"], inputs[1]["input_ids"].cpu())
    level = 1 / 255 / 0.26  # after normalisation
    pixels = [of["pixel_values"].float().cpu() for of in inputs]
    assert (pixels[0] - pixels[1]).abs().max() < 1.1 * level
    assert (pixels[0] - pixels[1]).abs().mean() < 0.05 * level
    assert torch.allclose(*logits, rtol=0.1, atol=0.1 * logits[0].abs().max().item())


@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_real_time_chunks(tiny_vlm, compiled, no_drafts):
    policy, preprocess, _ = make(tiny_vlm, "cuda", compile_model=compiled)
    batch = preprocess(observation(make_batch(rows=1)))
    left = policy.predict_action_chunk(batch)[0, 3:]
    chunk = policy.predict_action_chunk(batch, inference_delay=2, prev_chunk_left_over=left)
    plain, *_ = make(tiny_vlm, "cuda")
    no_drafts()
    expected = plain.predict_action_chunk(batch, inference_delay=2, prev_chunk_left_over=left)
    assert torch.equal(chunk, expected) and torch.equal(chunk[0, :2], left[:2])


@torch.no_grad()
def test_graphs_see_new_weights(tiny_vlm):
    """After training and loading, in place or not."""
    policy, preprocess, _ = make(tiny_vlm, "cuda", compile_model=True)
    batch = preprocess(observation(make_batch(rows=1)))
    before = policy.predict_action_chunk(batch)
    randomise(policy.to("cpu"), seed=2)
    after = policy.to("cuda").predict_action_chunk(batch)
    fresh, *_ = make(tiny_vlm, "cuda")
    assert torch.equal(fresh.predict_action_chunk(batch), before)
    fresh.load_state_dict(policy.state_dict())
    assert torch.equal(fresh.predict_action_chunk(batch), after) and not torch.equal(before, after)


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True, "freeze_vision": True}], ids=str)
def test_learns_in_bfloat16(tiny_vlm, settings):
    policy, preprocess, _ = make(tiny_vlm, "cuda", dtype="bfloat16", **settings)
    losses, metrics = train_steps(policy, preprocess(make_batch(rows=4)), steps=30, lr=1e-3)
    assert losses[-1] < 0.7 * losses[0] and 0 <= metrics["token_accuracy"] <= 1
