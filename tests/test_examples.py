import pickle

import pytest
import torch
import torchvision.transforms.v2.functional as F  # noqa: N812
from conftest import make_batch, make_config, observation

from lerobot_vla0.chat import IGNORE
from lerobot_vla0.examples import ExampleMaker


def test_policy_acts_and_trains_on_these_examples(policy, processors):
    batch = processors[0](make_batch())
    alone = ExampleMaker(policy.config, policy.vlm_processor)
    inputs, labels, places = alone.training_examples(batch, None)
    for key, value in policy.examples.training_examples(batch, None)[0].items():
        assert torch.equal(inputs[key], value)
    answer = labels[0][labels[0] != IGNORE]
    text = policy.vlm_processor.tokenizer.decode(answer)
    assert text.split("<")[0].split() == [str(v) for v in batch["action"][0].flatten().tolist()]
    assert places.shape == labels.shape == inputs["input_ids"].shape
    prompt = alone.acting_inputs(alone.check(observation(batch)))["input_ids"]
    assert torch.equal(prompt[0], inputs["input_ids"][0, : prompt.shape[1]])


def test_a_workers_copy_makes_the_same_examples(policy, processors):
    batch = processors[0](make_batch())
    copy = pickle.loads(pickle.dumps(policy.examples))
    one, two = (
        maker.training_examples(batch, torch.Generator().manual_seed(3)) for maker in (policy.examples, copy)
    )
    assert torch.equal(one[1], two[1]) and all(torch.equal(one[0][k], two[0][k]) for k in one[0])
    other = copy.training_examples(batch, torch.Generator().manual_seed(4))
    assert not torch.equal(one[0]["pixel_values"], other[0]["pixel_values"])


@pytest.mark.parametrize("size", [(64, 64), (64, 90), (65, 64)])
def test_pictures_are_never_enlarged(size, policy, processors):
    """The smallest that pass: 56 pixels after the crop to 0.875."""
    batch = processors[0](make_batch(rows=1))
    batch["observation.images.image"] = torch.rand(1, 3, *size)
    policy.examples.check(batch)
    batch["observation.images.image"] = torch.rand(1, 3, 63, size[1])
    with pytest.raises(ValueError, match=f"63×{size[1]} pixels, 55×.* smaller than .*image_size=56"):
        policy.examples.check(batch)


def test_training_says_once_what_becomes_of_each_camera(tiny_vlm, policy, caplog):
    caplog.set_level("INFO")
    examples = ExampleMaker(make_config(tiny_vlm, image_fit="letterbox"), policy.vlm_processor)
    batch = observation(make_batch(rows=1))
    batch["observation.images.image2"] = torch.rand(1, 3, 96, 128)
    for _ in range(2):
        examples.pictures(examples.check(batch), torch.Generator())
    first, second = (record.message for record in caplog.records if "pixels" in record.message)
    assert first.startswith("observation.images.image: 64×64 pixels, of which 56×56 remain")
    assert second.startswith(
        "observation.images.image2: 96×128 pixels, of which 84×112 remain and become 42×56"
    )


def test_part_of_one_cameras_picture_is_shown_enlarged(tiny_vlm, policy, caplog):
    """In training and in acting; the other camera is shown whole."""
    caplog.set_level("INFO")
    regions = {"observation.images.image2": [0.5, 0.25, 0.5, 0.5]}
    examples = ExampleMaker(
        make_config(tiny_vlm, camera_regions=regions, crop_ratio=1.0), policy.vlm_processor
    )
    whole = ExampleMaker(make_config(tiny_vlm, crop_ratio=1.0), policy.vlm_processor)
    batch = observation(make_batch(rows=2))
    for generator in (None, torch.Generator().manual_seed(0)):
        if generator is not None:
            batch["observation.images.image2"] = batch["observation.images.image2"].clone()
            batch["observation.images.image2"][..., :32, :] = 0.5  # outside the part
        pictures = examples.pictures(examples.check(batch), generator)
        assert pictures.shape == (2, 1, 3, 56, 112)
        if generator is None:
            first = pictures
            part = F.resize(batch["observation.images.image2"][..., 32:, 16:48], [56, 56], antialias=True)
            assert (pictures[:, 0, ..., 56:] - part * 255).abs().max() <= 1
            other = whole.pictures(whole.check(batch), None)[..., :56]
            assert torch.equal(pictures[..., :56], other)
    assert torch.equal(examples.pictures(examples.check(batch), None), first)
    assert "image2: 32×32 pixels of its camera_regions, of which 32×32 remain and become 56×56" in caplog.text


