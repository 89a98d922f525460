import logging

import pytest
import torch
from conftest import make_batch, make_config, observation, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoding_engine import MockModel, make_grammar, plain_greedy, tokens_of

from lerobot_vla0.decoding import rtc
from lerobot_vla0.decoding.drafting import Drafter
from lerobot_vla0.decoding.engine import decode
from lerobot_vla0.decoding.grammar import PartialAnswer
from lerobot_vla0.modeling_vla0 import VLA0Policy
from lerobot_vla0.task_stats import to_data_set_bins


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    maximum=st.sampled_from([1, 9, 100, 1000]),
    needed=st.integers(1, 6),
    length=st.integers(0, 20),
    data=st.data(),
)
def test_a_prefix_is_continued_as_one_token_at_a_time(seed, maximum, needed, length, data):
    """Whatever the prefixes, however they differ between the rows, with and without drafts."""
    grammar, dim = make_grammar(6, maximum), 2
    integers = st.integers(0, maximum)
    left = data.draw(st.lists(st.lists(integers, max_size=6), min_size=1, max_size=3))
    prefixes = [row[: data.draw(st.integers(0, min(len(row), needed)))] for row in left]
    drafters = [Drafter(grammar, dim, length) for _ in left]
    for drafter, row in zip(drafters, left, strict=True):
        drafter.expect(row)
    model = MockModel(len(left), seed)
    drafted = decode(model, grammar, len(left), count=needed, drafters=drafters, prefixes=prefixes)
    plain = decode(MockModel(len(left), seed), grammar, len(left), count=needed, prefixes=prefixes)
    assert drafted.passes == model.calls <= plain.passes
    for index, (row, prefix) in enumerate(zip(drafted.rows, prefixes, strict=True)):
        assert row.answer.integers[:needed] == plain.rows[index].answer.integers[:needed]
        begin, answer = [], PartialAnswer()
        for integer in prefix:
            symbols = grammar.spell(integer, answer)
            grammar.append(answer, *symbols)
            begin += tokens_of(grammar, symbols)
        expected = plain_greedy(MockModel(len(left), seed), index, grammar, begin)
        written = tokens_of(grammar, row.symbols)
        assert written == expected[: len(written)] and len(row.answer.integers) >= needed


@pytest.fixture
def acting(tiny_vlm, processors):
    policy = VLA0Policy(make_config(tiny_vlm)).eval()
    randomise(policy)
    return policy, observation(processors[0](make_batch(rows=2)))


def test_the_chunk_begins_with_what_is_committed_and_goes_on_as_decoded(acting, tiny_vlm):
    policy, batch = acting
    chunk = policy.predict_action_chunk(batch)
    left = (1000 - chunk)[:, 2:]  # 6 timesteps that the policy would not write
    given_all = policy.predict_action_chunk(batch, inference_delay=3, prev_chunk_left_over=left)
    assert given_all.shape == chunk.shape
    assert torch.equal(given_all[:, :3], left[:, :3])
    assert not torch.equal(given_all[:, 3:6], left[:, 3:]) and not torch.equal(given_all[:, 3:], chunk[:, 3:])
    # The definition: no draft, one token a pass; and each row by itself.
    plain = VLA0Policy(make_config(tiny_vlm, draft_length=0)).eval()
    plain.load_state_dict(policy.state_dict())
    assert torch.equal(
        plain.predict_action_chunk(batch, inference_delay=3, prev_chunk_left_over=left), given_all
    )
    alone = observation(batch, slice(1, 2))
    chunk = policy.predict_action_chunk(alone, inference_delay=3, prev_chunk_left_over=left[1])
    assert torch.equal(chunk[0], given_all[1])


def test_what_is_not_committed_is_a_draft_only(acting):
    policy, batch = acting
    chunk = policy.predict_action_chunk(batch)
    for left in (chunk, 1000 - chunk):
        assert torch.equal(
            policy.predict_action_chunk(batch, inference_delay=0, prev_chunk_left_over=left), chunk
        )
    assert torch.equal(
        policy.predict_action_chunk(batch, inference_delay=2, prev_chunk_left_over=None), chunk
    )


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


