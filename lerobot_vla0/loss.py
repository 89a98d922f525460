"""The loss of answers: cross-entropy without the (positions × vocabulary) logits, and the error of predicted
integers.

With Qwen2.5-VL's 151,936 tokens, the logits in float32, their log-softmax and their gradient can take most of
a training step's memory. Here they exist for a few positions at a time, and are computed again in the
backward pass, as in Liger's fused linear cross-entropy (arXiv 2410.10989); in plain PyTorch, on any device.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .prompt import IGNORE

# Positions whose logits exist at the same time: 155 MB of float32 with 151,936 tokens. Large enough for an
# efficient matrix product.
CHUNK = 256


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, choices: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of the logits `hidden @ weight.T` in float32, as `torch.nn.functional.cross_entropy`.

    Args:
        hidden: (N, width), of supervised positions only.
        weight: (vocabulary, width), the head.
        targets: (N,) token ids.
        choices: (C,) token ids, of which the most likely one is returned, too.

    Returns:
        losses (N,) float32; predicted (N,), the most likely token; chosen (N,), the index in `choices` of the
        most likely of them. The last two carry no gradient.
    """
    return _LinearCrossEntropy.apply(hidden.to(weight.dtype), weight, targets, choices)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, choices: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        totals, predicted, chosen = torch.empty_like(losses), torch.empty_like(targets), targets.clone()
        for i in range(0, len(hidden), CHUNK):
            part = slice(i, i + CHUNK)
            logits = _logits(hidden[part], weight)
            totals[part] = logits.logsumexp(-1)
            losses[part] = totals[part] - logits.gather(1, targets[part, None])[:, 0]
            predicted[part] = logits.argmax(-1)
            chosen[part] = logits[:, choices].argmax(-1)
        ctx.save_for_backward(hidden, weight, targets, totals)
        ctx.mark_non_differentiable(predicted, chosen)
        return losses, predicted, chosen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, totals = ctx.saved_tensors
        # With adapters or a frozen head, only one of the two is needed.
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for i in range(0, len(hidden), CHUNK):
            part = slice(i, i + CHUNK)
            # d loss / d logits = softmax - one-hot
            delta = _logits(hidden[part], weight).sub_(totals[part, None]).exp_()
            rows = torch.arange(len(delta), device=delta.device)
            delta[rows, targets[part]] -= 1
            delta = delta.mul_(grad[part, None]).to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = delta @ weight
            if grad_weight is not None:
                grad_weight.addmm_(delta.T, hidden[part])
        return grad_hidden, grad_weight, None, None


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(hidden, weight).float()


def answer_loss(
    hidden: Tensor, head: Tensor, labels: Tensor, places: Tensor, digit_ids: Tensor, reduction: str = "mean"
) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the answers' tokens, and what is logged of the model's predictions.

    Args:
        hidden: (B, at most T, width), last hidden states, of the last positions.
        head: (vocabulary, width), weights of the language model's head.
        labels: (B, T) token ids, IGNORE where nothing is supervised.
        places: (B, T) place value of each digit, see `integer_error`.
        digit_ids: (10,) token ids of "0".."9".
        reduction: "mean" over all supervised tokens, or "none": (B,), the mean of each row.

    Returns:
        The loss, and `token_accuracy` and `action_error_bins`.
    """
    # The token at position t is predicted at t - 1; logits are computed for supervised positions only.
    predictions = hidden.shape[1] - 1
    labels, places = labels[:, -predictions:], places[:, -predictions:]
    supervised = labels != IGNORE
    targets = labels[supervised]  # (N,)
    losses, predicted, digits = linear_cross_entropy(hidden[:, :-1][supervised], head, targets, digit_ids)
    true = (targets[:, None] == digit_ids).float().argmax(-1)  # 0 where the target is no digit
    metrics = {
        "token_accuracy": (predicted == targets).float().mean().item(),
        "action_error_bins": integer_error(digits - true, supervised, places),
    }
    if reduction == "mean":
        return losses.mean(), metrics
    rows = supervised.nonzero()[:, 0]
    sums = losses.new_zeros(len(labels)).index_add(0, rows, losses)
    return sums / supervised.sum(1).clamp(min=1), metrics


@torch.no_grad()
def integer_error(digits: Tensor, supervised: Tensor, places: Tensor) -> float:
    """Mean distance between true and predicted integers, in bins, over integers whose digits are all
    supervised; 0 if there are none.

    Args:
        digits: (N,) predicted minus true digit at each supervised position.
        supervised: (B, T) bool, N of them true.
        places: (B, T) what each digit counts (1, 10, 100, ...); 0 where there is no digit.
    """
    # Each digit contributes its error times its place value to the integer it belongs to.
    error = torch.zeros(places.shape, device=places.device)
    error[supervised] = digits * places[supervised].float()
    # The same number on all digits of an integer, another on the next's.
    integer = (places == 0).cumsum(1)

    def per_integer(values: Tensor) -> Tensor:
        return values.new_zeros(len(values), values.shape[1] + 1).scatter_add(1, integer, values)

    length, hidden = per_integer((places > 0).float()), per_integer(((places > 0) & ~supervised).float())
    whole = per_integer(error).abs()[(length > 0) & (hidden == 0)]
    return whole.mean().item() if len(whole) else 0.0
