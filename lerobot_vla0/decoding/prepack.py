"""Weights of a bfloat16 model on a CPU in the layout that oneDNN computes with. PyTorch brings a weight into
it for every call, and with few tokens that takes as long as the product. (torch.compile does this once with
`freezing`, but only where shapes stand still.)"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


def can_prepack(model: nn.Module) -> bool:
    """Whether the model computes in bfloat16 on a CPU that has instructions for it."""
    weight, mkldnn = next(model.parameters()), torch.ops.mkldnn
    bfloat16_on_cpu = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    if not bfloat16_on_cpu or not torch.backends.mkldnn.is_available():
        return False
    # On ARM, where another library does oneDNN's work, this has not been tried.
    return mkldnn._is_mkldnn_bf16_supported() and not mkldnn._is_mkldnn_acl_supported()


class Prepacked:
    """Copies of a module's linear weights, which `use` puts to use. Same results, to the bit.

    Args:
        module: its weights must not change as long as this lives. The copies take as much memory again.
    """

    def __init__(self, module: nn.Module) -> None:
        # Of quantised layers and those that carry a hook, the class or an own `forward` is another.
        linears = [m for m in module.modules() if type(m) is nn.Linear and "forward" not in vars(m)]
        pack = torch.ops.mkldnn._reorder_linear_weight
        self.linears = [(linear, pack(linear.weight.detach())) for linear in linears]

    @contextmanager
    def use(self) -> Iterator[None]:
        """Without gradients."""
        for linear, packed in self.linears:
            linear.forward = partial(_linear, packed, linear.bias)
        try:
            yield
        finally:
            for linear, _ in self.linears:
                del linear.forward


def _linear(packed: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], "")
