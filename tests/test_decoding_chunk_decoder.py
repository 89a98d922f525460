import copy
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from conftest import make_batch, make_config, observation, randomise

from lerobot_vla0.decoding.chunk_decoder import DRAFTS
from lerobot_vla0.modeling_vla0 import VLA0Policy


@pytest.fixture
def seen(policy, processors):
    return policy.examples.check(observation(processors[0](make_batch(rows=2))))


def chunk_of(policy, seen, steps: int = 8) -> torch.Tensor:
    decoder = policy.decoder
    return torch.stack(list(decoder.decode_chunk(seen, steps, decoder.new_episodes(len(seen)))), dim=1)


def test_fewer_steps_are_the_beginning_of_the_chunk(policy, seen):
    chunk = chunk_of(policy, seen)
    assert chunk.shape == (2, 8, 7)
    assert torch.equal(chunk_of(policy, seen, steps=3), chunk[:, :3])


@pytest.mark.parametrize("change", ["load", "train", "dtype"])
def test_what_was_computed_from_the_weights_goes_when_they_change(change, policy, seen, tiny_vlm):
    """Keys and values of the words before the first picture are computed once; other weights need others."""
    chunk_of(policy, seen)
    assert policy.decoder._kept.prefix is not None
    if change == "load":
        other = VLA0Policy(make_config(tiny_vlm)).eval()
        randomise(other)
        policy.load_state_dict(other.state_dict())
    elif change == "train":
        policy.train()
        randomise(policy)
        policy.eval()
        other = policy
    else:
        policy.double()
        other = policy
    assert policy.decoder._kept.prefix is None
    assert torch.equal(chunk_of(policy, seen), chunk_of(other, seen))
    assert policy.decoder._kept.prefix is not None


def test_a_copy_has_a_decoder_of_its_own(policy, seen):
    chunk = chunk_of(policy, seen)
    other = copy.deepcopy(policy)
    assert other.decoder is not policy.decoder and other.decoder.model is other.model
    other.train()
    randomise(other)
    other.eval()
    assert policy.decoder._kept.prefix is not None and other.decoder._kept.prefix is None
    other.load_state_dict(other.state_dict())
    assert policy.decoder._kept.prefix is not None
    assert not torch.equal(chunk_of(other, seen), chunk) and torch.equal(chunk_of(policy, seen), chunk)


@pytest.mark.parametrize(("rows", "length"), [(1, 31), (2, 31), (16, 4), (1000, 1)])
def test_drafts_are_shorter_the_more_rows_there_are(rows, length, policy):
    assert DRAFTS["cpu"][:2] == (31, 64)
    assert policy.decoder.make_drafter(rows).length == length


def test_draft_length_is_honoured(tiny_vlm):
    policy = VLA0Policy(make_config(tiny_vlm, draft_length=5))
    drafter = policy.decoder.make_drafter(rows=100)
    assert drafter.length == 5 and drafter.worth == 0.0


# ---------------------------------------------------------------------------------------------------- threads


@contextmanager
def paused(policy, call):
    """Runs `call` in another thread and stops it in the middle of its first pass of the language model, while
    the block runs; gives its future."""
    inside, resume = threading.Event(), threading.Event()

    def stop(*_):
        if threading.current_thread() is not threading.main_thread() and not inside.is_set():
            inside.set()
            assert resume.wait(60)

    hook = policy.model.model.language_model.layers[1].register_forward_pre_hook(stop)
    with ThreadPoolExecutor() as pool:
        future = pool.submit(call)
        try:
            while not inside.wait(0.1):
                assert not future.done(), future.result()
            yield future
        finally:
            resume.set()
            hook.remove()


def training_step(policy, batch) -> list[torch.Tensor]:
    """Loss and gradients, augmented as always."""
    random.seed(0)
    loss, _ = policy(batch)
    loss.backward()
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    policy.zero_grad()
    return [loss, *gradients]


ACTS = ["select_action", "predict_action_chunk", "stream_action_chunk"]


