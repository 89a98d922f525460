import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import learn, make_batch, make_config, make_stats, observation, randomise

from lerobot_vla0.chat import IGNORE
from lerobot_vla0.examples import augmentation_generator
from lerobot_vla0.modeling_vla0 import VLA0Policy
from lerobot_vla0.processor_vla0 import make_vla0_pre_post_processors


def examples_of(policy, batch: dict):
    """As `forward` makes them."""
    generator = augmentation_generator() if policy.training else None
    return policy.examples.training_examples(batch, generator)


def save_all(policy, processors, folder: Path) -> Path:
    policy.save_pretrained(folder)
    for processor in processors:
        processor.save_pretrained(folder)
    return folder


def test_loss_is_transformers_loss(policy, processors):
    """Cross-entropy at supervised positions only equals Transformers' own loss on the same example and
    labels."""
    batch = processors[0](make_batch())
    inputs, labels, _ = examples_of(policy, batch)
    loss, metrics = policy(batch)
    theirs = policy.model(**inputs, labels=labels).loss
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    parameters = list(policy.model.model.language_model.parameters())
    for ours, other in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(theirs, parameters), strict=True
    ):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-6)
    assert set(metrics) == {"token_accuracy", "action_error_bins", "action_clipped"}


def test_reduction_none(policy, processors):
    batch = processors[0](make_batch())
    rows, _ = policy(batch, reduction="none")
    alone = [
        policy({**observation(batch, slice(i, i + 1)), "action": batch["action"][i : i + 1]})[0]
        for i in range(4)
    ]
    assert rows.shape == (4,) and torch.allclose(rows, torch.stack(alone), rtol=1e-5)


def test_augments_in_training_only(policy, processors):
    batch = processors[0](make_batch())
    first, second = examples_of(policy, batch), examples_of(policy, batch)
    assert torch.equal(first[1], second[1]) and torch.equal(
        first[0]["pixel_values"], second[0]["pixel_values"]
    )
    policy.train()
    augmented = examples_of(policy, batch)
    assert not torch.equal(augmented[0]["pixel_values"], first[0]["pixel_values"])
    assert (augmented[0]["input_ids"] == policy.examples.chat.mask_id).sum() > (
        first[0]["input_ids"] == policy.examples.chat.mask_id
    ).sum()


def test_augmentation_follows_the_global_seed_and_differs_between_ranks(policy, processors, monkeypatch):
    batch = processors[0](make_batch())
    policy.train()

    def draw(seed: int) -> torch.Tensor:
        random.seed(seed)
        return examples_of(policy, batch)[0]["pixel_values"]

    same, again, other = draw(1), draw(1), draw(2)
    assert torch.equal(same, again) and not torch.equal(same, other)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert not torch.equal(same, draw(1))


def test_padded_timesteps(tiny_vlm, processors):
    batch = processors[0](make_batch(rows=2))
    batch["action_is_pad"][0, 5:] = True
    default = VLA0Policy(make_config(tiny_vlm)).eval()
    masked = VLA0Policy(make_config(tiny_vlm, do_mask_loss_for_padding=True)).eval()
    kept, dropped = examples_of(default, batch)[1], examples_of(masked, batch)[1]
    assert torch.equal(kept[1], dropped[1])
    gone = (kept[0] != IGNORE) & (dropped[0] == IGNORE)
    text = default.vlm_processor.tokenizer.decode(kept[0][gone])
    expected = batch["action"][0, 5:].flatten().tolist()
    assert text == "".join(f" {v}" for v in expected)


def test_clipping_is_logged(tiny_vlm, policy):
    pre, _ = make_vla0_pre_post_processors(make_config(tiny_vlm), make_stats(-0.5, 0.5))
    assert policy(pre(make_batch()))[1]["action_clipped"] > 0.3


def test_freeze_vision_checkpointing_and_attention(tiny_vlm, processors):
    """None of them changes the language model's gradients."""
    batch, gradients = processors[0](make_batch(rows=2)), []
    other = {"freeze_vision": True, "gradient_checkpointing": True, "attn_implementation": "eager"}
    for settings in ({}, other):
        policy = VLA0Policy(make_config(tiny_vlm, **settings)).train()
        random.seed(0)
        policy(batch)[0].backward()
        gradients.append(policy.model.model.language_model.layers[0].mlp.up_proj.weight.grad)
    assert torch.allclose(*gradients, atol=1e-6)
    assert not any(p.requires_grad for p in policy.model.model.visual.parameters())
    assert policy.model.model.visual.config._attn_implementation == "eager"


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.slow
def test_compiled_model_gives_the_same(tiny_vlm, processors):
    batch = processors[0](make_batch(rows=2))
    plain = VLA0Policy(make_config(tiny_vlm)).eval()
    compiled = VLA0Policy(make_config(tiny_vlm, compile_model=True)).eval()
    assert compiled(batch)[0].item() == pytest.approx(plain(batch)[0].item(), rel=1e-4)
    for seed in range(2):  # the second time in the buffers of the first
        batch = observation(processors[0](make_batch(rows=2, seed=seed)))
        assert torch.equal(compiled.predict_action_chunk(batch), plain.predict_action_chunk(batch))
    with torch.inference_mode():  # as LeRobot's evaluation
        assert torch.equal(compiled.predict_action_chunk(batch), plain.predict_action_chunk(batch))
    assert plain.state_dict().keys() == compiled.state_dict().keys()


