import pickle

import pytest
import torch
import torchvision.transforms.v2.functional as F  # noqa: N812
from conftest import make_batch, make_config, observation

from lerobot_vla0.examples import ExampleMaker
from lerobot_vla0.prompt import IGNORE


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


def test_action_of_another_shape(policy, processors):
    batch = processors[0](make_batch(chunk_size=4))
    with pytest.raises(ValueError, match=r"action must be integer bins of shape \(B, 8, 7\)"):
        policy.examples.training_examples(batch, None)


def test_state_that_is_missing_is_named(tiny_vlm, processors):
    from conftest import make_config

    from lerobot_vla0.modeling_vla0 import VLA0Policy

    policy = VLA0Policy(make_config(tiny_vlm, use_state=True))
    batch = processors[0](make_batch())
    del batch["observation.state"]
    with pytest.raises(ValueError, match=r"no 'observation.state', which use_state=True.*images.image2"):
        policy.examples.check(batch)


@pytest.mark.parametrize("size", [(64, 64), (64, 90), (65, 64)])
def test_pictures_are_never_enlarged(size, policy, processors):
    """The smallest that pass: 56 pixels after the crop to 0.875."""
    batch = processors[0](make_batch(rows=1))
    batch["observation.images.image"] = torch.rand(1, 3, *size)
    policy.examples.check(batch)
    batch["observation.images.image"] = torch.rand(1, 3, 63, size[1])
    with pytest.raises(ValueError, match=f"63×{size[1]} pixels, 55×.* smaller than .*image_size=56"):
        policy.examples.check(batch)


@pytest.mark.parametrize(
    ("fit", "passes", "fails"),
    [("squash", (64, 90), (63, 90)), ("crop", (90, 64), (90, 63)), ("letterbox", (20, 64), (20, 63))],
)
def test_sizes_are_checked_after_the_crop(fit, passes, fails, tiny_vlm, policy):
    examples = ExampleMaker(make_config(tiny_vlm, image_fit=fit), policy.vlm_processor)
    batch = observation(make_batch(rows=1))
    batch["observation.images.image"] = torch.rand(1, 3, *passes)
    assert examples.pictures(examples.check(batch), None).shape == (1, 1, 3, 56, 112)
    batch["observation.images.image"] = torch.rand(1, 3, *fails)
    with pytest.raises(ValueError, match=rf"{fails[0]}×{fails[1]} pixels.*image_fit={fit}.* image_size=56"):
        examples.check(batch)


