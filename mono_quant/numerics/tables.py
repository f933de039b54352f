"""Tables of values in ascending order: the nearest one of each number, the way back, and a fit."""

import torch
from torch import Tensor

from mono_quant.numerics.scales import divisor_of

_CELLS = 1 << 12
"""Even cells that a table is laid over, to find a value's neighbourhood without a search."""

_APART = 4
"""Cells that lie between two borders at least, so that one comparison settles the rest."""

_QUANTILES = 513
_NOTHING = 1e-300


class Levels:
    """A table that the nearest levels of values are looked for in, many times."""

    def __init__(self, levels: Tensor) -> None:
        """Take ``float32 [n]``, ascending, of 2 to 256 values."""
        self._levels = levels
        self._borders = (levels[1:] + levels[:-1]) / 2
        self._first, last = float(levels[0]), float(levels[-1])
        self._width = (last - self._first) / _CELLS
        gaps = self._borders[1:] - self._borders[:-1]
        apart = gaps.numel() == 0 or float(gaps.min()) > _APART * self._width
        self._in_cells = self._width > 0 and apart and levels.device.type == "cpu"

    def nearest(self, x: Tensor) -> Tensor:
        """Return the place of the nearest level of each value; halfway, of the lower one.

        Exact: what `torch.bucketize` gives for the midpoints, for many values several times faster
        on a CPU.

        Args:
            x: finite float32 values, of any shape.

        Returns:
            uint8, shaped like `x`.
        """
        if not self._in_cells or x.numel() < _CELLS:
            return torch.bucketize(x.contiguous(), self._borders).to(torch.uint8)
        # borders below a cell's left neighbour: rounding may have put a value one cell too high
        edges = self._first + self._width * (torch.arange(_CELLS, dtype=torch.float32) - 1)
        below = torch.bucketize(edges, self._borders, out_int32=True)
        next_border = torch.cat([self._borders, self._borders.new_full((1,), torch.inf)])
        cells = ((x.flatten() - self._first) * (1 / self._width)).clamp_(0, _CELLS - 1)
        places = torch.index_select(below, 0, cells.to(torch.int32))
        places += x.flatten() > torch.index_select(next_border, 0, places)
        return places.to(torch.uint8).reshape(x.shape)

    def on_grid(self, x: Tensor, scale: Tensor) -> Tensor:
        """Return ``level * scale`` near each value: what searches compare many scales by.

        Of values within half a cell of halfway it may be either neighbour. Many values on a CPU are
        looked up in one step instead of three.

        Args:
            x: float32 values.
            scale: float32, of a shape that meets theirs; where it is 0, so are values.

        Returns:
            float32, shaped like `x`.
        """
        divisor = divisor_of(scale)
        per_cell = 1 / (divisor * self._width)
        if not self._in_cells or x.numel() < _CELLS or not bool(per_cell.isfinite().all()):
            return look_up(self.nearest(x / divisor), self._levels).mul_(scale)
        middles = self._first + self._width * torch.arange(_CELLS + 1, dtype=torch.float32)
        by_cell = self._levels[torch.bucketize(middles, self._borders)]
        cells = (x * per_cell).add_(0.5 - self._first / self._width).clamp_(0, _CELLS)
        return look_up(cells.to(torch.int32), by_cell).mul_(scale)


def look_up(places: Tensor, levels: Tensor) -> Tensor:
    """Return the level at each of `places`, integers of any shape, in the dtype of `levels`."""
    return torch.index_select(levels, 0, places.flatten().to(torch.int32)).reshape(places.shape)


def spread_levels(values: Tensor, count: int) -> Tensor:
    """Return `count` levels as dense as the cube root of the density of `values`, one of them zero.

    For many levels that is where the squared error is least; a fit begins there. Source: Panter and
    Dite, "Quantization Distortion in Pulse-Count Modulation with Nonuniform Spacing of Levels",
    Proceedings of the IRE 39 (1951).

    Args:
        values: float32 ``[n]``, at least one.
        count: of levels.

    Returns:
        float32 ``[count]``, in ascending order.
    """
    chances = torch.linspace(0, 1, _QUANTILES, device=values.device)
    ordered = values.sort().values
    edges = ordered[(chances * (len(ordered) - 1)).round().to(torch.int64)].to(torch.float64)
    # a quantile of width w has density 1 / w, and so w * (1 / w) ** (1 / 3) levels
    reached = (edges[1:] - edges[:-1]).pow(2 / 3).cumsum(0)
    wanted = (torch.arange(count, device=values.device) + 0.5) / count * reached[-1]
    places = torch.searchsorted(reached, wanted).clamp_(max=len(reached) - 1)
    before = torch.where(places > 0, reached[(places - 1).clamp(min=0)], 0.0)
    share = (wanted - before) / (reached[places] - before).clamp(min=_NOTHING)
    levels = edges[places] + share * (edges[places + 1] - edges[places])
    levels[levels.abs().argmin()] = 0
    return levels.sort().values.to(torch.float32)


def fitted(values: Tensor, weights: Tensor, levels: Tensor, zero: int, steps: int) -> Tensor:
    """Return the table that leaves the least weighted squared error, near the one begun with.

    Each level moves to the weighted mean of the values nearest to it, until none moves: k-means in
    one dimension. Source: Lloyd, "Least Squares Quantization in PCM", IEEE Transactions on
    Information Theory 28 (1982).

    Args:
        values: float32 ``[n]``.
        weights: of their squared errors, float32 ``[n]``.
        levels: to begin with, ``float32 [k]`` in ascending order.
        zero: place of the level that stays what it is.
        steps: how many at most.

    Returns:
        float32 ``[k]``, in ascending order. A level to which no value is nearest stays.
    """
    ordered, order = values.sort()
    sums = values.new_zeros(2, len(values) + 1, dtype=torch.float64)  # of what lies before a place
    sums[0, 1:] = weights[order].to(torch.float64).cumsum(0)
    sums[1, 1:] = (weights * values)[order].to(torch.float64).cumsum(0)
    ends = torch.tensor([0, len(values)], device=values.device)
    for _ in range(steps):
        inner = torch.searchsorted(ordered, (levels[1:] + levels[:-1]) / 2, right=True)
        total, moments = sums[:, torch.cat([ends[:1], inner, ends[1:]])].diff().unbind()
        means = moments / total
        moved = torch.where(total > 0, means.to(torch.float32), levels)
        moved[zero] = levels[zero]
        moved = moved.sort().values
        if torch.equal(moved, levels):
            break
        levels = moved
    return levels
