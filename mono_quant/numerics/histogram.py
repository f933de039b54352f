"""Histograms of bounded size that grow with what they see and lose no count.

A bin's width is a power of two and its edges are multiples of the width, so zero is always an edge
and a bin of a wider histogram is the union of two of a narrower one. When the range grows, bins are
joined in pairs; nothing is interpolated, so merging is exact in any order.
"""

import math

import attrs
import torch
from torch import Tensor

from mono_quant.errors import InputError
from mono_quant.numerics.extremes import check_ends, finite_ends

SAMPLED_FROM = 1 << 16
"""A tensor of more values than this is sampled."""

_SAMPLE = 1 << 15
_BLOCK = 256
_TAIL_BLOCKS = 64
_SAFE_EXPONENT = 120  # the power of two is a float32
_MOST_VALUES = 2.0**62  # of which 64 bits hold the sum
_LOWEST_EXPONENT = -200  # below that of any histogram of float32 values that are not all zero


@attrs.frozen(eq=False)
class HistogramState:
    """How often values fell into each bin; frozen, and bounded by the number of bins.

    Attributes:
        low: the smallest value seen, exact, float32 without a dimension.
        high: the largest.
        exponent: bins are ``2 ** exponent`` wide; int64 without a dimension. It is the smallest one
            at which the bins from `low` to `high`, zero included, are not too many.
        counts: int64 ``[n]``, values other than zero in each bin; the first bin holds `low` or
            begins at zero, and a bin holds its lower edge.
        zeros: how many values were exactly zero, int64 without a dimension.
    """

    low: Tensor
    high: Tensor
    exponent: Tensor
    counts: Tensor
    zeros: Tensor


