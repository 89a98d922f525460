"""Relative actions, from the data set to the robot's commands."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_batch, make_config, observation, randomise
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.dataset_tools import recompute_stats
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_policy, make_pre_post_processors
from lerobot.policies.rtc.relative import reanchor_relative_rtc_prefix
from lerobot.utils.collate import lerobot_collate_fn

from lerobot_vla0 import Agent
from lerobot_vla0.dataset import prepare_data
from lerobot_vla0.decoding import rtc
from lerobot_vla0.decoding.decoder import Plan
from lerobot_vla0.modeling_vla0 import VLA0Policy
from lerobot_vla0.processor_vla0 import make_vla0_pre_post_processors

NAMES = [*(f"joint_{i}" for i in range(6)), "gripper.pos"]
STATE = "observation.state"
# Per dimension, so that a mistaken one shows; the last joint is constant in the data.
STATS = {
    "action": {
        "min": torch.tensor([-1.0, -2, 0, -10, -0.5, 0.25, 0]),
        "max": torch.tensor([1.0, 1, 3, 30, 0.5, 0.25, 50]),
    }
}


def relative_config(vlm, **overrides):
    return make_config(vlm, use_relative_actions=True, action_feature_names=NAMES, **overrides)


@pytest.fixture
def make_acting(tiny_vlm):
    def make(**overrides):
        settings = {"chunk_size": 4, "n_action_steps": 4, **overrides}
        policy = VLA0Policy(relative_config(tiny_vlm, **settings)).eval()
        randomise(policy)
        return policy, *make_vla0_pre_post_processors(policy.config, STATS)

    return make


def state_at(t: int, rows: int = 2) -> torch.Tensor:
    """(rows, 8), far outside what the actions move in a chunk, and another one at each time."""
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(t)) * 20


def seen(batch: dict, t: int) -> dict:
    return {**batch, STATE: state_at(t, len(batch["task"]))}


def mask() -> torch.Tensor:
    return torch.tensor([True] * 6 + [False])


def close(commands, expected):
    """To a thousandth of a bin, or to float32's precision."""
    torch.testing.assert_close(commands, expected, rtol=2e-6, atol=1e-4)


def test_training_sees_actions_minus_the_state(make_acting):
    policy, pre, post = make_acting()
    batch = make_batch(rows=3, chunk_size=4)
    shown = pre(dict(batch))
    relative = batch["action"] - (batch[STATE][:, :7] * mask())[:, None]
    low, high = (STATS["action"][name] for name in ("min", "max"))
    bins = ((relative - low) / (high - low).clamp(min=1e-8) * 1000).round().clamp(0, 1000)
    assert torch.equal(shown["action"], bins.long())
    assert torch.equal(shown[STATE], batch[STATE])
    error = (post(shown["action"]) - batch["action"]).abs()
    inside = (relative >= low) & (relative <= high)
    assert (error <= (high - low) / 2000 + 1e-5)[inside].all() and inside.float().mean() > 0.3
    loss, _ = policy.train()(shown)
    loss.backward()


def test_environments_predict_at_different_times_while_the_robot_moves(make_acting):
    """Each command is that of the observation from which its chunk was predicted."""
    policy, pre, post = make_acting(n_action_steps=3)
    batch, chunks, predicted, plans = observation(make_batch(rows=2)), [None, None], [0, 0], [Plan(), Plan()]
    for t in range(5):
        if t == 2:
            plans[1], predicted[1] = Plan(), 2
        inputs = pre(seen(batch, t))
        command = post(policy.act(policy.examples.check(inputs), plans))
        for row in range(2):
            if (t - predicted[row]) % 3 == 0:
                predicted[row], chunks[row] = t, post(policy.predict_action_chunk(inputs))[row]
            close(command[row], chunks[row][t - predicted[row]])