def act(policy, way: str, batch) -> torch.Tensor:
    actions = getattr(policy, way)(batch)
    return torch.stack(list(actions), dim=1) if way == "stream_action_chunk" else actions


@pytest.mark.parametrize("way", ACTS)
@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True, "attn_implementation": "eager"}])
def test_training_beside_acting(way, settings, tiny_vlm, processors):
    policy = VLA0Policy(make_config(tiny_vlm, **settings))
    batch = processors[0](make_batch(rows=2))
    expected = act(policy.eval(), way, observation(batch))
    policy.reset()
    alone = training_step(policy.train(), batch)
    with paused(policy, lambda: act(policy, way, observation(batch))) as acting:
        beside = training_step(policy, batch)
    after = training_step(policy, batch)
    assert torch.equal(acting.result(), expected)
    for tensors in zip(alone, beside, after, strict=True):
        assert all(torch.equal(tensor, tensors[0]) for tensor in tensors)


@pytest.mark.parametrize("way", ACTS)
@pytest.mark.parametrize("policies", [1, 2])
@pytest.mark.parametrize("before", [False, True])  # something was remembered and computed before
def test_acting_beside_acting(way, policies, before, tiny_vlm, processors):
    first = VLA0Policy(make_config(tiny_vlm)).eval()
    second = VLA0Policy(make_config(tiny_vlm)).eval() if policies == 2 else first
    batches = [observation(processors[0](make_batch(rows=2, seed=seed))) for seed in range(2)]
    expected = [act(p, "predict_action_chunk", b) for p, b in zip((first, second), batches, strict=True)]
    if not before:
        first.decoder.release()
        second.decoder.release()
    first.reset()
    second.reset()
    if way == "select_action" and policies == 1:  # the second call gets the second action of the first's plan
        with paused(first, lambda: first.select_action(batches[0])) as acting:
            other = threading.Thread(target=lambda: results.append(first.select_action(batches[1])))
            results = []
            other.start()
            other.join(0.3)  # it waits for the first
        other.join()
        results.insert(0, acting.result())
        assert torch.equal(torch.stack(results, 1), expected[0][:, :2])
        assert [len(episode.actions) for episode in first._action_queue] == [6, 6]
        return
    with paused(first, lambda: act(first, way, batches[0])) as acting:
        result = act(second, way, batches[1])
    for actions, chunk in zip((acting.result(), result), expected, strict=True):
        assert torch.equal(actions, chunk[:, 0] if way == "select_action" else chunk)


def test_many_threads(policy, processors):
    batches = [observation(processors[0](make_batch(rows=1 + seed % 2, seed=seed))) for seed in range(4)]
    expected = [policy.predict_action_chunk(batch) for batch in batches]
    policy.decoder.release()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(policy.predict_action_chunk, batches * 2))
    assert all(torch.equal(*pair) for pair in zip(results, expected * 2, strict=True))


@pytest.mark.parametrize("when", ["in training", "before training"])
def test_nothing_is_kept_of_weights_that_are_trained(when, policy, processors, tiny_vlm):
    batch = observation(processors[0](make_batch(rows=1)))
    if when == "in training":
        policy.train().predict_action_chunk(batch)
        randomise(policy)
    else:  # acting began before training did, and ends after it
        with paused(policy, lambda: policy.predict_action_chunk(batch)):
            policy.train()
            randomise(policy)
            policy.eval()
    other = VLA0Policy(make_config(tiny_vlm)).eval()
    randomise(other)
    assert torch.equal(policy.predict_action_chunk(batch), other.predict_action_chunk(batch))


def test_reset_beside_acting(policy, processors):
    """An episode that begins meanwhile does not execute the plan of the old one."""
    first, second = (observation(processors[0](make_batch(rows=2, seed=seed))) for seed in range(2))
    expected = policy.predict_action_chunk(second)
    policy.reset()
    with paused(policy, lambda: policy.select_action(first)):
        resetting = threading.Thread(target=policy.reset)
        resetting.start()
    resetting.join()
    assert torch.equal(policy.select_action(second), expected[:, 0])
