"""FBGEMM's product of 8-bit weights and floats that it quantizes on the way, typed.

Without VNNI it adds two products in 16 bits, which saturate unless codes of inputs are at most 128.
There each code of 8 bits is written as two halves: twice the rows, and exact sums all the same.
Codes of fewer bits need no halves.

Quantized tensors, by way of which a weight is packed, are deprecated since torch 2.13: where torch
has none any more, `refuse` says so, and other kernels have their turn.
"""

import warnings
from functools import cache
from typing import cast

import torch
from torch import Tensor

from mono_quant.kernels.ops import engine_refusal
from mono_quant.kernels.trial import refusal

TOP = 255
"""The largest code of 8 bits."""

_ROWS, _COLUMNS = 48, 512


def pack(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> torch.ScriptObject:
    """Return a weight as `linear` takes it, which takes `packed_bytes`; opaque.

    Args:
        codes: ``int8 [out, in]``.
        scale: ``float32 [out]``.
        zero_point: the codes that mean zero, integers ``[out]``; None where all are 0.
    """
    _warn_once()
    if saturates():
        scale = scale / 2  # halves of codes are in steps of twice the size
    zeros = torch.zeros_like(scale) if zero_point is None else zero_point
    weight = _quantized(codes, scale, zeros)
    packed: torch.ScriptObject = torch.ops.quantized.linear_prepack(weight, None)
    return packed


def packed_bytes(rows: int, length: int) -> int:
    """Return the bytes that `pack` takes: panels of 48 rows and 512 columns, each whole.

    Without AVX-512 panels have fewer rows, and it may be less.
    """
    panels, columns = -(-rows // _ROWS), -(-length // _COLUMNS)
    return panels * _ROWS * columns * _COLUMNS


def unpack(packed: torch.ScriptObject) -> Tensor:
    """Return the codes that were packed, ``int8 [out, in]``, to the bit."""
    return cast("Tensor", torch.ops.quantized.linear_unpack(packed)[0].int_repr())


def linear(
    x: Tensor, scale: float, zero: int, packed: torch.ScriptObject, top: int = TOP
) -> Tensor:
    """Return ``x @ weight.T`` as ``float32 [..., out]``, `x` on a grid; sums are exact.

    Codes are those of ``torch.quantize_per_tensor``: the zero point is added, and the value
    rounded, in one step.

    Args:
        x: ``float32 [..., in]`` of two dimensions or more, contiguous, finite.
        scale: of the grid.
        zero: the code that means zero, 0 to `top`.
        packed: by `pack`.
        top: the largest code: 255, or of grids of fewer bits 127 at most.
    """
    halved = saturates()
    if top < TOP:  # which the operator does not clamp to
        x = x.clamp(-zero * scale, (top - zero) * scale)
        if halved:  # so are the weight's scales
            x, scale = x.mul_(2), 2 * scale
    elif halved:
        return _of_halves(x, scale, zero, packed)
    return _product(x, scale, zero, packed)


def _product(x: Tensor, scale: float, zero: int, packed: torch.ScriptObject) -> Tensor:
    product: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
        x, scale, zero, packed
    )
    return product


def _of_halves(x: Tensor, scale: float, zero: int, packed: torch.ScriptObject) -> Tensor:
    """Return what `linear` does, each code the sum of two on a grid of twice the step.

    A quarter of that step below and above a value, it rounds to the halves of its code. One is
    added to the code where the zero point is odd.
    """
    if x.dim() == 2 and len(x) > _AT_ONCE:
        return torch.cat(
            [_of_halves(part, scale, zero, packed) for part in torch.split(x, _AT_ONCE)]
        )
    inside = x.clamp(-zero * scale, (TOP - zero) * scale)
    aside = _ASIDE if x.dim() == 2 else _ASIDE.view(2, *[1] * x.dim())
    halves = torch.add(inside, aside, alpha=scale)  # [2, ..., in]
    low, high = _product(halves, 2 * scale, (zero + 1) // 2, packed).unbind()
    return torch.add(low, high)


_AT_ONCE = 512
_ASIDE = torch.tensor([-0.5, 0.5], device="cpu").view(2, 1, 1)


def refuse() -> str | None:
    """Return why `linear` cannot be used by this torch on this machine as it is set, or None."""
    if reason := engine_refusal():
        return reason
    return (
        refusal("the product of halves of bytes that FBGEMM packs", _OF_HALVES)
        if saturates()
        else None
    )


def saturates() -> bool:
    """Return whether products of whole bytes are wrong here, by trying it."""
    return refusal("the product of bytes that FBGEMM packs", _OF_BYTES) is not None


def _quantized(codes: Tensor, scale: Tensor, zeros: Tensor) -> Tensor:
    """Return a weight as one of torch's quantized tensors."""
    return torch._make_per_channel_quantized_tensor(codes, scale.double(), zeros.long(), 0)


@cache
def _warn_once() -> None:
    """Let torch tell, once in a process and to nobody, that quantized tensors are deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _quantized(torch.zeros(1, 1, dtype=torch.int8), torch.ones(1), torch.zeros(1))


_TRIAL = """
import torch
quantized = torch.ops.quantized
product = quantized.linear_with_input_q_dq_qweight_dq_output_fp32
for rows, length in ((96, 512), (1, 513), (33, 64), (65, 1100)):
    weight = torch.randint(-128, 128, (rows, length), dtype=torch.int8)
    weight[0] = -128
    zeros = torch.randint(-128, 128, (rows,))
    for zeros in (zeros, torch.zeros_like(zeros)):
        scales = torch.full((rows,), 0.5, dtype=torch.float64)
        made = torch._make_per_channel_quantized_tensor(weight, scales, zeros, 0)
        packed = quantized.linear_prepack(made, None)
        found = quantized.linear_unpack(packed)[0].int_repr()
        assert torch.equal(found, weight), "other weights"
        values = (weight.double() - zeros[:, None]) / 2
        for count in (1, 2, 3, 17, 130):
            codes = torch.randint(0, top + 1, (count, length))
            codes[0] = top  # two products of the largest bytes do not fit in 16 bits
            x = (codes - 3).float() / 4
            exact = x.double() @ values.t()
            found = product(x, 0.25, 3, packed)
            assert found.dtype == torch.float32
            assert ((found - exact).abs() <= 2.0**-23 * exact.abs()).all(), "a product is wrong"
"""

_OF_BYTES, _OF_HALVES = (f"top = {top}\n{_TRIAL}" for top in (255, 128))