def test_averaged_chunks_are_of_commands(make_acting):
    policy, pre, post = make_acting(n_action_steps=1, ensemble_size=3)
    batch, chunks = observation(make_batch(rows=1)), []
    for t in range(4):
        inputs = pre(seen(batch, t))
        command = post(policy.select_action(inputs))
        chunks = [post(policy.predict_action_chunk(inputs))[0], *chunks][:3]
        weights = [1.0, 0.5, 0.5][: len(chunks)]
        actions = [
            weight * chunk[age] for age, (weight, chunk) in enumerate(zip(weights, chunks, strict=True))
        ]
        close(command[0], sum(actions) / sum(weights))


def test_a_robot_that_stands_gets_whole_integers(make_acting):
    policy, pre, _ = make_acting()
    inputs = pre(seen(observation(make_batch(rows=2)), 0))
    chunk = policy.predict_action_chunk(inputs)
    assert torch.equal(torch.stack([policy.select_action(inputs) for _ in range(4)], 1), chunk)


@pytest.mark.parametrize("delay", [0, 2])
def test_real_time_chunking_continues_what_lerobot_re_anchors(delay, make_acting):
    policy, pre, post = make_acting()
    _, _, _, relative_step, normalizer, _ = pre.steps
    first = pre(seen(observation(make_batch(rows=1)), 0))
    commands = post(policy.predict_action_chunk(first))[0, 1:]  # three are left
    now = observation(make_batch(rows=1, seed=1))
    now[STATE] = first[STATE] + torch.linspace(-0.1, 0.1, 8)
    inputs = pre(now)
    anchored = reanchor_relative_rtc_prefix(commands, now[STATE], relative_step, normalizer, "cpu")
    left_over = torch.cat([anchored, torch.zeros(1, 7)])  # LeRobot fills up to its horizon
    read = rtc.read_left_over(policy.examples.check(inputs), policy.config, delay, left_over)
    assert [len(row) for row in read.integers] == [3 * 7] and read.counts == [delay * 7]
    chunk = post(policy.predict_action_chunk(inputs, inference_delay=delay, prev_chunk_left_over=left_over))
    low, high = (STATS["action"][name] for name in ("min", "max"))
    room = (commands - (now[STATE][0, :7] * mask())).clamp(low, high) + now[STATE][0, :7] * mask()
    assert ((chunk[0, :delay] - room[:delay]).abs() <= (high - low) / 2000 + 1e-4).all()
    assert (room == commands).float().mean() > 0.5


# ------------------------------------------------------------------------------------------------ data sets


@pytest.fixture(scope="module")
def arm(tmp_path_factory):
    """Three episodes of ten frames, whose actions are near the states. Names as in LeRobot's older data."""
    root = tmp_path_factory.mktemp("arm") / "data"
    camera = {"dtype": "image", "shape": (64, 64, 3), "names": ["height", "width", "channel"]}
    names = {"motors": NAMES}
    features = {
        "observation.images.image": camera,
        STATE: {"dtype": "float32", "shape": (7,), "names": names},
        "action": {"dtype": "float32", "shape": (7,), "names": names},
    }
    dataset = LeRobotDataset.create("local/arm", fps=10, features=features, root=root, use_videos=False)
    rng = np.random.default_rng(0)
    for _ in range(3):
        state = rng.uniform(-100, 100, 7)
        for _ in range(10):
            action = state + rng.uniform(-1, 1, 7)
            frame = {STATE: state.astype(np.float32), "action": action.astype(np.float32)}
            frame["observation.images.image"] = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            dataset.add_frame(frame | {"task": "wave"})
            state = action
        dataset.save_episode()
    dataset.finalize()
    return root


def arm_data(root) -> LeRobotDataset:
    return LeRobotDataset("local/arm", root=root, delta_timestamps={"action": [i / 10 for i in range(8)]})


def unfilled(vlm, **overrides):
    return make_config(vlm, use_relative_actions=True, input_features={}, output_features={}, **overrides)


