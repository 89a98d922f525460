"""The loss of answers, and the error of predicted integers.

With Qwen2.5-VL's 151,936 tokens, logits and their gradient can take most of a training step's memory. Here
they exist for a few positions at a time, and are computed again in the backward pass, as in Liger's fused
linear cross-entropy (arXiv 2410.10989). `torch.utils.checkpoint` would take a fifth more memory.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from .chat import IGNORE

CHUNK = 256  # positions whose logits exist at the same time: 155 MB of float32 with 151,936 tokens


class LinearCrossEntropy(torch.autograd.Function):
    """Hidden states (N, width), head (vocabulary, width), targets (N,) and choices (C,) as token ids → losses
    (N,) float32, the most likely tokens (N,), the indices of the most likely choices (N,)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, choices: Tensor) -> tuple:
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        totals, predicted, chosen = torch.empty_like(losses), torch.empty_like(targets), targets.clone()
        for i in range(0, len(hidden), CHUNK):
            part = slice(i, i + CHUNK)
            logits = linear(hidden[part], weight).float()
            totals[part] = logits.logsumexp(-1)
            losses[part] = totals[part] - logits.gather(1, targets[part, None])[:, 0]
            predicted[part] = logits.argmax(-1)
            chosen[part] = logits[:, choices].argmax(-1)
        ctx.mark_non_differentiable(predicted, chosen)
        ctx.save_for_backward(hidden, weight, targets, totals)
        return losses, predicted, chosen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
        hidden, weight, targets, totals = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None  # None: a frozen head
        for i in range(0, len(hidden), CHUNK):
            part = slice(i, i + CHUNK)
            # d loss / d logits = softmax - one-hot
            delta = linear(hidden[part], weight).float().sub_(totals[part, None]).exp_()
            delta[torch.arange(len(delta), device=delta.device), targets[part]] -= 1
            delta = delta.mul_(grad[part, None]).to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = delta @ weight
            if grad_weight is not None:
                grad_weight.addmm_(delta.T, hidden[part])
        return grad_hidden, grad_weight, None, None


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
    """
    # The token at position t is predicted at t - 1; logits are computed for supervised positions only.
    labels, places = (x[:, 1 - hidden.shape[1] :] for x in (labels, places))
    supervised = labels != IGNORE
    targets, states = labels[supervised], hidden[:, :-1][supervised].to(head.dtype)  # (N,), (N, width)
    losses, predicted, digits = LinearCrossEntropy.apply(states, head, targets, digit_ids)
    true = (targets[:, None] == digit_ids).float().argmax(-1)  # 0 where the target is no digit
    metrics = {"token_accuracy": (predicted == targets).float().mean().item()}
    metrics["action_error_bins"] = integer_error(digits - true, supervised, places)
    if reduction == "mean":
        return losses.mean(), metrics
    sums = losses.new_zeros(len(labels)).index_add(0, supervised.nonzero()[:, 0], losses)
    return sums / supervised.sum(1).clamp(min=1), metrics


@torch.no_grad()
def integer_error(digits: Tensor, supervised: Tensor, places: Tensor) -> float:
    """Mean distance in bins between true and predicted integers, of those whose digits are all supervised.

    Args:
        digits: (N,) predicted minus true digit at each supervised position.
        supervised: (B, T) bool, N of them true.
        places: (B, T) what each digit counts (1, 10, 100, ...); 0 where there is no digit.
    """
    values = torch.zeros(3, *places.shape, device=places.device)
    values[0, supervised] = digits * places[supervised].float()
    values[1], values[2] = places > 0, (places > 0) & ~supervised
    # The same number on all digits of an integer, another on the next's.
    integer = (places == 0).cumsum(1).expand_as(values)
    sums = values.new_zeros(3, len(places), places.shape[1] + 1).scatter_add(2, integer, values)
    return sums[0].abs()[(sums[1] > 0) & (sums[2] == 0)].mean().nan_to_num().item()  # 0 if there are none