def test_overfits_and_decodes_the_exact_integers(tiny_vlm, processors):
    """Four samples, learnt by heart, come back digit by digit."""
    torch.manual_seed(0)
    config = make_config(tiny_vlm, chunk_size=2, n_action_steps=2, crop_ratio=1.0, image_size=56)
    policy = VLA0Policy(config)
    batch = processors[0](make_batch(rows=4, size=56, chunk_size=2))
    learn(policy, batch)
    assert torch.equal(policy.predict_action_chunk(observation(batch)), batch["action"].float())


def test_batch_of_different_prompts_equals_one_by_one(policy, processors):
    randomise(policy)
    batch = observation(processors[0](make_batch(rows=4)))
    together = policy.predict_action_chunk(batch)
    assert len({tuple(c.flatten().tolist()) for c in together}) > 1
    alone = [policy.predict_action_chunk(observation(batch, slice(i, i + 1))) for i in range(4)]
    assert torch.equal(together, torch.cat(alone))


def test_select_action_walks_through_the_chunk(tiny_vlm, processors):
    policy = VLA0Policy(make_config(tiny_vlm, n_action_steps=3)).eval()
    randomise(policy)
    first, second = (observation(processors[0](make_batch(rows=2, seed=s))) for s in (0, 1))
    chunk = policy.predict_action_chunk(first)
    # the queue, not the new observation, decides until three actions are spent
    assert torch.equal(policy.select_action(first), chunk[:, 0])
    assert torch.equal(policy.select_action(second), chunk[:, 1])
    assert torch.equal(policy.select_action(second), chunk[:, 2])
    assert torch.equal(policy.select_action(second), policy.predict_action_chunk(second)[:, 0])
    policy.reset()
    assert torch.equal(policy.select_action(first), chunk[:, 0])


def test_decodes_only_the_timesteps_it_needs(tiny_vlm, processors):
    passes = {}
    for steps in (1, 8):
        policy = VLA0Policy(make_config(tiny_vlm, n_action_steps=steps)).eval()
        count = [0]
        policy.model.model.language_model.register_forward_hook(
            lambda *_, c=count: c.__setitem__(0, c[0] + 1)
        )
        policy.select_action(observation(processors[0](make_batch(rows=1))))
        passes[steps] = count[0]
    # At most three passes an integer (the separator is forced), and one for the prompt's first words.
    assert passes[1] <= 1 + 7 * 4 and passes[1] < passes[8] <= 1 + 56 * 4


def test_temporal_ensembling(tiny_vlm, processors):
    """Two actions per chunk, averaged with the two chunks before."""
    config = make_config(tiny_vlm, n_action_steps=2, ensemble_size=3, ensemble_weight=0.5)
    policy = VLA0Policy(config).eval()
    batches = [observation(processors[0](make_batch(rows=2, seed=seed))) for seed in range(3)]
    chunks = [policy.predict_action_chunk(batch) for batch in batches]
    policy.reset()
    actions = [policy.select_action(batch) for batch in batches for _ in range(2)]
    third = (chunks[2][:, 0] + 0.5 * chunks[1][:, 2] + 0.5 * chunks[0][:, 4]) / 2
    assert torch.equal(actions[0], chunks[0][:, 0])
    assert torch.allclose(actions[3], (chunks[1][:, 1] + 0.5 * chunks[0][:, 3]) / 1.5)
    assert torch.allclose(actions[4], third)
    policy.reset()
    assert torch.equal(policy.select_action(batches[1]), chunks[1][:, 0])


def test_generation_config_of_the_base_model_has_no_influence(policy, processors):
    batch = observation(processors[0](make_batch()))
    assert policy.model.generation_config.repetition_penalty == 1.05  # what Qwen2.5-VL ships with
    before = policy.predict_action_chunk(batch)
    policy.model.generation_config.update(
        repetition_penalty=5.0,
        do_sample=True,
        temperature=9.0,
        suppress_tokens=policy.examples.chat.digit_ids,
        max_length=3,
    )
    assert torch.equal(policy.predict_action_chunk(batch), before)