def test_statistics_are_lerobots(arm, tiny_vlm, tmp_path):
    dataset = arm_data(arm)
    policy = make_policy(unfilled(tiny_vlm), ds_meta=dataset.meta)
    assert policy.config.action_feature_names == NAMES
    copy = shutil.copytree(arm, tmp_path / "data")
    info = json.loads((copy / "meta/info.json").read_text())
    info["features"]["action"]["names"] = NAMES  # LeRobot's helper cannot read groups
    (copy / "meta/info.json").write_text(json.dumps(info))
    expected = recompute_stats(arm_data(copy), relative_action=True, chunk_size=8).meta.stats
    for name, values in expected["action"].items():
        np.testing.assert_array_equal(dataset.meta.stats["action"][name], values)
    assert (dataset.meta.stats["action"]["max"] < 10)[:6].all() and dataset.meta.stats["action"]["std"][
        6
    ] > 10
    batch = lerobot_collate_fn([dataset[i] for i in (0, 12)])
    pre, post = make_pre_post_processors(policy.config, dataset_stats=dataset.meta.stats)
    shown = pre(dict(batch))
    assert shown["action_clipped"].sum() == 0
    torch.testing.assert_close(post(shown["action"]), batch["action"], rtol=0, atol=0.15)


@pytest.mark.parametrize("data", ["streamed", "no state", "short"])
def test_data_that_cannot_be_relative(data, arm, tmp_path):
    root, config = shutil.copytree(arm, tmp_path / "data"), relative_config("vlm")
    config.input_features[STATE] = PolicyFeature(FeatureType.STATE, (7,))
    if data == "streamed":
        shutil.rmtree(root / "data")
        message = "reads action and observation.state .*Download the data set"
    elif data == "no state":
        (file,) = (root / "data").glob("*/*.parquet")
        pq.write_table(pq.read_table(file).drop_columns([STATE]), file)
        message = "reads action and observation.state of the frames on disk"
    else:
        config.chunk_size, message = 11, "no episode has the 11 frames of a chunk .*Lower chunk_size"
    with pytest.raises(ValueError, match=message):
        prepare_data(config, LeRobotDatasetMetadata("local/arm", root=root))


def test_a_name_that_excludes_nothing(arm, caplog):
    config = relative_config("vlm", relative_exclude_joints=["hand"])
    prepare_data(config, arm_data(arm).meta)
    assert "relative_exclude_joints=['hand'] excludes none" in caplog.text
    assert config.relative_exclude_joints == []


# ---------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def trained(arm, tiny_vlm, tmp_path_factory):
    dataset = arm_data(arm)
    policy = make_policy(unfilled(tiny_vlm, n_action_steps=4), ds_meta=dataset.meta).eval()
    randomise(policy)
    out = tmp_path_factory.mktemp("relative") / "checkpoint"
    for part in (policy, *make_pre_post_processors(policy.config, dataset_stats=dataset.meta.stats)):
        part.save_pretrained(out)
    return out


def test_an_agent_moves_from_where_the_robot_is(trained):
    agent = Agent.from_pretrained(trained, device="cpu")
    pixels = {"image": np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)}
    joints = np.linspace(-30, 30, 7)
    there = agent.act({"pixels": pixels, "agent_pos": joints}, "wave")
    queued = agent.act({"pixels": pixels, "agent_pos": joints + 5}, "wave")
    agent.reset()
    still = [agent.act({"pixels": pixels, "agent_pos": joints}, "wave") for _ in range(2)]
    np.testing.assert_allclose([there, queued], still, atol=1e-4)
    agent.reset()
    moved = agent.act({"pixels": pixels, "agent_pos": joints + 5}, "wave")
    np.testing.assert_allclose(moved - there, [5.0] * 6 + [0], atol=1e-4)
    with pytest.raises(ValueError, match="the observation needs 'agent_pos'"):
        agent.act({"pixels": pixels}, "wave")


@pytest.mark.parametrize(
    ("override", "value"), [("use_relative_actions", False), ("relative_exclude_joints", ["joint_0"])]
)
def test_a_checkpoint_keeps_what_its_integers_mean(override, value, trained):
    config = PreTrainedConfig.from_pretrained(trained)
    setattr(config, override, value)
    with pytest.raises(ValueError, match=f"{override}=.* differs from the checkpoint's"):
        VLA0Policy.from_pretrained(trained, config=config)
