import pytest
import torch
from conftest import observation, randomise
from torch import nn

from lerobot_vla0 import backbone
from lerobot_vla0.decoding.prepack import can_prepack, prepack
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
        assert prepack(model) == 2
        assert torch.equal(model(inputs), expected)
        model[0].weight.zero_()  # proves that copies are used
        assert torch.equal(model(inputs), expected)


@needs_bf16
def test_policy_writes_the_same_and_notices_new_weights(learnt, monkeypatch):
    folder, batch = learnt
    policy = VLA0Policy.from_pretrained(folder)
    policy.model.to(torch.bfloat16)
    actions = policy.predict_action_chunk(observation(batch))
    assert "forward" in vars(backbone.language_model(policy.decoder._kept.model).layers[0].mlp.up_proj)
    assert not any("forward" in vars(module) for module in policy.modules())
    other = VLA0Policy.from_pretrained(folder)
    randomise(other)
    other.model.to(torch.bfloat16)
    plain = VLA0Policy.from_pretrained(folder)
    plain.model.to(torch.bfloat16)
    monkeypatch.setattr("lerobot_vla0.decoding.chunk_decoder.can_prepack", lambda model: False)
    assert torch.equal(plain.predict_action_chunk(observation(batch)), actions)
    assert not any("forward" in vars(module) for module in plain.decoder._kept.model.modules())
    expected = other.predict_action_chunk(observation(batch))
    assert not torch.equal(expected, actions)
    monkeypatch.undo()
    policy.load_state_dict(other.state_dict())  # in place, and without train()
    assert torch.equal(policy.predict_action_chunk(observation(batch)), expected)
    policy.train()
    assert policy.decoder._kept.model is None
