"""The range that loses the least information, as TensorRT calibrates."""

import math
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from mono_quant.base import Scheme
from mono_quant.configurable import register
from mono_quant.numerics.blocks import block_range, to_blocks
from mono_quant.numerics.granularity import Shape
from mono_quant.numerics.histogram import HistogramState, cells
from mono_quant.observers.counting import CountingObserver, check_bins

_BITS = 8  # where codes are floats
_AT_ONCE = 1 << 18  # entries of the table of candidates
_CANDIDATES = 256


@register
@attrs.frozen
class Entropy(CountingObserver):
    """The threshold on ``|x|`` of least Kullback-Leibler divergence KL(P || Q).

    P is the histogram of ``|x|`` up to the threshold, what lies beyond it added to its last bin. Q
    is the histogram up to the threshold without what lies beyond, its bins pooled into as many
    levels as the grid has for magnitudes, each level's count spread evenly over those of its bins
    that are not empty. A threshold at which P has a bin that Q has not diverges, and is not chosen;
    the largest magnitude never does, and the largest of equals is chosen.

    Two choices that the source leaves open: values that are exactly zero lie on every grid and are
    not counted, and the first bin is given the count of the second, because a spike next to zero,
    as of ReLU or GELU, would decide alone. The levels for magnitudes are ``2 ** (bits - 1)``, 128
    at 8 bits, and ``2 ** bits`` for values of one sign on an asymmetric grid. A threshold t makes
    the range ``[-t, t]``, cut at the extremes.

    It fits the shape of the distribution and not the squared error, which it may leave far from the
    least; see `Auto`.

    Source: Migacz, "8-bit Inference with TensorRT", GPU Technology Conference 2017.

    Attributes:
        bins: the most bins of ``|x|``. Their width is a power of two, so that half as many may be
            in use. At most 256 thresholds are tried, evenly spread.
    """

    kind: ClassVar[str] = "entropy"
    bins: int = 2048

    def __attrs_post_init__(self) -> None:
        """Refuse a histogram that is none."""
        check_bins(self.bins)

    @property
    def most_bins(self) -> int:
        """Those of both signs."""
        return 2 * self.bins

    def calculate_range(self, state: HistogramState, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """Return the threshold on both sides, cut at the extremes."""
        counts, width = self._magnitudes(state)
        one_sided = bool((state.low >= 0) | (state.high <= 0))
        symmetric = scheme.code_min < 0
        bits = scheme.code_bits or _BITS
        levels = 1 << (bits if one_sided and not symmetric else bits - 1)
        kept = _least_divergence(counts, levels)
        if kept == counts.numel():
            return state.low, state.high
        threshold = kept * width
        return state.low.clamp(min=-threshold), state.high.clamp(max=threshold)

    def range_of(self, x: Tensor, scheme: Scheme, block_size: Shape) -> tuple[Tensor, Tensor]:
        """Return the range of each block, found on a histogram of the block.

        It costs some milliseconds a block. A block of fewer values than `bins` keeps its extremes:
        it has no distribution to speak of.
        """
        low, high = block_range(x, block_size)
        if torch.Size(block_size).numel() < self.bins or x.numel() == 0:
            return low, high
        blocks = to_blocks(x, block_size)  # [n0, b0, n1, b1, ...]
        dims = list(range(blocks.dim()))
        rows = blocks.permute(dims[::2] + dims[1::2]).reshape(low.numel(), -1)  # [blocks, values]
        found = [self.calculate_range(self.observe(row), scheme) for row in rows]
        lows, highs = zip(*found, strict=True)
        return torch.stack(lows).reshape(low.shape), torch.stack(highs).reshape(high.shape)

    def _magnitudes(self, state: HistogramState) -> tuple[Tensor, float]:
        """Return the counts of |x| without zeros, float64, and the width of a bin."""
        width = 2.0 ** int(state.exponent)
        lower, upper, counts = cells(state)
        middles = ((lower + upper) / 2).abs()
        held = upper > lower  # of what has a width; zeros have none
        held |= middles > 0
        places = (middles[held] / width).floor().to(torch.int64)
        magnitudes = torch.bincount(places, counts[held].to(torch.float64), minlength=1)
        while magnitudes.numel() > self.bins:
            even = torch.nn.functional.pad(magnitudes, (0, magnitudes.numel() % 2))
            magnitudes, width = even.reshape(-1, 2).sum(1), width * 2
        return magnitudes, width


def _least_divergence(counts: Tensor, levels: int) -> int:
    """Return how many bins to keep so that KL(P || Q) is least; of equals, the most.

    Args:
        counts: float64 ``[bins]``.
        levels: into how many the bins that are kept are pooled.
    """
    bins = counts.numel()
    if bins <= levels or not bool(counts.any()):
        return bins
    counts = counts.clone()
    counts[0] = counts[1]
    step = math.ceil((bins - levels) / _CANDIDATES)
    candidates = torch.arange(bins, levels - 1, -step, device=counts.device)  # largest first
    at_once = max(1, _AT_ONCE // bins)
    found = [_divergences(counts, part, levels) for part in torch.split(candidates, at_once)]
    return int(candidates[torch.cat(found).argmin()])


def _divergences(counts: Tensor, kept: Tensor, levels: int) -> Tensor:
    """Return KL(P || Q) for each number of bins that are kept, float64 ``[n]``."""
    bins = counts.numel()
    places = torch.arange(bins, device=counts.device)
    inside = places < kept[:, None]  # [n, bins]
    inner = torch.where(inside, counts, 0.0)
    reference = inner.clone()
    reference[torch.arange(kept.numel()), kept - 1] += counts.sum() - inner.sum(1)
    level = (places * levels // kept[:, None]).clamp(max=levels - 1)  # [n, bins]
    empty = torch.zeros(kept.numel(), levels, dtype=counts.dtype, device=counts.device)
    held = (inner > 0).to(counts.dtype)
    mean = empty.scatter_add(1, level, inner) / empty.scatter_add(1, level, held).clamp(min=1)
    spread = mean.gather(1, level) * held
    p = reference / reference.sum(1, keepdim=True)
    q = spread / spread.sum(1, keepdim=True)
    terms = torch.where(p > 0, p * (p / q).log(), 0.0)  # log(p / 0) is infinite, and 0 log 0 is 0
    return terms.sum(1).nan_to_num(nan=torch.inf, posinf=torch.inf)
