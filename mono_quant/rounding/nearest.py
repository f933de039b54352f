"""Rounding each weight by itself."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from mono_quant.base import Grid, Rounding, Statistics
from mono_quant.configurable import register
from mono_quant.numerics.blocks import AT_ONCE, row_parts
from mono_quant.numerics.values import QTensor


@register
@attrs.frozen
class RoundToNearest(Rounding):
    """The nearest grid point of each weight, half to even; needs no data."""

    kind: ClassVar[str] = "round_to_nearest"

    def round(self, weight: Tensor, grid: Grid, statistics: Statistics) -> QTensor:
        """Return `weight`, a float32 stack ``[G, out, in]``, on the grid.

        Some rows at a time, where no two share a scale: several times faster, and no float copy.
        """
        scheme, qparams = grid.scheme, grid.qparams(weight)
        if not qparams.by_rows or weight.numel() <= AT_ONCE:
            return scheme.quantize(weight, qparams)
        parts = [
            scheme.quantize(weight[:, part], qparams.rows(part)).codes
            for part in row_parts(tuple(weight.shape))
        ]
        return QTensor(torch.cat(parts, 1), qparams, weight.dtype)
