"""Rounding each weight by itself."""

from typing import ClassVar

import attrs
from torch import Tensor

from mono_quant.base import Grid, Rounding, Statistics
from mono_quant.configurable import register
from mono_quant.numerics.values import QTensor


@register
@attrs.frozen
class RoundToNearest(Rounding):
    """The nearest grid point of each weight, half to even; needs no data."""

    kind: ClassVar[str] = "round_to_nearest"

    def describe(self) -> str:
        """Return what it does."""
        return "rounding to nearest"

    def round(self, weight: Tensor, grid: Grid, statistics: Statistics) -> QTensor:
        """Return `weight`, a float32 stack ``[G, out, in]``, on the grid."""
        return grid.scheme.quantize_stack(weight, grid.qparams(weight))
