"""Linear weights of a bfloat16 model on a CPU, converted once to the memory layout that oneDNN computes with.
Otherwise PyTorch converts a weight at every call, which with few tokens takes as long as the product itself.
(torch.compile with `freezing` also converts once, but recompiles for every new shape.)"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


def can_prepack(model: nn.Module) -> bool:
    """Whether the model computes in bfloat16 on a CPU with bfloat16 instructions."""
    weight, mkldnn = next(model.parameters()), torch.ops.mkldnn
    bfloat16_on_cpu = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    if not bfloat16_on_cpu or not torch.backends.mkldnn.is_available():
        return False
    # Not tested on ARM, where PyTorch uses the Arm Compute Library (ACL) instead of oneDNN's own kernels.
    return mkldnn._is_mkldnn_bf16_supported() and not mkldnn._is_mkldnn_acl_supported()


class Prepacked:
    """Converted copies of a module's linear weights, used inside `with use():`. Results are bit-identical.

    Args:
        module: its weights must not change while this object is in use. The copies need as much memory as the
            weights.
    """

    def __init__(self, module: nn.Module) -> None:
        # Plain layers only: quantised ones are subclasses, and hooks of other libraries replace `forward`.
        linears = [m for m in module.modules() if type(m) is nn.Linear and "forward" not in vars(m)]
        pack = torch.ops.mkldnn._reorder_linear_weight
        self.linears = [(linear, pack(linear.weight.detach())) for linear in linears]

    @contextmanager
    def use(self) -> Iterator[None]:
        """Lets the module compute with the copies. No gradients."""
        for linear, packed in self.linears:
            linear.forward = partial(_linear, packed, linear.bias)
        try:
            yield
        finally:
            for linear, _ in self.linears:
                del linear.forward


def _linear(packed: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], "")
