import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import learn, make_batch, make_config, make_stats, observation, randomise
from lerobot.configs import FeatureType, PolicyFeature

from lerobot_vla0.examples import augmentation_generator
from lerobot_vla0.modeling_vla0 import VLA0Policy
from lerobot_vla0.processor_vla0 import make_vla0_pre_post_processors
from lerobot_vla0.prompt import IGNORE


def examples_of(policy, batch: dict):
    """As `forward` makes them."""
    generator = augmentation_generator() if policy.training else None
    return policy.examples.training_examples(batch, generator)


def save_all(policy, processors, folder: Path) -> Path:
    policy.save_pretrained(folder)
    for processor in processors:
        processor.save_pretrained(folder)
    return folder


# --------------------------------------------------------------------------------------------------- training


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
    assert rows.shape == (4,)
    alone = [
        policy({**observation(batch, slice(i, i + 1)), "action": batch["action"][i : i + 1]})[0]
        for i in range(4)
    ]
    assert torch.allclose(rows, torch.stack(alone), rtol=1e-5)
    with pytest.raises(ValueError, match="'mean' or 'none', got 'sum'"):
        policy(batch, reduction="sum")


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


def test_freeze_vision_and_gradient_checkpointing(tiny_vlm, processors):
    batch = processors[0](make_batch(rows=2))
    plain = VLA0Policy(make_config(tiny_vlm)).eval()
    frozen = VLA0Policy(make_config(tiny_vlm, freeze_vision=True, gradient_checkpointing=True)).eval()
    assert not any(p.requires_grad for p in frozen.model.model.visual.parameters())
    assert len(frozen.get_optim_params()) < len(plain.get_optim_params())
    gradients = []
    for policy in (plain, frozen):
        policy.train()
        random.seed(0)
        policy(batch)[0].backward()
        gradients.append(policy.model.model.language_model.layers[0].mlp.up_proj.weight.grad)
    assert torch.allclose(*gradients, atol=1e-6)


