"""A range that goes by the deviation of values from zero."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from mono_quant import InputError, Observer, Scheme, register
from mono_quant.numerics.blocks import block_range, block_sum


@attrs.frozen(eq=False)
class Moments:
    """What is kept of values: how many, the sum of their squares, and both extremes."""

    count: int
    squares: Tensor
    low: Tensor
    high: Tensor


@register
@attrs.frozen
class Deviation(Observer[Moments]):
    """The root of the mean square, `times` so far to both sides, within the extremes."""

    kind: ClassVar[str] = "deviation"
    times: float = 2.0

    def observe(self, x: Tensor) -> Moments:
        x = x.to(torch.float32)
        if not x.numel() or not torch.isfinite(x).all():
            raise InputError("a range is asked for of nothing, or of NaN or infinity")
        return Moments(x.numel(), x.double().square().sum(), x.amin(), x.amax())

    def merge(self, left: Moments, right: Moments) -> Moments:
        return Moments(
            left.count + right.count,
            left.squares + right.squares,
            torch.minimum(left.low, right.low),
            torch.maximum(left.high, right.high),
        )

    def calculate_range(self, state: Moments, scheme: Scheme) -> tuple[Tensor, Tensor]:
        return self._within(state.squares / state.count, state.low, state.high)

    def range_of(
        self, x: Tensor, scheme: Scheme, block_size: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        count = max(1, torch.Size(block_size).numel())
        squares = block_sum(x.double().square(), block_size) / count
        return self._within(squares, *block_range(x, block_size))

    def _within(self, square: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        reach = (self.times * square.sqrt()).to(torch.float32)
        return torch.maximum(-reach, low), torch.minimum(reach, high)
