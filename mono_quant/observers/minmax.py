"""The whole range."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from mono_quant.base import Observer, Scheme
from mono_quant.configurable import register
from mono_quant.errors import InputError
from mono_quant.numerics.blocks import row_range
from mono_quant.numerics.extremes import check_ends, finite_ends
from mono_quant.numerics.granularity import Shape


@attrs.frozen(eq=False)
class MinMaxState:
    """The extremes seen so far, each a float32 tensor of no dimension."""

    low: Tensor
    high: Tensor


@register
@attrs.frozen
class MinMax(Observer[MinMaxState]):
    """From the smallest value to the largest: nothing is clipped."""

    kind: ClassVar[str] = "minmax"

    def observe(self, x: Tensor) -> MinMaxState:
        """Return the extremes of `x`, which holds one value or more.

        Raises:
            InputError: it is empty, or holds NaN or infinity.
        """
        if x.numel() == 0:
            raise InputError("an empty tensor has no extremes")
        low, high = (end.to(torch.float32) for end in (x.amin(), x.amax()))
        finite_ends(low, high)
        return MinMaxState(low, high)

    def merge(self, left: MinMaxState, right: MinMaxState) -> MinMaxState:
        """Return the wider range."""
        return MinMaxState(torch.minimum(left.low, right.low), torch.maximum(left.high, right.high))

    def check_state(self, state: MinMaxState, stack: Shape | None = None) -> None:
        """Refuse extremes that are not finite, or the wrong way round."""
        check_ends(state.low, state.high)

    def calculate_range(self, state: MinMaxState, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """Return the extremes."""
        return state.low, state.high

    def range_of(self, x: Tensor, scheme: Scheme, block_size: Shape) -> tuple[Tensor, Tensor]:
        """Return the extremes of each block."""
        return row_range(x, block_size)