def test_temperature_samples(tiny_vlm, processors):
    policy = VLA0Policy(make_config(tiny_vlm, temperature=1.0)).eval()
    batch = observation(processors[0](make_batch(rows=1)))
    torch.manual_seed(0)
    one, two = policy.predict_action_chunk(batch), policy.predict_action_chunk(batch)
    torch.manual_seed(0)
    assert not torch.equal(one, two) and torch.equal(policy.predict_action_chunk(batch), one)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}])
@pytest.mark.parametrize("name", ["model.language_model.layers.0.mlp.down_proj", "model.visual.merger.mlp.2"])
def test_weights_that_are_not_finite_move_no_robot(settings, name, tiny_vlm, processors):
    policy = VLA0Policy(make_config(tiny_vlm, **settings)).eval()
    batch = observation(processors[0](make_batch(rows=2)))
    with torch.no_grad():
        policy.model.get_submodule(name).weight[0] = float("nan")
    with pytest.raises(ValueError, match="no token can be chosen. Its weights or its inputs hold NaN"):
        policy.select_action(batch)


@pytest.mark.parametrize("act", ["select_action", "predict_action_chunk"])
def test_acting_is_as_in_evaluation_mode_and_records_no_gradients(act, tiny_vlm, processors):
    policy = VLA0Policy(make_config(tiny_vlm, use_state=True, ensemble_size=3, n_action_steps=2))
    batch = processors[0](make_batch(rows=1))
    for layer in policy.model.model.language_model.layers:
        layer.mlp = torch.nn.Sequential(layer.mlp, torch.nn.Dropout(0.9))  # the same in evaluation mode only
    batch["observation.state"].requires_grad_()
    actions = []
    for mode in (False, True):
        policy.train(mode).reset()
        actions.append(getattr(policy, act)(observation(batch)))
        assert not actions[-1].requires_grad and all(m.training == mode for m in policy.modules())
    assert torch.equal(*actions)
    policy(batch)[0].backward()


def test_untiled_cameras_order_and_state(tiny_vlm, processors):
    keys = ["observation.images.image2", "observation.images.image"]
    config = make_config(tiny_vlm, tile_images=False, cameras=keys, use_state=True)
    policy = VLA0Policy(config).eval()
    batch = processors[0](make_batch(rows=2))
    seen = policy.examples.check(batch)
    pictures = policy.examples.pictures(seen, None)
    assert pictures.shape == (2, 2, 3, 56, 56)
    crop = batch[keys[0]][..., 4:60, 4:60]
    assert torch.equal(pictures[:, 0], (crop * 255).round().byte())
    text = policy.vlm_processor.tokenizer.decode(
        policy.examples.chat.inference_batch(policy.examples.instructions(seen))["input_ids"][0]
    )
    assert "Picture 2: " in text and "in the basket\nState: " in text
    assert len(text.split("State: ")[1].split("<")[0].split()) == 8
    assert policy.predict_action_chunk(observation(batch)).shape == (2, 8, 7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reload_gives_identical_tokens_without_the_base(dtype, tiny_vlm, processors, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_vlm, base)
    policy = VLA0Policy(make_config(base, dtype=dtype)).eval()
    randomise(policy)
    folder = save_all(policy, processors, tmp_path / "checkpoint")
    shutil.rmtree(base)
    loaded = VLA0Policy.from_pretrained(folder)
    assert loaded.model.dtype == policy.model.dtype and not loaded.training
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in policy.state_dict().items())
    batch = observation(processors[0](make_batch()))
    assert torch.equal(loaded.predict_action_chunk(batch), policy.predict_action_chunk(batch))
    inv_freq = loaded.model.model.language_model.rotary_emb.inv_freq
    assert inv_freq.dtype == torch.float32


def test_checkpoint_holds_only_what_lerobots_push_uploads(policy, processors, tmp_path):
    folder = save_all(policy, processors, tmp_path)
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert {Path(f).suffix for f in files} == {".json", ".safetensors"}
    assert {"config.json", "model.safetensors", "vlm/config.json", "vlm/tokenizer.json"} <= files
    assert {"policy_preprocessor.json", "policy_postprocessor.json"} <= files


@pytest.fixture
def checkpoint(policy, processors, tmp_path):
    return save_all(policy, processors, tmp_path / "checkpoint")


def test_missing_weight_is_not_just_a_warning(checkpoint):
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    weights.pop("model.model.language_model.layers.0.mlp.up_proj.weight")
    save_file(weights, checkpoint / "model.safetensors")
    with pytest.raises(RuntimeError, match="Missing key"):
        VLA0Policy.from_pretrained(checkpoint)


def test_missing_camera_names_those_present(policy, processors):
    batch = processors[0](make_batch())
    batch["observation.images.wrist"] = batch.pop("observation.images.image2")
    with pytest.raises(
        ValueError, match=r"lacks the camera images \['observation.images.image2'\].*images.wrist"
    ):
        policy(batch)
