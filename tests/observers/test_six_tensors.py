"""Six distributions: how far each observer is from the range of least squared error, in dB."""

import math
from typing import TypeVar

import pytest
import torch
from torch.ao.quantization import HistogramObserver, MinMaxObserver, MovingAverageMinMaxObserver

from mono_quant import (
    MSE,
    Affine,
    Auto,
    Entropy,
    Histogram,
    MinMax,
    MovingAverage,
    Observer,
    Percentile,
    PerTensor,
)
from tests.observers.distributions import batches, distributions, least_error, squared_error

StateT = TypeVar("StateT")
TORCHS = type[MinMaxObserver] | type[MovingAverageMinMaxObserver] | type[HistogramObserver]
SCHEME = Affine(8, symmetric=False, granularity=PerTensor(), scale_dtype=torch.float32)
NAMES = tuple(distributions())
tensor = pytest.mark.parametrize("name", NAMES)

# Measured once, by an independent implementation, on the same six tensors.
PUBLISHED = {
    "normal": (0.03166471, 132, 0.031090157, 130),
    "student_t3": (0.39229023, 130, 0.2490789, 66),
    "laplace": (0.090684824, 145, 0.067579508, 123),
    "relu_normal": (0.017519273, 0, 0.014888743, 0),
    "gelu_normal": (0.017231304, 10, 0.015529575, 11),
    "outlier": (0.28978848, 151, 0.11697391, 218),
}
OPTIMA = dict(zip(NAMES, (41.21, 24.03, 35.30, 46.14, 42.86, 22.63), strict=True))


def found(observer: Observer[StateT], name: str) -> tuple[float, float]:
    """Return the range that an observer proposes after eight batches."""
    first, *rest = map(observer.observe, batches(distributions()[name]))
    for state in rest:
        first = observer.merge(first, state)
    low, high = observer.calculate_range(first, SCHEME)
    return float(low), float(high)


def qparams(observer: Observer[StateT], name: str, scheme: Affine = SCHEME) -> tuple[float, int]:
    """Return scale and zero point."""
    low, high = map(torch.tensor, found(observer, name))
    made = scheme.calculate_qparams(low, high, block_size=())
    assert made.scale is not None
    return float(made.scale), 0 if made.zero_point is None else int(made.zero_point)


def torchs(observer: TORCHS, name: str, symmetric: bool = False) -> tuple[float, int]:
    """Return scale and zero point of one of torch's observers after eight batches."""
    kind = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    made = observer(dtype=torch.qint8 if symmetric else torch.quint8, qscheme=kind)
    for batch in batches(distributions()[name]):
        made(batch)
    scale, zero_point = made.calculate_qparams()
    return float(scale), int(zero_point)


def loss(name: str, low: float, high: float) -> float:
    """Return by how many dB the error exceeds the least."""
    return 10 * math.log10(squared_error(distributions()[name], low, high) / least_error(name))


@tensor
def test_brute_force_finds_the_optimum_that_was_measured_elsewhere(name: str) -> None:
    power = float(distributions()[name].to(torch.float64).square().sum())
    assert 10 * math.log10(power / least_error(name)) == pytest.approx(OPTIMA[name], abs=0.01)


@tensor
@pytest.mark.parametrize("observer", [MSE(), Auto()], ids=repr)
def test_it_is_within_a_tenth_of_a_decibel_of_the_optimum(
    name: str, observer: Observer[object]
) -> None:
    assert loss(name, *found(observer, name)) <= 0.1


@tensor
def test_the_histogram_is_no_worse_than_torchs(name: str) -> None:
    scale, zero_point = torchs(HistogramObserver, name)
    theirs = loss(name, -zero_point * scale, (255 - zero_point) * scale)
    assert loss(name, *found(Histogram(), name)) <= max(theirs, 0.03)


def test_the_histograms_worst_case_is_far_below_torchs() -> None:
    assert max(loss(name, *found(Histogram(), name)) for name in NAMES) < 0.67 / 10


@tensor
@pytest.mark.parametrize(
    ("observer", "theirs", "place"),
    [(MinMax(), MinMaxObserver, 0), (MovingAverage(0.01), MovingAverageMinMaxObserver, 2)],
    ids=["minmax", "movingaverage"],
)
def test_scales_and_zero_points_are_torchs(
    name: str, observer: Observer[object], theirs: TORCHS, place: int
) -> None:
    scale, zero_point = qparams(observer, name)
    expected, expected_zero_point = torchs(theirs, name)
    assert (f"{scale:.8g}", zero_point) == (f"{expected:.8g}", expected_zero_point)
    published = PUBLISHED[name][place : place + 2]
    assert scale == pytest.approx(published[0], rel=5e-8)  # half of the last digit
    assert zero_point == published[1]


@tensor
@pytest.mark.parametrize(
    ("observer", "theirs"),
    [(MinMax(), MinMaxObserver), (MovingAverage(0.01), MovingAverageMinMaxObserver)],
    ids=["minmax", "movingaverage"],
)
def test_symmetric_scales_differ_by_the_divisor_only(
    name: str, observer: Observer[object], theirs: TORCHS
) -> None:
    """Torch divides by half the number of steps, 127.5, and this package by the largest code."""
    scheme = Affine(8, granularity=PerTensor(), scale_dtype=torch.float32)
    scale, zero_point = qparams(observer, name, scheme)
    expected, expected_zero_point = torchs(theirs, name, symmetric=True)
    assert scale * 127 == pytest.approx(expected * 127.5, rel=1e-6)
    assert zero_point == expected_zero_point == 0


@pytest.mark.parametrize(
    ("observer", "losses"),
    [
        (MinMax(), (0.38, 0.68, 0.66, 0.22, 0.52, 0.68)),
        (MovingAverage(), (0.26, 3.47, 1.44, 3.25, 0.45, 6.15)),
        (Percentile(99.9), (6.14, 9.05, 7.80, 11.75, 8.60, 11.54)),
        (Percentile(99.99), (0.06, 5.26, 1.68, 3.54, 0.49, 11.28)),
        (Percentile(99.999), (0.26, 1.05, 0.13, 0.07, 0.04, 0.15)),
    ],
    ids=repr,
)
def test_losses_are_those_of_an_independent_implementation(
    observer: Observer[object], losses: tuple[float, ...]
) -> None:
    for name, expected in zip(NAMES, losses, strict=True):
        assert loss(name, *found(observer, name)) == pytest.approx(expected, abs=0.02)


def test_entropy_does_not_collapse_on_values_of_one_sign() -> None:
    """With its zeros counted, the plain definition loses 31 dB here."""
    assert loss("relu_normal", *found(Entropy(), "relu_normal")) < 5