@pytest.mark.parametrize("task", [None, "", " ", ["", ""]])
def test_default_task_replaces_an_instruction_where_the_instruction_is_blank(task, tiny_vlm, policy, caplog):
    caplog.set_level("INFO")
    examples = ExampleMaker(make_config(tiny_vlm, default_task="push the T"), policy.vlm_processor)
    rows = 2 if isinstance(task, list) else 1
    batch = {**observation(make_batch(rows=rows)), "task": task}
    for _ in range(2):
        assert examples.check(batch).tasks == ["push the T"] * rows
    assert caplog.text.count("the model sees default_task='push the T'") == 1
    with pytest.raises(ValueError, match="blank or missing .*--policy.default_task="):
        policy.examples.check(batch)


@pytest.mark.parametrize("value", [float("nan"), 255.0])
def test_training_looks_at_the_first_pictures_of_each_camera(value, tiny_vlm, policy):
    examples = ExampleMaker(make_config(tiny_vlm), policy.vlm_processor)
    batch = observation(make_batch(rows=2))
    batch["observation.images.image2"][1, 2, 3, 4] = value
    for _ in range(2):  # the first camera has passed by then
        with pytest.raises(ValueError, match="observation.images.image2 has values from .* Divide bytes by"):
            examples.pictures(examples.check(batch), torch.Generator())


@pytest.mark.parametrize("tile", [True, False])
def test_empty_cameras_are_black(tile, tiny_vlm, policy, caplog):
    """In their place in the picture, also where the others are jittered."""
    examples = ExampleMaker(make_config(tiny_vlm, empty_cameras=1, tile_images=tile), policy.vlm_processor)
    whole = observation(make_batch(rows=2))
    for position, key in enumerate(("observation.images.image", "observation.images.image2")):
        caplog.clear()
        batch = {name: value for name, value in whole.items() if name != key}
        for generator in (None, torch.Generator().manual_seed(0)):
            out = examples.pictures(examples.check(batch), generator)
            halves = torch.cat(list(out.unbind(1)), -1).unflatten(-1, (2, 56))
            assert (halves[..., position, :] == 0).all() and (halves[..., 1 - position, :] > 0).any()
        expected = examples.pictures(examples.check(whole), None)
        halves = torch.cat(list(expected.unbind(1)), -1).unflatten(-1, (2, 56))
        halves[..., position, :] = 0
        out = examples.pictures(examples.check(batch), None)
        assert torch.equal(torch.cat(list(out.unbind(1)), -1).unflatten(-1, (2, 56)), halves)
        assert caplog.text.count(f"['{key}'] are missing: the model sees black pictures") == 1


def test_rows_of_an_observation(policy, processors):
    batch = processors[0](make_batch())
    seen = policy.examples.check(batch)
    some = seen.take([2, 0])
    assert len(seen) == 4 and len(some) == 2 and some.tasks == [batch["task"][2], batch["task"][0]]
    assert torch.equal(some.cameras[1][0], batch["observation.images.image2"][2])
    one = policy.examples.check({**observation(batch, slice(0, 1)), "task": "open the drawer"})
    assert one.tasks == ["open the drawer"]


@pytest.mark.parametrize("value", [float("nan"), -0.01])
def test_a_pixel_outside_its_range_moves_no_robot(value, policy, processors):
    batch = observation(processors[0](make_batch(rows=2)))
    batch["observation.images.image2"][1, 2, 30, 31] = value
    with pytest.raises(ValueError, match=r"observation.images.image2 has values from .*in \[0, 1\]"):
        policy.select_action(batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": ["a"]}, "one instruction for each of 4 rows"),
        ({"observation.images.image": None}, r"lacks the camera images \['observation.images.image'\]"),
        ({"observation.images.image": torch.rand(4, 64, 64, 3)}, r"float tensor \(B, 3, H, W\)"),
        ({"observation.images.image": torch.rand(4, 1, 64, 64)}, "Depth and grey cameras cannot be used"),
        (
            {"observation.state": torch.rand(3, 8)},
            r"use_state=True needs 'observation.state' of shape \(4, S\)",
        ),
        ({"observation.state": None}, "use_state=True needs 'observation.state'"),
        ({"action": torch.rand(4, 8, 7)}, "through the policy's preprocessor"),
    ],
)
def test_batches_that_are_refused(change, message, tiny_vlm, policy, processors):
    examples = ExampleMaker(make_config(tiny_vlm, use_state=True), policy.vlm_processor)
    batch = {k: v for k, v in (processors[0](make_batch()) | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        examples.training_examples(batch, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 60}, "image_size=60 does not fit .* Set it to 56"),
        ({"action_norm": "task"}, "has no 'action_range': .* through the policy's preprocessor"),
    ],
)
def test_settings_that_are_refused(settings, message, tiny_vlm, policy):
    with pytest.raises(ValueError, match=message):
        examples = ExampleMaker(make_config(tiny_vlm, **settings), policy.vlm_processor)
        examples.check(observation(make_batch()))
