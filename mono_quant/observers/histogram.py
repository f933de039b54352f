"""The best range by a histogram of a chosen size."""

from typing import ClassVar

import attrs
from torch import Tensor

from mono_quant.base import Scheme
from mono_quant.configurable import register
from mono_quant.numerics.granularity import Shape
from mono_quant.numerics.histogram import HistogramState
from mono_quant.observers.counting import CountingObserver, check_bins
from mono_quant.observers.mse import MSE
from mono_quant.observers.search import WIDE, least_squared_error


@register
@attrs.frozen
class Histogram(CountingObserver):
    """The range of least squared error, found on a histogram; its ends may shrink to 1/256.

    It answers what ``torch.ao.quantization.HistogramObserver`` asks, with two differences: growing
    joins bins exactly instead of spreading counts over new ones, and the error is that of the very
    grid, each end searched on its own, not an estimate from the norm of bins.

    Attributes:
        bins: the most bins there may be. Their width is a power of two, so that half as many may be
            in use.
    """

    kind: ClassVar[str] = "histogram"
    bins: int = 2048

    def __attrs_post_init__(self) -> None:
        """Refuse a histogram that is none."""
        check_bins(self.bins)

    @property
    def most_bins(self) -> int:
        """The bins that were asked for."""
        return self.bins

    def calculate_range(self, state: HistogramState, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """Return the range that leaves the least squared error on the scheme's grid."""
        return least_squared_error(state, scheme, WIDE)

    def range_of(self, x: Tensor, scheme: Scheme, block_size: Shape) -> tuple[Tensor, Tensor]:
        """Return the range of each block that `MSE` finds: the same question, asked of all values.

        A histogram for each of many small blocks would cost many times the weight.
        """
        return MSE().range_of(x, scheme, block_size)
