import copy

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
    assert policy.decoder._prefix is not None
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
    assert policy.decoder._prefix is None
    assert torch.equal(chunk_of(policy, seen), chunk_of(other, seen))
    assert policy.decoder._prefix is not None


def test_a_copy_has_a_decoder_of_its_own(policy, seen):
    chunk = chunk_of(policy, seen)
    other = copy.deepcopy(policy)
    assert other.decoder is not policy.decoder and other.decoder.model is other.model
    other.train()
    randomise(other)
    other.eval()
    assert policy.decoder._prefix is not None and other.decoder._prefix is None
    other.load_state_dict(other.state_dict())
    assert policy.decoder._prefix is not None
    assert not torch.equal(chunk_of(other, seen), chunk) and torch.equal(chunk_of(policy, seen), chunk)


@pytest.mark.parametrize(("rows", "length"), [(1, 31), (2, 31), (16, 4), (1000, 1)])
def test_drafts_are_shorter_the_more_rows_there_are(rows, length, policy):
    assert DRAFTS["cpu"][:2] == (31, 64)
    assert policy.decoder.make_drafter(rows).length == length


def test_draft_length_is_honoured(tiny_vlm):
    policy = VLA0Policy(make_config(tiny_vlm, draft_length=5))
    drafter = policy.decoder.make_drafter(rows=100)
    assert drafter.length == 5 and drafter.worth == 0.0
