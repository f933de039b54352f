"""Six fixed tensors of 64 x 1024 values, and the least error that any range leaves on them."""

from collections.abc import Iterator, Mapping
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

LEVELS = 255
"""Steps of an asymmetric grid of 8 bits."""


@cache
def distributions() -> Mapping[str, Tensor]:
    """Return the tensors by name, drawn from one generator in this order."""
    generator = torch.Generator().manual_seed(1234)

    def normal() -> Tensor:
        return torch.randn(64, 1024, generator=generator)

    first, second = normal(), normal()
    chi_squared = torch.stack([normal() for _ in range(3)]).square().sum(0)
    uniform = torch.rand(64, 1024, generator=generator) - 0.5
    laplace = -uniform.sign() * torch.log1p(-2 * uniform.abs() + 1e-7)
    relu, gelu = normal().relu(), functional.gelu(normal())
    outlier = normal().flatten()
    outlier[::8192] *= 30
    return {
        "normal": first,
        "student_t3": second / (chi_squared / 3).sqrt(),
        "laplace": laplace,
        "relu_normal": relu,
        "gelu_normal": gelu,
        "outlier": outlier.reshape(64, 1024),
    }


def batches(x: Tensor) -> tuple[Tensor, ...]:
    """Return a tensor as eight batches."""
    return x.chunk(8)


def squared_error(x: Tensor, low: float, high: float) -> float:
    """Return the summed squared error of 8 asymmetric bits over a range, in float64."""
    low, high = min(low, 0.0), max(high, 0.0)
    values, scale = x.to(torch.float64), (high - low) / LEVELS
    zero_point = min(max(round(-low / scale), 0), LEVELS)
    codes = ((values / scale).round() + zero_point).clamp(0, LEVELS)
    return float(((codes - zero_point) * scale - values).square().sum())


def candidates(x: Tensor) -> Iterator[tuple[float, float]]:
    """Yield ranges from the extremes down: both ends together, then each on its own."""
    low, high = float(x.min()), float(x.max())
    together = [1 - step / 200 for step in range(160)]
    yield from ((low * factor, high * factor) for factor in together)
    coarse = [1 - step / 40 for step in range(28)]
    yield from ((low * one, high * other) for one in coarse for other in coarse)


@cache
def least_error(name: str) -> float:
    """Return the least squared error that a range leaves on a tensor, by brute force."""
    x = distributions()[name]
    error, low, high = min((squared_error(x, *ends), *ends) for ends in candidates(x))
    near = [0.975 + step / 400 for step in range(21)]
    return min(error, *(squared_error(x, low * a, high * b) for a in near for b in near))
