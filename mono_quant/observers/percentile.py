"""The range without the outermost values."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from mono_quant.base import Scheme
from mono_quant.configurable import register
from mono_quant.errors import ConfigurationError
from mono_quant.numerics.blocks import block_range, to_blocks
from mono_quant.numerics.granularity import Shape
from mono_quant.numerics.histogram import HistogramState, quantile
from mono_quant.observers.counting import FINE, CountingObserver


@register
@attrs.frozen
class Percentile(CountingObserver):
    """From the (100 - p)-th percentile to the p-th: the outermost values on each side are clipped.

    Of values seen in pieces the percentiles are exact to the width of a bin, about a 4096th of the
    whole range, zero included, or less. In a tensor of more than 65536 values only the tails are
    counted exactly (see `mono_quant.numerics.histogram.observe`): about the 64 outermost values or
    more at each end. Of one tensor of 2 million values, p = 99.999 cuts off 21 and is exact to the
    bin; p = 99.99 cuts off 210 and is estimated from one value in 65: between half and three times
    as many are cut off (measured on Student's t), and the more tensors are seen, the nearer.

    Attributes:
        p: percent, from 50 to 100; 100 clips nothing.
    """

    kind: ClassVar[str] = "percentile"
    p: float = 99.99

    def __attrs_post_init__(self) -> None:
        """Refuse a percentile whose range is none."""
        if not 50 < self.p <= 100:
            raise ConfigurationError(f"p is in percent, above 50 and at most 100, not {self.p}")

    @property
    def most_bins(self) -> int:
        """Many."""
        return FINE

    def calculate_range(self, state: HistogramState, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """Return the two percentiles of all that was seen."""
        return quantile(state, 1 - self.p / 100), quantile(state, self.p / 100)

    def range_of(self, x: Tensor, scheme: Scheme, block_size: Shape) -> tuple[Tensor, Tensor]:
        """Return the two percentiles of each block, exact; lines between neighbouring values."""
        low, high = block_range(x, block_size)
        if x.numel() == 0 or self.p == 100:
            return low, high
        blocks = to_blocks(x, block_size)  # [n0, b0, n1, b1, ...]
        dims = list(range(blocks.dim()))
        rows = blocks.permute(dims[::2] + dims[1::2]).reshape(low.numel(), -1)  # [blocks, values]
        last = rows.shape[1] - 1
        cut = last * (1 - self.p / 100)
        low, high = _at(rows, cut).reshape(low.shape), _at(rows, last - cut).reshape(high.shape)
        return low, high


def _at(rows: Tensor, rank: float) -> Tensor:
    """Return the value of each row at a rank from 0 on, between two neighbours where it lies so."""
    whole = int(rank)
    below = rows.kthvalue(whole + 1, dim=1).values
    if whole == rank:
        return below
    above = rows.kthvalue(whole + 2, dim=1).values
    return torch.lerp(below, above, rank - whole)
