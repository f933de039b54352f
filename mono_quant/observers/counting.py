"""What observers that keep a histogram share."""

from abc import abstractmethod

from torch import Tensor

from mono_quant.base import Observer
from mono_quant.configurable import is_count
from mono_quant.errors import ConfigurationError
from mono_quant.numerics import histogram
from mono_quant.numerics.granularity import Shape
from mono_quant.numerics.histogram import HistogramState

FINE = 1 << 13
"""Bins of a histogram that nobody chose the size of: 64 kB."""
_FEWEST = 16


class CountingObserver(Observer[HistogramState]):
    """An observer whose state is a histogram; it says from how many bins it finds a range.

    Merging loses no count and is exact in any order. A tensor of more than 65536 values is sampled,
    all but its tails, as `mono_quant.numerics.histogram.observe` says.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def most_bins(self) -> int:
        """How many bins a state may have."""

    def observe(self, x: Tensor) -> HistogramState:
        """Return the histogram of a tensor of any shape.

        Raises:
            InputError: it is empty, or holds NaN or infinity.
        """
        return histogram.observe(x, self.most_bins)

    def merge(self, left: HistogramState, right: HistogramState) -> HistogramState:
        """Return the histogram of both."""
        return histogram.merge(left, right, self.most_bins)

    def check_state(self, state: HistogramState, stack: Shape | None = None) -> None:
        """Refuse bins that are not those of its extremes, and counts that are none."""
        histogram.check(state, self.most_bins)


_MOST = 1 << 20
"""More tell nothing, and a file that names its observer would choose how much memory is taken."""


def check_bins(bins: object) -> None:
    """Refuse a number of bins that is none.

    Raises:
        ConfigurationError: it is no whole number, or too small to tell anything.
    """
    if not is_count(bins, _FEWEST) or bins > _MOST:
        raise ConfigurationError(f"bins is a whole number, {_FEWEST} to {_MOST}, not {bins!r}")
