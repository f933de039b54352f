"""The extremes of batches, averaged over time."""

from typing import ClassVar

import attrs
from torch import Tensor

from mono_quant.base import Observer, Scheme
from mono_quant.configurable import register
from mono_quant.errors import ConfigurationError, InputError
from mono_quant.numerics.blocks import row_range
from mono_quant.numerics.extremes import check_ends
from mono_quant.numerics.granularity import Shape
from mono_quant.observers.minmax import MinMax


@attrs.frozen(eq=False)
class MovingAverageState:
    """The averages over a run of batches, as its own beginning and as the sequel of another.

    Attributes:
        low: average of the batches' smallest values, where the first batch begins the average.
        high: that of the largest.
        later_low: average of the smallest values by the weights that these batches have when
            others went before.
        later_high: that of the largest.
        batches: how many there were.
    """

    low: Tensor
    high: Tensor
    later_low: Tensor
    later_high: Tensor
    batches: int


@register
@attrs.frozen
class MovingAverage(Observer[MovingAverageState]):
    """The smallest and the largest value of each batch, averaged; the latest weigh the most.

    ``average += momentum * (batch - average)``, beginning with the first batch, as
    ``torch.ao.quantization.MovingAverageMinMaxObserver`` has it. A rare outlier moves the range a
    little, so more is clipped than by `MinMax`. The order of the batches matters; how they are
    merged does not, up to rounding.

    Source: Jacob et al., arXiv 1712.05877, section 3.1.

    Attributes:
        momentum: weight of the latest batch, above 0 and up to 1.
    """

    kind: ClassVar[str] = "movingaverage"
    order_free: ClassVar[bool] = False
    momentum: float = 0.01

    def __attrs_post_init__(self) -> None:
        """Refuse a weight that is none."""
        if not 0 < self.momentum <= 1:
            raise ConfigurationError(f"momentum is above 0 and at most 1, not {self.momentum}")

    def observe(self, x: Tensor) -> MovingAverageState:
        """Return the extremes of one batch, which holds one value or more.

        Raises:
            InputError: it is empty, or holds NaN or infinity.
        """
        ends = MinMax().observe(x)
        return MovingAverageState(ends.low, ends.high, ends.low, ends.high, 1)

    def merge(self, left: MovingAverageState, right: MovingAverageState) -> MovingAverageState:
        """Return the average over the batches of `left` followed by those of `right`."""
        second = self._weight(right.batches)
        later = second / self._weight(left.batches + right.batches)  # of right, among the two

        def follow(before: Tensor, after: Tensor) -> Tensor:
            return before + second * (after - before)

        def blend(before: Tensor, after: Tensor) -> Tensor:
            return before + later * (after - before)

        return MovingAverageState(
            follow(left.low, right.later_low),
            follow(left.high, right.later_high),
            blend(left.later_low, right.later_low),
            blend(left.later_high, right.later_high),
            left.batches + right.batches,
        )

    def check_state(self, state: MovingAverageState, stack: Shape | None = None) -> None:
        """Refuse averages that are not finite or the wrong way round, or of no batches."""
        check_ends(state.low, state.high)
        check_ends(state.later_low, state.later_high)
        if state.batches < 1:
            raise InputError(f"an average is of 1 batch or more, not of {state.batches}")

    def calculate_range(self, state: MovingAverageState, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """Return the averages."""
        return state.low, state.high

    def range_of(self, x: Tensor, scheme: Scheme, block_size: Shape) -> tuple[Tensor, Tensor]:
        """Return the extremes of each block: a weight is one batch."""
        return row_range(x, block_size)

    def _weight(self, batches: int) -> float:
        """Return the weight that a run of batches has against all that went before."""
        return self.momentum if batches == 1 else 1 - (1 - self.momentum) ** batches
