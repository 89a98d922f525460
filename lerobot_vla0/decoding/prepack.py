"""Linear weights of a bfloat16 model on a CPU, converted once to the memory layout that oneDNN computes with.
Otherwise PyTorch converts a weight at every call, which with few tokens takes as long as the product itself.
(torch.compile with `freezing` also converts once, but recompiles for every new shape.)"""

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


def prepack(module: nn.Module) -> int:
    """Lets the module compute with converted copies of its linear weights, from now on. Results are
    bit-identical, without gradients.

    Args:
        module: of a `session.acting_model`. Its weights must not change afterwards. The copies need as much
            memory as the weights.

    Returns:
        How many linear layers it has converted.
    """
    # Plain layers only: quantised ones are subclasses.
    linears = [m for m in module.modules() if type(m) is nn.Linear]
    for linear in linears:
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        linear.forward = partial(_linear, packed, linear.bias)
    return len(linears)


def _linear(packed: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], "")