@attrs.frozen
class _Bins:
    """Bins ``2 ** exponent`` wide, the first of them at ``first * 2 ** exponent``."""

    exponent: int
    first: int
    count: int

    @classmethod
    def covering(cls, low: float, high: float, most: int) -> "_Bins":
        """Return the narrowest bins, `most` of them or fewer, from low to high and over zero."""
        low, high = min(low, 0.0), max(high, 0.0)
        if low == high:
            return cls(_LOWEST_EXPONENT, 0, 1)
        exponent = math.frexp(high - low)[1] - most.bit_length() - 1  # too narrow, by a few
        while True:
            bins = cls.at(exponent, low, high)
            if bins.count <= most:
                return bins
            exponent += 1

    @classmethod
    def at(cls, exponent: int, low: float, high: float) -> "_Bins":
        """Return the bins of a width from low to high."""
        first, last = (math.floor(math.ldexp(end, -exponent)) for end in (low, high))
        return cls(exponent, first, last - first + 1)

    @classmethod
    def of(cls, state: HistogramState) -> "_Bins":
        """Return the bins of a state."""
        low, _ = finite_ends(state.low, state.high)
        exponent = int(state.exponent)
        first = math.floor(math.ldexp(min(low, 0.0), -exponent))
        return cls(exponent, first, state.counts.numel())

    def places(self, values: Tensor) -> Tensor:
        """Return the place of each of float32 `values` among the bins, int32."""
        # Exact, because a power of two neither rounds nor, in range, under- or overflows.
        wide = values if -_SAFE_EXPONENT < self.exponent <= 0 else values.to(torch.float64)
        return (wide * 2.0**-self.exponent).floor_().to(torch.int32).sub_(self.first)

    def tally(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many of float32 `values` lie in each bin, zeros apart, and the zeros."""
        places = self.places(values).masked_fill_(values == 0, self.count)
        counts = torch.bincount(places, minlength=self.count + 1)
        return counts[:-1], counts[-1]

    def join(self, state: HistogramState) -> Tensor:
        """Return the counts of a state in these bins, which are as wide or wider."""
        narrow = _Bins.of(state)
        shift = min(self.exponent - narrow.exponent, 63)  # of 64 bits
        places = torch.arange(narrow.count, device=state.counts.device) + narrow.first
        joined = torch.zeros(self.count, dtype=torch.int64, device=state.counts.device)
        return joined.index_add_(0, (places >> shift) - self.first, state.counts)


def observe(x: Tensor, bins: int) -> HistogramState:
    """Return the histogram of the values of `x`, `bins` bins or fewer.

    Up to `SAMPLED_FROM` values, every value is counted. A larger tensor costs two reductions: its
    extremes are found exactly in blocks of 256 values, and every value beyond the 65th largest (or
    smallest) extreme of a block is counted exactly, bin by bin: about the 64 outermost values at
    each end, or more. The others are counted from about 32768 of them, evenly spread and scaled up
    to their number; the step of the sample shares no factor with the tensor's size, so that every
    channel is met. The counts always sum to the number of values.

    Args:
        x: one value or more of any shape and dtype; counted as float32.
        bins: how many there may be; 2 or more.

    Raises:
        InputError: `x` is empty, or holds NaN or infinity.
    """
    flat = x.detach().reshape(-1)
    if flat.numel() == 0:
        raise InputError("an empty tensor has no extremes")
    if flat.numel() > SAMPLED_FROM:
        return _observe_large(flat, bins)
    values = flat.to(torch.float32)
    low, high = values.amin(), values.amax()
    layout = _Bins.covering(*finite_ends(low, high), bins)
    return _state(low, high, layout, *layout.tally(values))


def merge(left: HistogramState, right: HistogramState, bins: int) -> HistogramState:
    """Return the histogram of both; exact, whatever the order, for states of the same `bins`."""
    low, high = torch.minimum(left.low, right.low), torch.maximum(left.high, right.high)
    layout = _Bins.covering(*finite_ends(low, high), bins)
    counts = layout.join(left) + layout.join(right)
    return _state(low, high, layout, counts, left.zeros + right.zeros)


def check(state: HistogramState, bins: int) -> None:
    """Refuse what `observe` and `merge` make of no values; for a state that comes from a file.

    Raises:
        InputError: its extremes are none, its bins are not those of its extremes, or its counts are
            no numbers of values.
    """
    check_ends(state.low, state.high)
    expected = _Bins.covering(*finite_ends(state.low, state.high), bins)
    exponent, count = int(state.exponent), state.counts.numel()
    if (exponent, count) != (expected.exponent, expected.count):
        raise InputError(
            f"a histogram has {count} bins of 2^{exponent}, where {expected.count} of "
            f"2^{expected.exponent} were expected"
        )
    counts = torch.cat([state.counts, state.zeros.reshape(1)])
    if bool((counts < 0).any()) or not 0 < float(counts.to(torch.float64).sum()) < _MOST_VALUES:
        raise InputError("the counts of a histogram are no numbers of values")


def cells(state: HistogramState) -> tuple[Tensor, Tensor, Tensor]:
    """Return lower ends, upper ends and counts of what is not empty, in ascending order.

    Zero is a cell of its own, without a width. The outermost ends are the extremes.

    Returns:
        float64 ends ``[n]`` twice, and int64 counts ``[n]``.
    """
    bins = _Bins.of(state)
    width = 2.0**bins.exponent
    edges = torch.arange(bins.first, bins.first + bins.count + 1, device=state.counts.device)
    edges = edges.to(torch.float64) * width
    lower, upper = edges[:-1].clamp(min=state.low), edges[1:].clamp(max=state.high)
    nothing = torch.zeros(1, dtype=torch.float64, device=edges.device)
    middle = -bins.first
    lower = torch.cat([lower[:middle], nothing, lower[middle:]])
    upper = torch.cat([upper[:middle], nothing, upper[middle:]])
    counts = torch.cat([state.counts[:middle], state.zeros.reshape(1), state.counts[middle:]])
    held = counts > 0
    return lower[held], upper[held], counts[held]


def quantile(state: HistogramState, share: float) -> Tensor:
    """Return the value that `share` of what was seen lies below, in float32.

    Exact to the width of a bin, in which values are taken to lie evenly; 0 and 1 are the extremes.
    """
    lower, upper, counts = cells(state)
    ends = counts.cumsum(0)
    rank = share * (int(ends[-1]) - 1)  # as torch.quantile counts, lines between values included
    found = []
    for whole in (math.floor(rank), math.ceil(rank)):
        place = int(torch.searchsorted(ends, whole, right=True))
        count = int(counts[place])
        inside = (whole - (int(ends[place]) - count) + 0.5) / count
        found.append(float(lower[place]) * (1 - inside) + float(upper[place]) * inside)
    if rank <= 0:
        return state.low
    if rank >= int(ends[-1]) - 1:
        return state.high
    value = found[0] + (found[1] - found[0]) * (rank - math.floor(rank))
    return torch.tensor(value, dtype=torch.float32, device=state.low.device)


def evenly_spread(flat: Tensor, most: int) -> Tensor:
    """Return about `most` of the values of a tensor of one dimension, or all if there are fewer.

    The step from one to the next shares no factor with the tensor's size, so that every channel is
    met.
    """
    step = max(1, -(-flat.numel() // most))
    while math.gcd(step, flat.numel()) > 1:
        step += 1
    return flat[::step].contiguous()


def _observe_large(flat: Tensor, bins: int) -> HistogramState:
    size = flat.numel()
    whole = size - size % _BLOCK
    blocks, rest = flat[:whole].view(-1, _BLOCK), flat[whole:]
    lows, highs = blocks.amin(1), blocks.amax(1)
    low = torch.cat([lows, rest]).amin().to(torch.float32)
    high = torch.cat([highs, rest]).amax().to(torch.float32)
    layout = _Bins.covering(*finite_ends(low, high), bins)
    # Bins beyond those of the bounds hold no value of any other block: there, counts are exact.
    smallest, largest = lows.topk(_TAIL_BLOCKS + 1, largest=False), highs.topk(_TAIL_BLOCKS + 1)
    bounds = layout.places(
        torch.stack([smallest.values[-1], largest.values[-1]]).to(torch.float32)
    ).tolist()
    chosen = torch.zeros_like(lows, dtype=torch.bool)
    chosen[smallest.indices[:-1]] = chosen[largest.indices[:-1]] = True
    tail = torch.cat([blocks[chosen].flatten(), rest])
    tails, _ = layout.tally(tail.to(torch.float32))
    sampled, zeros = layout.tally(evenly_spread(flat, _SAMPLE).to(torch.float32))
    inner = slice(bounds[0], bounds[1] + 1)
    counts = torch.cat([sampled[inner], zeros.reshape(1)])
    if not bool(counts.any()):  # by a hair's breadth, the sample met nothing but tails
        return _state(low, high, layout, *layout.tally(flat.to(torch.float32)))
    tails[inner] = 0
    counts = _scaled(counts, size - int(tails.sum()))
    tails[inner] = counts[:-1]
    return _state(low, high, layout, tails, counts[-1])


def _scaled(counts: Tensor, total: int) -> Tensor:
    """Return counts in proportion to `counts` whose sum is `total`."""
    sums = counts.cumsum(0)
    sums = sums * total // sums[-1]  # rounding the sums, no count is lost
    return sums.diff(prepend=sums.new_zeros(1))


def _state(low: Tensor, high: Tensor, bins: _Bins, counts: Tensor, zeros: Tensor) -> HistogramState:
    exponent = torch.tensor(bins.exponent, device=counts.device)
    return HistogramState(low, high, exponent, counts, zeros)
