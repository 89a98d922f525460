import pytest
import torch
from conftest import observation, randomise
from torch import nn

from lerobot_vla0.decoding.prepack import Prepacked, can_prepack
from lerobot_vla0.modeling_vla0 import VLA0Policy


def linear(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 200, bias=False), nn.SiLU(), nn.Linear(200, 40)).to(dtype)


needs_bf16 = pytest.mark.skipif(not can_prepack(linear()), reason="this CPU has no bfloat16 instructions")


def test_not_for_other_types():
    assert not can_prepack(linear(torch.float32))


@needs_bf16
@pytest.mark.parametrize("shape", [(1, 1, 96), (1, 3, 96), (4, 16, 96), (1, 257, 96)])
def test_same_to_the_bit(shape):
    model = linear()
    inputs = torch.randn(shape).bfloat16()
    with torch.inference_mode():
        expected = model(inputs)
        prepacked = Prepacked(model)
        with prepacked.use():
            assert torch.equal(model(inputs), expected)
            model[0].weight.zero_()  # proves that copies are used
            assert torch.equal(model(inputs), expected)
        assert not torch.equal(model(inputs), expected)


@needs_bf16
def test_leaves_hooked_layers_and_no_trace():
    model = linear()
    model[0].forward = own = lambda inputs: inputs
    prepacked = Prepacked(model)
    assert [layer for layer, _ in prepacked.linears] == [model[2]]
    with pytest.raises(RuntimeError, match="mat1 and mat2"), prepacked.use():
        nn.functional.linear(torch.ones(2), torch.ones(3, 3))
    assert model[0].forward is own and "forward" not in vars(model[2])


@needs_bf16
def test_policy_writes_the_same_and_notices_new_weights(learnt, monkeypatch):
    folder, batch = learnt
    policy = VLA0Policy.from_pretrained(folder)
    policy.model.to(torch.bfloat16)
    actions = policy.predict_action_chunk(observation(batch))
    assert policy.decoder._prepacked is not None and len(policy.decoder._prepacked.linears) == 2 * 7
    other = VLA0Policy.from_pretrained(folder)
    randomise(other)
    other.model.to(torch.bfloat16)
    plain = VLA0Policy.from_pretrained(folder)
    plain.model.to(torch.bfloat16)
    monkeypatch.setattr("lerobot_vla0.decoding.chunk_decoder.can_prepack", lambda model: False)
    assert torch.equal(plain.predict_action_chunk(observation(batch)), actions)
    assert plain.decoder._prepacked is None
    expected = other.predict_action_chunk(observation(batch))
    assert not torch.equal(expected, actions)
    monkeypatch.undo()
    policy.load_state_dict(other.state_dict())  # in place, and without train()
    assert torch.equal(policy.predict_action_chunk(observation(batch)), expected)
    policy.train()
    assert policy.decoder._prepacked is None
