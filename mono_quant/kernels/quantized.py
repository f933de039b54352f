"""Floats put on a grid in one pass, by way of torch's quantized tensors, typed.

Those are deprecated since torch 2.13: where torch has none any more, `refuse` says so, and codes
are found by several operators as before.
"""

import warnings
from functools import cache

import torch
from torch import Tensor

from mono_quant.kernels.trial import refusal


def codes(x: Tensor, scale: float, zero: int) -> Tensor:
    """Return the codes 0 to 255 of floats on one grid, ``uint8``, channels last where `x` is.

    Zero points are added to what was rounded, so a value that lies nearly on a half may become the
    neighbour of the code that `Affine.quantize` finds, which is as near.

    Args:
        x: float32 and finite.
        scale: of the grid.
        zero: the code that means zero.
    """
    _warn_once()
    return _bytes(torch.quantize_per_tensor(x, scale, zero, torch.quint8))


def _bytes(quantized: Tensor) -> Tensor:
    """Return the codes of a quantized tensor in its own memory: `int_repr` would copy them."""
    place = (quantized.storage_offset(), quantized.shape, quantized.stride())
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(quantized.untyped_storage(), *place)


def refuse() -> str | None:
    """Return why `codes` cannot be used by this torch on this machine, or None: by trying it."""
    return refusal("putting floats on a grid at once", _TRIAL)


@cache
def _warn_once() -> None:
    """Let torch tell, once in a process and to nobody, that quantized tensors are deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)


_TRIAL = """
import torch
torch.manual_seed(0)
for shape in ((1, 3, 5, 7), (2, 64, 9, 9), (3, 1000)):
    x = 60 * torch.randn(shape)
    last = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    for values in (x, last):
        for scale, zero in ((0.5, 0), (0.375, 117), (0.25, 255)):
            made = torch.quantize_per_tensor(values, scale, zero, torch.quint8)
            place = (made.storage_offset(), made.shape, made.stride())
            found = torch.empty(0, dtype=torch.uint8).set_(made.untyped_storage(), *place)
            assert found.stride() == values.stride(), "another order"
            exact = (values.double() / scale + zero).clamp(0, 255)
            assert ((found.double() - exact).abs() <= 0.5 + 1e-4).all(), "a code is wrong"
            del made
            assert ((found.double() - exact).abs() <= 0.5 + 1e-4).all(), "memory was let go"
"""