def test_fractions_are_rounded_and_values_outside_clipped(acting, caplog):
    policy, batch = acting
    rtc._warn_once.cache_clear()  # whatever has been warned of before
    left = torch.full((2, 4, 7), 400.4)
    left[1] = 1200.0
    with caplog.at_level(logging.WARNING):
        chunk = policy.predict_action_chunk(batch, inference_delay=4, prev_chunk_left_over=left)
    assert (chunk[0, :4] == 400).all() and (chunk[1, :4] == 1000).all()
    assert "outside 0..1000" in caplog.text


def test_ranges_of_tasks_are_undone(acting):
    policy, batch = acting
    seen = policy.examples.check(batch)
    seen.task_range = torch.stack(
        [torch.tensor([[-0.5] * 7, [0.25] * 7]), torch.tensor([[0.1] * 7, [0.1] * 7])]
    )
    integers = torch.tensor([[float(i) for i in range(0, 700, 100)], [500.0] * 7])
    left = torch.stack([to_data_set_bins(integers, seen.task_range, 1000)] * 3, dim=1)  # (2, 3, 7)
    found = rtc.read_left_over(seen, policy.config, inference_delay=2, prev_chunk_left_over=left)
    assert found.integers == [integers[0].long().tolist() * 3, integers[1].long().tolist() * 3]
    assert found.committed == [14, 14] and found.prefixes(56)[0] == integers[0].long().tolist() * 2


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
        (8, torch.ones(3, 7), "--fps"),
        (4, torch.ones(8, 7), None),
    ],
)
def test_a_robot_that_would_wait_or_jump_is_warned_of_once(delay, left, named, acting, caplog):
    policy, batch = acting
    rtc._warn_once.cache_clear()
    seen = policy.examples.check(observation(batch, slice(1)))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            rtc.read_left_over(seen, policy.config, inference_delay=delay, prev_chunk_left_over=left)
    assert (named in caplog.text) if named else not caplog.text
    assert len(set(caplog.messages)) == len(caplog.messages)


@pytest.mark.parametrize(
    ("settings", "delay", "left", "named"),
    [
        ({}, -1, None, "inference_delay=-1"),
        ({}, 1.5, None, "inference_delay=1.5"),
        ({}, 1, torch.ones(4, 6), r"\(4, 6\).*\(T, 7\)"),
        ({}, 1, torch.ones(3, 4, 7), r"\(3, 4, 7\).*\(2, T, 7\)"),
        ({}, 1, torch.ones(7), r"\(7,\)"),
        ({}, 1, torch.full((2, 4, 7), float("nan")), "NaN or inf"),
        ({"ensemble_size": 2, "n_action_steps": 1}, 0, None, "ensemble_size=2"),
    ],
)
def test_what_cannot_be_continued_is_refused(settings, delay, left, named, acting):
    policy, batch = acting
    for name, value in settings.items():
        setattr(policy.config, name, value)
    with pytest.raises(ValueError, match=named):
        policy.predict_action_chunk(batch, inference_delay=delay, prev_chunk_left_over=left)


def test_lerobot_finds_that_it_is_supported(acting):
    from lerobot.rollout.inference.rtc import supports_rtc_inference

    assert supports_rtc_inference(acting[0])


def test_lerobot_finds_that_averaged_chunks_cannot_be_continued(acting, caplog):
    """Before it connects the robot; it then proposes --inference.type=sync."""
    from lerobot.rollout.inference.rtc import supports_rtc_inference

    policy, _ = acting
    policy.config.ensemble_size = 8
    with caplog.at_level(logging.WARNING):
        assert not supports_rtc_inference(policy)
    assert "ensemble_size=8 averages chunks" in caplog.text and "--policy.ensemble_size=1" in caplog.text
