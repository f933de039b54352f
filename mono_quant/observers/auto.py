"""The observer that fits a tensor's distribution, and why."""

import math
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from mono_quant.base import Scheme
from mono_quant.configurable import register
from mono_quant.numerics.blocks import row_range
from mono_quant.numerics.granularity import Shape
from mono_quant.numerics.histogram import HistogramState, cells
from mono_quant.numerics.values import QParams
from mono_quant.observers.counting import FINE, CountingObserver
from mono_quant.observers.minmax import MinMax
from mono_quant.observers.mse import MSE
from mono_quant.observers.percentile import Percentile
from mono_quant.observers.search import WIDE, least_squared_error, squared_errors

_WORTH_DB = 0.05
"""What a simpler range may lose against the least squared error and still be preferred."""
_SIMPLER = (
    (MinMax.kind, None),
    ("percentile 99.999", Percentile(99.999)),
    ("percentile 99.99", Percentile(99.99)),
)


@attrs.frozen(eq=False)
class Choice:
    """What `Auto` chose for a tensor.

    Attributes:
        name: of the observer: "minmax", "percentile 99.999", "percentile 99.99" or "mse".
        low: low end of the range, float32 without a dimension.
        high: high end.
        reason: one sentence.
    """

    name: str
    low: Tensor
    high: Tensor
    reason: str


@register
@attrs.frozen
class Auto(CountingObserver):
    """The simplest range that is near the least squared error of a tensor, and the reason in words.

    On the histogram of what was seen, the squared error on the very grid is computed for min-max
    and the percentiles 99.999 and 99.99, in that order, and for the range where it is least. The
    first within 0.05 dB of the least is taken.
    """

    kind: ClassVar[str] = "auto"

    @property
    def most_bins(self) -> int:
        """Many."""
        return FINE

    def calculate_range(self, state: HistogramState, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """Return the range that was chosen."""
        choice = self.choose(state, scheme)
        return choice.low, choice.high

    def explain(self, state: HistogramState, scheme: Scheme) -> str:
        """Return in a sentence what was chosen and why."""
        return self.choose(state, scheme).reason

    def choose(self, state: HistogramState, scheme: Scheme) -> Choice:
        """Return what is chosen for a state on a grid."""
        ranges = [
            percentile.calculate_range(state, scheme) if percentile else (state.low, state.high)
            for _, percentile in _SIMPLER
        ]
        ranges.append(least_squared_error(state, scheme, WIDE))
        low, high = (torch.stack(ends) for ends in zip(*ranges, strict=True))
        errors = squared_errors(state, scheme, low, high).tolist()
        losses = [_decibels(error, errors[-1]) for error in errors]
        place = next(place for place, loss in enumerate(losses) if loss <= _WORTH_DB)
        name = [*(name for name, _ in _SIMPLER), MSE.kind][place]
        shape = _shape(state)
        if place == 0:
            reason = f"{name}: {shape}; clipping gains {losses[0]:.2f} dB at most"
        else:
            gain = losses[0] - losses[place]
            reason = (
                f"{name}: {shape}; clipping to [{float(low[place]):.4g}, {float(high[place]):.4g}] "
                f"cuts {100 * _clipped(state, low[place], high[place]):.2g}% of the values and "
                f"gains {gain:.2f} dB over min-max"
            )
            if place < len(_SIMPLER):
                reason += f", {losses[place]:.2f} dB from the least error"
        return Choice(name, low[place], high[place], reason)

    def range_of(self, x: Tensor, scheme: Scheme, block_size: Shape) -> tuple[Tensor, Tensor]:
        """Return the range of each block: min-max or, where it gains over the weight, `MSE`'s.

        The two are compared on the weight itself, by the squared error over all of its blocks.
        """
        low, high = row_range(x, block_size)
        if x.numel() == 0:
            return low, high
        searched = MSE().range_of(x, scheme, block_size)
        whole, least = (
            _missed(x, scheme, scheme.calculate_qparams(*ends, block_size=block_size))
            for ends in ((low, high), searched)
        )
        return (low, high) if _decibels(whole, least) <= _WORTH_DB else searched

    def remark(self, x: Tensor, scheme: Scheme, qparams: QParams) -> str | None:
        """Return which of the two was taken for a weight, and what it gains."""
        if x.numel() == 0:
            return None
        low, high = row_range(x, qparams.block_size)
        whole = scheme.calculate_qparams(low, high, block_size=qparams.block_size)
        gain = _decibels(_missed(x, scheme, whole), _missed(x, scheme, qparams))
        shape = _shape(self.observe(x))
        if gain == 0:
            return f"{MinMax.kind}: {shape}; clipping gains {_WORTH_DB} dB at most"
        return f"{MSE.kind}: {shape}; clipping gains {gain:.2f} dB over min-max"


def _missed(x: Tensor, scheme: Scheme, qparams: QParams) -> float:
    """Return the squared error that a grid leaves, over all blocks."""
    missed = scheme.fake_quantize(x, qparams) - x
    return float(missed.to(torch.float64).square_().sum())


def _decibels(error: float, least: float) -> float:
    """Return by how much an error exceeds the least."""
    if error <= least:
        return 0.0
    return 10 * math.log10(error / least) if least else math.inf


def _clipped(state: HistogramState, low: Tensor, high: Tensor) -> float:
    """Return the share of values outside a range."""
    lower, upper, counts = cells(state)
    middles = (lower + upper) / 2
    return float(counts[(middles < low) | (middles > high)].sum()) / float(counts.sum())


def _shape(state: HistogramState) -> str:
    """Return the distribution in words."""
    lower, upper, counts = cells(state)
    middles, weights = (lower + upper) / 2, counts / counts.sum()
    mean = (middles * weights).sum()
    variance = ((middles - mean).square() * weights).sum()
    if not float(variance) > 0:
        return "all values are alike"
    sides = "values of both signs"
    if float(state.low) >= 0 or float(state.high) <= 0:
        sides = "values of one sign"
    zeros = float(state.zeros) / float(counts.sum())
    alike = f", {zeros:.0%} of them zero" if zeros >= 0.01 else ""
    kurtosis = float((((middles - mean).square() / variance).square() * weights).sum())
    tails = "light" if kurtosis < 2.5 else "normal" if kurtosis < 4 else "heavy"
    return f"{sides}{alike}, {tails} tails (kurtosis {kurtosis:.1f})"
