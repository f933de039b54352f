"""The normal distribution."""

import math

import torch
from torch import Tensor


def clipped_mean(mean: Tensor, std: Tensor, low: float, high: float) -> Tensor:
    """Return the expectation of ``clamp(X, low, high)`` for normal X.

    With ``a = (low - mean) / std``, ``b = (high - mean) / std``, the density p and the distribution
    function P of the standard normal, it is ``low P(a) + high (1 - P(b)) + mean (P(b) - P(a)) +
    std (p(a) - p(b))``.

    Source: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias
    Correction", appendix C, https://arxiv.org/abs/1906.04721.

    Args:
        mean: of X, any shape; computed in float64.
        std: standard deviations, zero or more, of that shape.
        low: lower end, may be infinite.
        high: upper end, may be infinite.
    """
    mean, std = mean.to(torch.float64), std.to(torch.float64)
    spread = torch.where(std > 0, std, 1.0)
    ends = [(end - mean) / spread for end in (low, high)]
    below, above = torch.special.ndtr(ends[0]), torch.special.ndtr(-ends[1])
    density = [torch.exp(-end.square() / 2) / math.sqrt(2 * math.pi) for end in ends]
    found = mean * (1 - below - above) + spread * (density[0] - density[1])
    found = found + (low * below if math.isfinite(low) else 0.0)
    found = found + (high * above if math.isfinite(high) else 0.0)
    return torch.where(std > 0, found, mean.clamp(low, high))
