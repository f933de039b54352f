"""The few operators of torch that are not public, typed, and whether this machine has them."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mono_quant.kernels.trial import refusal

SHORTEST_ROW = 32
"""Shorter rows gain nothing, and torch 2.13 gets products over rows of one value wrong."""

LONGEST_ROW = 1 << 15
"""Up to here no sum of products of two bytes leaves 32 bits, corrections included."""

_TRIAL = """
import torch
for rows in (1, 3, 17, 64):
    for length in (32, 1000):
        left = torch.randint(0, 256, (96, length), dtype=torch.uint8)
        right = torch.randint(-128, 128, (rows, length), dtype=torch.int8)
        left[0], right[0] = 255, -128
        expected = left.double() @ right.double().t()
        assert torch.equal(torch._int_mm(left, right.t()).double(), expected)
"""


def int_mm(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right`` as exact ``int32 [n, m]``.

    Args:
        left: ``uint8 [n, k]``, k from `SHORTEST_ROW` to `LONGEST_ROW`.
        right: ``int8 [k, m]``; the transposed view of a contiguous ``[m, k]`` is as good.
    """
    return torch._int_mm(left, right)


def int_mm_refusal() -> str | None:
    """Return why `int_mm` cannot be used by this torch on this machine, or None."""
    return refusal("the integer product", _TRIAL)


def followed(*tensors: Tensor | None) -> bool:
    """Return whether somebody follows what is computed from `tensors`, rather than its values.

    Gradients, backward or forward, transforms of `torch.func`, tracing, fake tensors and other
    subclasses: machine code would break all of these, or be lost in silence.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return True
    if forward_ad._current_level >= 0:  # tangents leave no trace on the tensor's flags
        return True
    given = [tensor for tensor in tensors if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return True
    return any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in given)
