"""The range of a histogram that leaves the least squared error on a grid."""

import torch
from torch import Tensor

from mono_quant.base import Scheme
from mono_quant.numerics.histogram import HistogramState, cells

WIDE = 2.0 ** -(torch.arange(65, dtype=torch.float64) / 8)
"""Factors from 1 down to 1/256, eight to the octave."""
_NEAR = torch.linspace(0.91, 1.09, 37, dtype=torch.float64)  # from one wide factor to the next
_ROUNDS = 4


def squared_errors(state: HistogramState, scheme: Scheme, low: Tensor, high: Tensor) -> Tensor:
    """Return the summed squared error that each of several ranges leaves.

    Values stand in the middle of their cell. The scheme itself quantizes them.

    Args:
        state: what was seen.
        scheme: the grid.
        low: float32 low ends ``[n]``.
        high: high ends ``[n]``.

    Returns:
        float64 ``[n]``.
    """
    lower, upper, counts = cells(state)
    values = ((lower + upper) / 2).to(torch.float32)
    rows = values.expand(1, low.numel(), values.numel())  # (1, n, values)
    block = (1, 1, values.numel())
    qparams = scheme.calculate_qparams(
        low.reshape(1, -1, 1), high.reshape(1, -1, 1), block_size=block
    )
    missed = scheme.fake_quantize(rows, qparams).to(torch.float64) - rows
    return (missed.square_() @ counts.to(torch.float64)).reshape(-1)


def least_squared_error(
    state: HistogramState, scheme: Scheme, factors: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the range that leaves the least squared error of those that are tried.

    Both ends are shrunk from the extremes by each of `factors` together, then each end alone, and
    then moved a little, each alone, until nothing improves. The first of equals wins, so the error
    never exceeds that of the extremes.

    Args:
        state: what was seen.
        scheme: the grid.
        factors: float64 ``[n]``, from 1 down.

    Returns:
        two float32 tensors without a dimension.
    """
    factors, near = factors.to(state.low.device), _NEAR.to(state.low.device)
    ends = torch.stack([state.low, state.high]).to(torch.float64)
    tried = _Best(state, scheme, ends)
    tried.improve(ends * factors[:, None])
    for place in (0, 1):
        tried.improve(_moved(tried.ends, place, ends[place] * factors))
    for _ in range(_ROUNDS):
        before = tried.error
        for place in (0, 1):
            moved = (tried.ends[place] * near).clamp(ends[0], ends[1])
            tried.improve(_moved(tried.ends, place, moved))
        if tried.error == before:
            break
    low, high = tried.ends.to(torch.float32)
    return low, high


class _Best:
    """The best range so far."""

    def __init__(self, state: HistogramState, scheme: Scheme, ends: Tensor) -> None:
        self._state, self._scheme = state, scheme
        self.ends, self.error = ends, torch.inf
        self.improve(ends[None])

    def improve(self, ranges: Tensor) -> None:
        """Try ranges ``[n, 2]``."""
        low, high = ranges.to(torch.float32).unbind(1)
        errors = squared_errors(self._state, self._scheme, low, high)
        place = int(errors.argmin())
        if float(errors[place]) < self.error:
            self.ends, self.error = ranges[place], float(errors[place])


def _moved(ends: Tensor, place: int, positions: Tensor) -> Tensor:
    """Return ranges ``[n, 2]`` of which one end lies at each of `positions`."""
    ranges = ends.repeat(positions.numel(), 1)
    ranges[:, place] = positions
    return ranges