def test_attention_backend_and_kind_of_checkpointing_are_honoured(tiny_vlm, processors, tmp_path):
    batch = processors[0](make_batch(rows=2))
    losses = []
    for name in ("eager", "sdpa"):
        config = make_config(tiny_vlm, attn_implementation=name, gradient_checkpointing=True)
        policy = VLA0Policy(config)
        policy.save_pretrained(tmp_path / name)
        for model in (policy.model, VLA0Policy.from_pretrained(tmp_path / name).model):
            for part in (model.model.language_model, model.model.visual):
                assert part.config._attn_implementation == name
            layer = model.model.language_model.layers[0]
            assert layer.gradient_checkpointing
            assert layer._gradient_checkpointing_func.keywords == {"use_reentrant": False}
        losses.append(policy.eval()(batch)[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


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


# ----------------------------------------------------------------------------------------------------- acting


def test_random_weights_give_valid_chunks(policy, processors):
    for seed in range(3):
        chunk = policy.predict_action_chunk(observation(processors[0](make_batch(seed=seed))))
        assert chunk.shape == (4, 8, 7) and chunk.dtype == torch.float32
        assert chunk.min() >= 0 and chunk.max() <= 1000
        actions = processors[1](chunk)
        assert actions.abs().max() <= 1.0 + 1e-6


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


def test_streaming_gives_the_chunk(policy, processors):
    batch = observation(processors[0](make_batch(rows=2)))
    chunk = policy.predict_action_chunk(batch)
    passes = [0]
    policy.model.model.language_model.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    seen = []
    for step, action in enumerate(policy.stream_action_chunk(batch)):
        assert torch.equal(action, chunk[:, step])
        seen.append(passes[0])
    assert len(seen) == 8 and seen[0] < seen[-1] / 2  # the first timestep does not wait for the last


def test_select_action_can_stream(tiny_vlm, processors):
    """The same actions; each call decodes only as far as the action that it gives."""
    batches = [observation(processors[0](make_batch(rows=1, seed=seed))) for seed in range(6)]
    actions = {}
    for stream in (False, True):
        policy = VLA0Policy(make_config(tiny_vlm, stream=stream, n_action_steps=3)).eval()
        actions[stream] = [policy.select_action(batch) for batch in batches]
    assert all(torch.equal(a, b) for a, b in zip(actions[False], actions[True], strict=True))


def test_temporal_ensembling(tiny_vlm, processors):
    """Two actions a look, averaged with the two looks before: against the chunks of each look alone."""
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


@pytest.mark.parametrize("settings", [{"n_action_steps": 3}, {"n_action_steps": 2, "ensemble_size": 4}])
def test_reset_of_one_environment_does_not_touch_another(settings, tiny_vlm, processors):
    """Its episode begins afresh in the middle of the other's chunk, each as if it were alone."""
    policy = VLA0Policy(make_config(tiny_vlm, **settings)).eval()
    batches = [observation(processors[0](make_batch(rows=2, seed=seed))) for seed in range(8)]

    def alone(row: int, steps: range) -> list[torch.Tensor]:
        policy.reset()
        rows = [{k: v[row : row + 1] for k, v in batches[step].items()} for step in steps]
        return [policy.select_action(batch)[0] for batch in rows]

    expected = [alone(0, range(8)), alone(1, range(4)) + alone(1, range(4, 8))]
    policy.reset()
    policy.reset(rows=[1])  # before anything was remembered
    for step, batch in enumerate(batches):
        if step == 4:
            policy.reset(rows=[1])
        action = policy.select_action(batch)
        assert torch.equal(action, torch.stack([expected[0][step], expected[1][step]]))


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


WAYS = {
    "select_action": {},
    "predict_action_chunk": {},
    "stream_action_chunk": {},
    "sampled": {"temperature": 0.7},
    "tokens one by one": {"draft_length": 0},
    "ensembled": {"ensemble_size": 3, "n_action_steps": 2},
    "streamed": {"stream": True},
}
BROKEN_ROWS = {
    "language_model.embed_tokens": slice(None),
    "language_model.layers.0.self_attn.k_proj": 3,
    "language_model.layers.0.mlp.down_proj": 5,
    "language_model.norm": 0,
    "visual.patch_embed.proj": 1,
    "visual.blocks.0.attn.qkv": 2,
    "visual.merger.mlp.2": 0,
}


@pytest.mark.parametrize("way", WAYS)
def test_weights_that_are_no_numbers_move_no_robot(way, tiny_vlm, processors):
    """One row of any weight, or of the head, is an error; nothing of it stays."""
    policy = VLA0Policy(make_config(tiny_vlm, **WAYS[way])).eval()
    batch = observation(processors[0](make_batch(rows=2)))

    def act() -> torch.Tensor:
        torch.manual_seed(0)
        policy.reset()
        actions = getattr(policy, way if hasattr(policy, way) else "select_action")(batch)
        return actions if isinstance(actions, torch.Tensor) else torch.stack(list(actions))

    expected, chat = act(), policy.examples.chat
    broken = [(policy.model.model.get_submodule(name).weight, row) for name, row in BROKEN_ROWS.items()]
    broken += [(policy.model.lm_head.weight, row) for row in (chat.digit_ids[0], chat.space_id)]
    for weight, row in broken:
        good = weight.detach().clone()
        with torch.no_grad():
            weight[row] = float("nan")
        policy.decoder.release()
        with pytest.raises(ValueError, match="no token can be chosen. Its weights or its inputs hold NaN"):
            act()
        with torch.no_grad():
            weight.copy_(good)
        policy.decoder.release()
    assert torch.equal(act(), expected)


@pytest.mark.parametrize("act", ["select_action", "predict_action_chunk", "stream_action_chunk"])
def test_acting_is_as_in_evaluation_mode_and_leaves_mode_and_gradients_alone(act, policy, processors):
    """From the start of the call; training just goes on."""
    batch = processors[0](make_batch(rows=1))
    for layer in policy.model.model.language_model.layers:
        layer.mlp = torch.nn.Sequential(layer.mlp, torch.nn.Dropout(0.9))  # the same in evaluation mode only
    actions = []
    for mode in (False, True):
        policy.train(mode).reset()
        acted = getattr(policy, act)(observation(batch))
        actions.append(torch.stack(list(acted)) if act == "stream_action_chunk" else acted)
        assert not actions[-1].requires_grad and all(m.training == mode for m in policy.modules())
    assert torch.equal(*actions)
    policy(batch)[0].backward()


@pytest.mark.parametrize("act", ["select_action", "predict_action_chunk", "stream_action_chunk"])
@pytest.mark.parametrize("settings", [{}, {"ensemble_size": 3, "n_action_steps": 2}, {"stream": True}])
def test_acting_keeps_no_graph(act, settings, tiny_vlm, processors):
    """Also where the caller records gradients, and with a state and pictures that ask for them."""
    policy = VLA0Policy(make_config(tiny_vlm, use_state=True, tile_images=False, **settings))
    kept: list[torch.Tensor] = []
    for seed in range(2):
        batch = observation(processors[0](make_batch(rows=2, seed=seed)))
        for value in batch.values():
            if isinstance(value, torch.Tensor):
                value.requires_grad_()
        with torch.enable_grad():
            acted = getattr(policy, act)(batch)
            kept += list(acted) if act == "stream_action_chunk" else [acted]
    for episode in policy._action_queue:
        kept += [*episode.actions, *episode.ensembler.chunks]
    assert kept and not any(tensor.requires_grad for tensor in kept)


@pytest.mark.parametrize("form", [list, tuple, np.array, torch.tensor])
def test_rows_of_a_reset(form, policy, processors):
    """Indices and masks, in any form, name the same rows; others keep their queue."""
    batch = observation(processors[0](make_batch(rows=4)))
    for mask in ([1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]):
        for rows in (form([bool(row) for row in mask]), form([i for i in range(4) if mask[i]])):
            policy.reset()
            policy.select_action(batch)
            policy.reset(rows)
            assert [not episode.actions for episode in policy._action_queue] == [bool(row) for row in mask]
    for rows in ([4], [-1], np.array([0, 9]), np.ones(3, dtype=bool), [0.5], 1, [[0]]):
        with pytest.raises(
            ValueError, match="^rows=.*(are not there|mask of 3 rows|must be a list or array)"
        ):
            policy.reset(rows)


def test_reset_of_no_row_does_not_interrupt_a_stream(tiny_vlm, processors):
    policy = VLA0Policy(make_config(tiny_vlm, stream=True, n_action_steps=2)).eval()
    first, second = (observation(processors[0](make_batch(rows=2, seed=s))) for s in (0, 1))
    chunk = policy.predict_action_chunk(first)
    assert torch.equal(policy.select_action(first), chunk[:, 0])
    policy.reset(np.zeros(2, dtype=bool))
    assert torch.equal(policy.select_action(second), chunk[:, 1])


def test_predicting_for_other_environments_keeps_the_queue(tiny_vlm, processors):
    policy = VLA0Policy(make_config(tiny_vlm, n_action_steps=3)).eval()
    batch = observation(processors[0](make_batch(rows=2)))
    chunk = policy.predict_action_chunk(batch)
    assert torch.equal(policy.select_action(batch), chunk[:, 0])
    other = observation(processors[0](make_batch(rows=3, seed=5)))
    policy.predict_action_chunk(other)
    assert torch.equal(policy.select_action({**batch}), chunk[:, 1])


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


# ------------------------------------------------------------------------------------------------ checkpoints


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


def test_truncated_weights(checkpoint):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="model.safetensors could not be loaded.*truncated"):
        VLA0Policy.from_pretrained(checkpoint)


def test_missing_weight_is_not_just_a_warning(checkpoint):
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    weights.pop("model.model.language_model.layers.0.mlp.up_proj.weight")
    save_file(weights, checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match="could not be loaded"):
        VLA0Policy.from_pretrained(checkpoint)


@pytest.mark.parametrize("name", ["model.safetensors", "vlm/config.json"])
def test_missing_file(checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        VLA0Policy.from_pretrained(checkpoint)


def test_missing_statistics_file(checkpoint):
    next(checkpoint.glob("policy_postprocessor_*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match="statistics that turn integers into robot commands"):
        VLA0Policy.from_pretrained(checkpoint)


def test_statistics_without_action(checkpoint):
    from safetensors.torch import save_file

    state = next(checkpoint.glob("policy_postprocessor_*.safetensors"))
    save_file({"observation.state.min": torch.zeros(8)}, state)
    with pytest.raises(ValueError, match=r"statistics \['min', 'max'\] of 'action' are missing"):
        VLA0Policy.from_pretrained(checkpoint)


def test_other_action_dimension(checkpoint, tiny_vlm):
    config = make_config(tiny_vlm, output_features={"action": PolicyFeature(FeatureType.ACTION, (6,))})
    with pytest.raises(
        ValueError, match="action has 6 dimensions here, but the checkpoint .* trained with 7"
    ):
        VLA0Policy.from_pretrained(checkpoint, config=config)


def test_other_num_bins(checkpoint, tiny_vlm):
    with pytest.raises(ValueError, match="num_bins=255 differs from the checkpoint's 1000"):
        VLA0Policy.from_pretrained(checkpoint, config=make_config(tiny_vlm, num_bins=255))


# -------------------------------------------------------------------------------------------------- bad input


def test_missing_camera_names_those_present(policy, processors):
    batch = processors[0](make_batch())
    batch["observation.images.wrist"] = batch.pop("observation.images.image2")
    with pytest.raises(
        ValueError, match=r"lacks the camera images \['observation.images.image2'\].*images.wrist"
    ):
        policy(batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.pop("task"), "no 'task'"),
        (lambda b: b.__setitem__("task", ["a"]), "4 images but 1 tasks"),
        (lambda b: b.__setitem__("task", ["", "a", "b", "c"]), "an instruction is blank"),
        (
            lambda b: b.__setitem__("observation.images.image", torch.rand(4, 3, 40, 40)),
            "40×40 pixels, 35×35 after the crop .* smaller than .*image_size=56",
        ),
        (
            lambda b: b.__setitem__("observation.images.image", torch.rand(4, 3, 60, 80)),
            r"60×80 pixels, 52×70 after the crop .* smaller than the 56×56 of image_size=56",
        ),
        (lambda b: b.__setitem__("observation.images.image", torch.rand(4, 64, 64, 3)), r"\(B, 3, H, W\)"),
        (
            lambda b: b.__setitem__("observation.images.image", b["observation.images.image"].numpy()),
            r"images.image must be a float tensor .* got float32 of shape \(4, 3, 64, 64\) \(ndarray\)",
        ),
        (
            lambda b: b.__setitem__("observation.images.image", torch.rand(4, 1, 64, 64)),
            "A depth or grey camera cannot be shown: choose the others with --policy.cameras",
        ),
        (lambda b: b.__setitem__("task", None), "no 'task'"),
        (lambda b: b.__setitem__("task", [None] * 4), "one instruction per row, each a string"),
        (lambda b: b.__setitem__("action", torch.rand(4, 8, 7)), "through the policy's preprocessor"),
        (lambda b: b.__setitem__("action", b["action"][:, :4]), r"shape \(B, 8, 7\)"),
    ],
)
def test_bad_batches(policy, processors, change, message):
    batch = processors[0](make_batch())
    change(batch)
    with pytest.raises(ValueError, match=message):
        policy(batch)


def test_image_size_that_the_vlm_would_resize(tiny_vlm):
    with pytest.raises(
        ValueError, match="image_size=60 must be a multiple of 28 for this VLM, for example 56"
    ):
        VLA0Policy(make_config(tiny_vlm, image_size=60))
