"""The mean of a clipped normal distribution, against an integral in float64."""

import math

import pytest
import torch
from torch import Tensor

from mono_quant.numerics.normal import clipped_mean

MEANS = (-9.0, -1.5, 0.0, 0.7, 6.0, 20.0)
STDS = (0.01, 0.5, 3.0, 40.0)
ENDS = ((0.0, math.inf), (0.0, 6.0), (-1.0, 1.0), (-math.inf, 2.0), (-math.inf, math.inf))


def integral(mean: float, std: float, low: float, high: float) -> float:
    """Return the expectation by the midpoint rule over 24 standard deviations."""
    steps = 400_000
    z: Tensor = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps * 24 - 12
    weights = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi) * (24 / steps)
    return float(((mean + std * z).clamp(low, high) * weights).sum())


@pytest.mark.parametrize(("low", "high"), ENDS)
def test_it_is_the_integral(low: float, high: float) -> None:
    for mean in MEANS:
        for std in STDS:
            found = clipped_mean(torch.tensor(mean), torch.tensor(std).double(), low, high)
            expected = integral(mean, std, low, high)
            assert float(found) == pytest.approx(expected, rel=1e-6, abs=1e-6 * std)


def test_it_is_the_mean_of_draws() -> None:
    torch.manual_seed(0)
    draws = 1.2 + 2.5 * torch.randn(4_000_000, dtype=torch.float64)
    found = clipped_mean(torch.tensor(1.2), torch.tensor(2.5), 0, 6)
    assert float(found) == pytest.approx(float(draws.clamp(0, 6).mean()), abs=5e-3)


def test_without_spread_it_is_the_mean_itself_clipped() -> None:
    means = torch.tensor([-1.0, 2.0, 7.0])
    found = clipped_mean(means, torch.zeros(3), 0.0, 6.0)
    assert found.tolist() == [0.0, 2.0, 6.0]
    assert found.dtype == torch.float64
