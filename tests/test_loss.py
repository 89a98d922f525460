import pytest
import torch

from lerobot_vla0 import loss
from lerobot_vla0.loss import LinearCrossEntropy, integer_error


@pytest.fixture
def example():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 16, generator=generator)
    weight = torch.randn(151, 16, generator=generator)
    return hidden, weight, torch.randint(151, (37,), generator=generator)


@pytest.mark.parametrize("chunk", [1, 10, 37, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_pytorchs_cross_entropy_and_its_gradients(example, chunk, dtype, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    hidden, weight, targets = example
    choices = torch.tensor([5, 99, 3])
    weights = torch.linspace(0, 1, 37)  # every position counts differently
    results = []
    for ours in (True, False):
        h, w = (t.to(dtype).requires_grad_() for t in (hidden, weight))
        if ours:
            losses, predicted, chosen = LinearCrossEntropy.apply(h, w, targets, choices)
            assert not predicted.requires_grad and not chosen.requires_grad
        else:
            logits = (h @ w.T).float()
            losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            assert torch.equal(predicted, logits.argmax(-1))
            assert torch.equal(chosen, logits[:, choices].argmax(-1))
        (losses * weights).sum().backward()
        results.append((losses.detach(), h.grad.float(), w.grad.float()))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.03}
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_saves_no_logits_and_computes_no_gradient_of_a_frozen_head(example):
    hidden, weight, targets = example
    hidden, sizes = hidden.clone().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        losses, *_ = LinearCrossEntropy.apply(hidden, weight, targets, torch.tensor([0]))
    losses.mean().backward()
    assert hidden.grad is not None and weight.grad is None
    assert sizes and max(sizes) < len(hidden) * len(weight)


def test_no_position():
    """A batch whose timesteps are all padding."""
    hidden, targets = torch.zeros(0, 4, requires_grad=True), torch.zeros(0, dtype=torch.long)
    losses, *_ = LinearCrossEntropy.apply(hidden, torch.ones(9, 4), targets, torch.arange(2))
    losses.sum().backward()
    assert losses.shape == (0,) and hidden.grad.shape == (0, 4)


def test_integer_error():
    """Digits off by known amounts; an integer with a masked digit does not count."""
    supervised = torch.tensor([[True, True, True, True, True, True, False, True]])
    places = torch.tensor([[100, 10, 1, 0, 1, 0, 10, 1]])
    # 407 predicted as 309, 9 as 9, a masked digit and 2 as 0; at a space any.
    digits = torch.tensor([3 - 4, 0, 9 - 7, 5, 0, 1, 0 - 2])
    assert integer_error(digits, supervised, places) == pytest.approx((98 + 0) / 2)
    assert integer_error(digits[:0], torch.zeros_like(supervised), places) == 0.0
