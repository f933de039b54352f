"""Grids that are known when a graph is built, and what is computed on their codes.

The functions take plain numbers, so that a graph's code shows every scale and zero point.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, Self, cast

import attrs
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function

from mono_quant.base import Activation
from mono_quant.errors import InputError
from mono_quant.schemes import Affine

Given = ParamSpec("Given")


def one_step(function: Callable[Given, Tensor]) -> Callable[Given, Tensor]:
    """Let a function stay one step of a graph that is traced again, which unpickling does."""

    @wraps(function)
    def call(*args: Given.args, **named: Given.kwargs) -> Tensor:
        first = args[:1]
        if has_torch_function(first):  # the symbol of a tensor; or a tensor of somebody's class
            return handle_torch_function(call, first, *args, **named)
        return function(*args, **named)

    return call


@attrs.frozen
class Grid:
    """Codes ``0 .. top`` in uint8, each ``(code - zero_point) * scale``.

    Attributes:
        scale: a float32 number.
        zero_point: the code of zero.
        top: the largest code, at most 255.
    """

    scale: float
    zero_point: int
    top: int

    @classmethod
    def of(cls, activation: Activation) -> Self | None:
        """Return the grid of calibrated inputs, or None where they have no such one."""
        scheme, scale, zero_point = activation.scheme, activation.scale, activation.zero_point
        if type(scheme) is not Affine or scale is None or zero_point is None:
            return None
        if zero_point.is_floating_point():
            return None
        return cls(float(scale), int(zero_point), scheme.quant_max)

    @property
    def numbers(self) -> tuple[float, int, int]:
        """Scale, zero point and largest code, as the functions below take them."""
        return self.scale, self.zero_point, self.top

    def bounds(self, low: float | None, high: float | None) -> tuple[int, int] | None:
        """Return the codes that ``clamp(low, high)`` keeps within; None where it changes none.

        Rounding to a grid is monotone, so clamping codes to the codes of the ends is rounding what
        was clamped: exactly, not nearly.
        """
        ends = [torch.tensor(end, dtype=torch.float32) for end in (low, high) if end is not None]
        codes = [int(quantize(end, *self.numbers)) for end in ends]
        first = codes.pop(0) if low is not None else 0
        last = codes.pop(0) if high is not None else self.top
        return None if (first, last) == (0, self.top) else (first, last)


@one_step
def quantize(x: Tensor, scale: float, zero_point: int, top: int) -> Tensor:
    """Return the uint8 codes of `x`, as `Affine.quantize` computes them, bit for bit.

    NaN has no code; what becomes of it is not defined.

    Raises:
        InputError: `x` asks for a gradient, which codes do not carry.
    """
    if x.requires_grad and torch.is_grad_enabled():
        raise InputError("a graph of codes has no gradients: call it under torch.no_grad()")
    # The reciprocal in float32, as there; a Python number holds it exactly.
    reciprocal = (1.0 / torch.tensor(scale, dtype=torch.float32)).item()
    values = torch.mul(x.to(torch.float32), reciprocal).add_(zero_point).round_()
    return values.clamp_(0, top).to(torch.uint8)


@one_step
def dequantize(codes: Tensor, scale: float, zero_point: int, top: int) -> Tensor:
    """Return the float32 values of uint8 `codes`, as `Affine.dequantize` does, bit for bit."""
    return codes.to(torch.float32).sub_(zero_point).mul_(scale)


@one_step
def clamp(codes: Tensor, low: int, high: int) -> Tensor:
    """Return codes within ``low .. high``."""
    return codes.clamp(low, high)


@one_step
def max_pool(
    codes: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """Return the largest codes of windows, ``uint8 [..., H, W]``: `torch.nn.MaxPool2d` on codes.

    One side after the other, as maxima of whole shifted tensors: torch's own operator refuses
    uint8 in channels_last from 256 positions on, and counts them one by one elsewhere.
    """
    rows, columns = padding
    if rows or columns:
        codes = functional.pad(codes, (columns, columns, rows, rows))  # no code is below 0
    for side in (0, 1):
        dim = codes.dim() - 2 + side
        span = codes.shape[dim] - dilation[side] * (kernel[side] - 1)
        places = (span - 1) // stride[side] + 1
        if places < 1:
            raise RuntimeError(f"a window of {kernel} does not fit {tuple(codes.shape)}")
        taps = [
            codes.narrow(dim, tap * dilation[side], span)[
                (slice(None),) * dim + (slice(None, None, stride[side]),)
            ]
            for tap in range(kernel[side])
        ]
        codes = taps[0]
        for tap in taps[1:]:
            codes = torch.maximum(codes, tap)
    return codes


@one_step
def add(
    one: Tensor,
    other: Tensor,
    ones: tuple[float, int, int],
    others: tuple[float, int, int],
    result: tuple[float, int, int],
) -> Tensor:
    """Return the codes, on the grid `result`, of the sum of two tensors of codes.

    Computed in float32 as ``round(one * s1 / s + other * s2 / s + constant)``: at a half it may
    differ by a code from adding dequantized values.
    """
    scale, zero_point, top = result
    left, right = ones[0] / scale, others[0] / scale
    constant = zero_point - ones[1] * left - others[1] * right
    total = torch.add(torch.mul(one, left), other, alpha=right)
    return total.add_(constant).round_().clamp_(0, top).to(torch.uint8)


SIGN = 128
"""What turns an unsigned byte into a signed one."""


def signed_codes(values: Tensor, top: int) -> Tensor:
    """Return the uint8 codes of float32 `values` in units of a code, less `SIGN`; overwrites them.

    By way of signed bytes, which torch turns floats into faster than into unsigned ones.
    """
    codes = values.round_().clamp_(-SIGN, top - SIGN).to(torch.int8)
    return codes.bitwise_xor_(-SIGN).view(torch.uint8)


def numbers(value: object) -> tuple[float, int, int]:
    """Return what `Grid.numbers` gave, read back from an argument of a graph."""
    return cast("tuple[float, int, int]", value)  # the graph was built from it
