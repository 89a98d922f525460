"""Real-time chunking without a robot; with one: test_rollout.py."""

import logging

import pytest
import torch
from conftest import make_batch, make_config, observation, randomise
from lerobot.rollout.inference.rtc import supports_rtc_inference

from lerobot_vla0.dataset import to_data_set_bins
from lerobot_vla0.decoding import decoder, rtc
from lerobot_vla0.modeling_vla0 import VLA0Policy


@pytest.fixture
def acting(tiny_vlm, processors):
    policy = VLA0Policy(make_config(tiny_vlm)).eval()
    randomise(policy)
    return policy, observation(processors[0](make_batch(rows=2)))


def test_the_chunk_begins_with_what_is_committed_and_goes_on_as_decoded(acting, monkeypatch):
    policy, batch = acting
    chunk = policy.predict_action_chunk(batch)
    left = (1000 - chunk)[:, 2:]  # 6 timesteps that the policy would not write
    continued = policy.predict_action_chunk(batch, inference_delay=3, prev_chunk_left_over=left)
    assert continued.shape == chunk.shape
    assert torch.equal(continued[:, :3], left[:, :3])
    assert not torch.equal(continued[:, 3:6], left[:, 3:])
    assert not torch.equal(continued[:, 3:], chunk[:, 3:])
    # Each row by itself, and without drafts.
    monkeypatch.setattr(decoder, "DRAFTS", {"cpu": (0, 64, 0.0)})
    alone = observation(batch, slice(1, 2))
    chunk = policy.predict_action_chunk(alone, inference_delay=3, prev_chunk_left_over=left[1])
    assert torch.equal(chunk[0], continued[1])


def test_what_is_not_committed_is_a_draft_only(acting):
    policy, batch = acting
    chunk = policy.predict_action_chunk(batch)
    for delay, left in ((0, chunk), (0, 1000 - chunk), (2, None)):
        again = policy.predict_action_chunk(batch, inference_delay=delay, prev_chunk_left_over=left)
        assert torch.equal(again, chunk)


def test_rows_of_zeros_at_the_end_are_not_actions(acting):
    """LeRobot fills up with zeros; a zero between other numbers is an action."""
    policy, batch = acting
    left = torch.zeros(2, 5, 7)
    left[0, :2], left[1, :3] = 400.0, 600.0
    left[1, 1] = 0
    chunk = policy.predict_action_chunk(batch, inference_delay=4, prev_chunk_left_over=left)
    shorter = policy.predict_action_chunk(
        observation(batch, slice(1)), inference_delay=4, prev_chunk_left_over=left[0, :2]
    )
    assert torch.equal(chunk[0, :2], left[0, :2]) and torch.equal(chunk[:1], shorter)
    assert torch.equal(chunk[1, :3], left[1, :3])
    nothing = policy.predict_action_chunk(batch, inference_delay=4, prev_chunk_left_over=torch.zeros(2, 5, 7))
    assert torch.equal(nothing, policy.predict_action_chunk(batch))


def test_fractions_are_rounded_and_values_outside_clipped(acting):
    policy, batch = acting
    left = torch.full((2, 4, 7), 400.4)
    left[1] = 1200.0
    chunk = policy.predict_action_chunk(batch, inference_delay=4, prev_chunk_left_over=left)
    assert (chunk[0, :4] == 400).all() and (chunk[1, :4] == 1000).all()


def test_ranges_of_tasks_are_undone(acting):
    policy, batch = acting
    observed = policy.examples.check(batch)
    observed.task_range = torch.stack(
        [torch.tensor([[-0.5] * 7, [0.25] * 7]), torch.tensor([[0.1] * 7, [0.1] * 7])]
    )
    integers = torch.tensor([[float(i) for i in range(0, 700, 100)], [500.0] * 7])
    left = to_data_set_bins(integers[:, None].expand(-1, 3, -1), observed.task_range, 1000)
    committed = rtc.read_left_over(observed, policy.config, inference_delay=2, prev_chunk_left_over=left)
    assert committed.integers == [integers[0].long().tolist() * 3, integers[1].long().tolist() * 3]
    assert committed.counts == [14, 14] and committed.prefixes(56)[0] == integers[0].long().tolist() * 2


def test_all_of_the_chunk_may_be_committed(acting):
    policy, batch = acting
    left = torch.arange(1.0, 57).reshape(8, 7).expand(2, -1, -1)
    for delay in (8, 100):
        chunk = policy.predict_action_chunk(batch, inference_delay=delay, prev_chunk_left_over=left)
        assert torch.equal(chunk, left)


@pytest.mark.parametrize(
    ("delay", "left", "named"),
    [
        (5, None, "chunk_size=10"),
        (4, torch.ones(3, 7), "execution_horizon=8"),
        (4, torch.ones(8, 7), None),
    ],
)
def test_warns_once_of_a_robot_that_would_wait_or_jump(delay, left, named, acting, caplog):
    policy, batch = acting
    rtc._warn_once.cache_clear()
    observed = policy.examples.check(observation(batch, slice(1)))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            rtc.read_left_over(observed, policy.config, inference_delay=delay, prev_chunk_left_over=left)
    assert [named in message for message in caplog.messages] == ([True] if named else [])


@pytest.mark.parametrize("left", [torch.ones(4, 6), torch.ones(3, 4, 7), torch.full((2, 4, 7), torch.nan)])
def test_actions_of_another_shape_or_not_finite_are_refused(left, acting):
    policy, batch = acting
    with pytest.raises(ValueError, match="prev_chunk_left_over must be finite, of shape"):
        policy.predict_action_chunk(batch, inference_delay=1, prev_chunk_left_over=left)


def test_lerobot_asks_whether_it_is_supported(acting, caplog):
    """Before it connects the robot."""
    policy, _ = acting
    assert supports_rtc_inference(policy)
    policy.config.ensemble_size = 8
    with caplog.at_level(logging.WARNING):
        assert not supports_rtc_inference(policy)
    assert "ensemble_size=8 averages chunks" in caplog.text and "--policy.ensemble_size=1" in caplog.text