def test_training_says_once_what_becomes_of_each_camera(tiny_vlm, policy, caplog):
    caplog.set_level("INFO")
    examples = ExampleMaker(make_config(tiny_vlm, image_fit="letterbox"), policy.vlm_processor)
    batch = observation(make_batch(rows=1))
    batch["observation.images.image2"] = torch.rand(1, 3, 96, 128)
    for _ in range(2):
        examples.pictures(examples.check(batch), torch.Generator())
    first, second = (record.message for record in caplog.records if "pixels" in record.message)
    assert first.startswith("observation.images.image: 64×64 pixels, of which 56×56 are kept")
    assert second.startswith(
        "observation.images.image2: 96×128 pixels, of which 84×112 are kept and become 42×56"
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
    assert (
        "image2: 32×32 pixels of its camera_regions, of which 32×32 are kept and become 56×56" in caplog.text
    )


@pytest.mark.parametrize("task", [None, "", " ", ["", ""]])
def test_default_task_is_shown_where_the_instruction_is_blank(task, tiny_vlm, policy, caplog):
    caplog.set_level("INFO")
    examples = ExampleMaker(make_config(tiny_vlm, default_task="push the T"), policy.vlm_processor)
    rows = 2 if isinstance(task, list) else 1
    batch = {**observation(make_batch(rows=rows)), "task": task}
    for _ in range(2):
        assert examples.check(batch).tasks == ["push the T"] * rows
    assert caplog.text.count("the model sees default_task='push the T'") == 1
    with pytest.raises(ValueError, match="no 'task'" if task is None else "blank.*--policy.default_task="):
        policy.examples.check(batch)


def test_default_task_replaces_blank_rows_only(tiny_vlm, policy):
    examples = ExampleMaker(make_config(tiny_vlm, default_task="push the T"), policy.vlm_processor)
    batch = {**observation(make_batch(rows=3)), "task": ["lift", "", "pull"]}
    assert examples.check(batch).tasks == ["lift", "push the T", "pull"]


def test_too_small_a_camera_is_told_the_size_that_fits(tiny_vlm, policy):
    """PushT's pictures and the default size."""
    examples = ExampleMaker(make_config(tiny_vlm, image_size=224), policy.vlm_processor)
    batch = observation(make_batch(rows=1, size=96))
    with pytest.raises(ValueError, match="96×96 pixels, 84×84 after .* Lower image_size to 84, or raise"):
        examples.check(batch)
    ExampleMaker(make_config(tiny_vlm, image_size=84), policy.vlm_processor).check(batch)


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
        assert caplog.text.count(f"the cameras ['{key}'] are not there: the model sees black pictures") == 1


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_more_cameras_are_missing_than_may_be(empty, tiny_vlm, policy):
    """Never all of them."""
    examples = ExampleMaker(make_config(tiny_vlm, empty_cameras=empty), policy.vlm_processor)
    batch = observation(make_batch(rows=1))
    del batch["observation.images.image"]
    if empty:
        del batch["observation.images.image2"]
    with pytest.raises(ValueError, match="lacks the camera images .*--policy.empty_cameras"):
        examples.check(batch)


def test_state_that_is_no_tensor_is_named(tiny_vlm, processors):
    from conftest import make_config

    from lerobot_vla0.modeling_vla0 import VLA0Policy

    policy = VLA0Policy(make_config(tiny_vlm, use_state=True))
    batch = processors[0](make_batch())
    for state in (batch["observation.state"].numpy(), batch["observation.state"][0], torch.zeros(3, 8)):
        with pytest.raises(ValueError, match=r"observation.state must be a float tensor \(4, S\)"):
            policy.examples.check({**batch, "observation.state": state})


def test_rows_of_an_observation(policy, processors):
    batch = processors[0](make_batch())
    seen = policy.examples.check(batch)
    some = seen.take([2, 0])
    assert len(seen) == 4 and len(some) == 2 and some.tasks == [batch["task"][2], batch["task"][0]]
    assert torch.equal(some.cameras[1][0], batch["observation.images.image2"][2])
    one = policy.examples.check({**observation(batch, slice(0, 1)), "task": "open the drawer"})
    assert one.tasks == ["open the drawer"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -0.01, 1.01, 255.0])
@pytest.mark.parametrize("act", ["select_action", "predict_action_chunk", "stream_action_chunk"])
def test_one_pixel_that_is_no_brightness_moves_no_robot(value, act, policy, processors):
    batch = observation(processors[0](make_batch(rows=2)))
    batch["observation.images.image2"][1, 2, 30, 31] = value
    with pytest.raises(ValueError, match=r"observation.images.image2 has values from .*in \[0, 1\]"):
        list(getattr(policy, act)(batch))


@pytest.mark.parametrize(("chunk_size", "dim"), [(8, 1025), (1024, 9), (1, 10**9), (8, 0)])
def test_too_many_integers(chunk_size, dim, tiny_vlm, policy):
    from conftest import make_config
    from lerobot.configs import FeatureType, PolicyFeature

    action = {"action": PolicyFeature(FeatureType.ACTION, (dim,))}
    config = make_config(tiny_vlm, chunk_size=chunk_size, n_action_steps=1, output_features=action)
    with pytest.raises(ValueError, match=f"{chunk_size * dim} integers: there must be 1..8192"):
        ExampleMaker(config, policy.vlm_processor)


@pytest.mark.parametrize(("joints", "refused"), [(6, True), (1, True), (7, False), (8, False), (9, False)])
def test_a_robot_with_fewer_joints_than_the_action(joints, refused, policy):
    """Trained on a state of 8 numbers, actions of 7. The state is not shown to this policy."""
    batch = {**observation(make_batch(rows=2)), "observation.state": torch.zeros(2, joints)}
    if refused:
        message = f"the robot has {joints} joints .observation.state.*actions of 7 dimensions.*robot with 8"
        with pytest.raises(ValueError, match=message):
            policy.examples.check(batch)
        with pytest.raises(ValueError, match=message):
            policy.select_action(batch)
    else:
        policy.examples.check(batch)


def test_a_state_that_never_had_the_actions_joints_says_nothing_of_the_robot(policy):
    policy.config.input_features["observation.state"].shape = (5,)
    policy.examples.check({**observation(make_batch(rows=1)), "observation.state": torch.zeros(1, 3)})
