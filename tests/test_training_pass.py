"""Sharing the system prompt in training: the same losses and gradients from fewer tokens."""

import pytest
import torch
from conftest import make_batch, make_config, randomise

from lerobot_vla0 import modeling_vla0, vlm
from lerobot_vla0.modeling_vla0 import VLA0Policy


def make_policy(folder, **overrides) -> VLA0Policy:
    policy = VLA0Policy(make_config(folder, 80, chunk_size=4, n_action_steps=4, **overrides))
    randomise(policy)
    return policy.train()


def step(policy, monkeypatch, share: bool):
    """(losses, gradients, tokens that the language model got) of one batch."""
    batch = make_batch(3, 80, chunk_size=4)
    batch["action"] = ((batch["action"] + 1) * 500).round().long()
    examples = policy.examples.training_examples(batch, torch.Generator().manual_seed(0))
    tokens, layer = [], vlm.language_model(policy.model).layers[0]
    counter = layer.register_forward_pre_hook(lambda _, args: tokens.append(args[0][..., 0].numel()))
    policy.zero_grad()
    with monkeypatch.context() as context:
        if not share:
            context.setattr(modeling_vla0, "can_share_words", lambda model, config: False)
        losses, _ = policy.example_loss(*examples, reduction="none")
    losses.sum().backward()
    counter.remove()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    return losses.detach(), gradients, sum(tokens)


def test_same_losses_and_gradients_with_fewer_tokens(tiny_vlm, monkeypatch):
    policy = make_policy(tiny_vlm)
    (losses, gradients, tokens), shared = (step(policy, monkeypatch, share) for share in (False, True))
    torch.testing.assert_close(shared[0], losses, rtol=1e-5, atol=0)
    assert shared[1].keys() == gradients.keys() and shared[2] == tokens - 2 * policy.examples.chat.num_shared
    rounding = 1e-7 * max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        atol = 1e-4 * gradient.abs().max().item() + rounding
        torch.testing.assert_close(shared[1][name], gradient, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("setting", ["gradient_checkpointing", "compile_model"])
def test_not_shared(setting, tiny_vlm):
    policy = make_policy(tiny_vlm, **{setting: True})
    assert not modeling_vla0.can_share_words(policy.model, policy.config)
