"""Observers beside torch's: dB below the best range, cost of a batch, and what sampling costs."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor
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
from mono_quant.base import AnyStatistic
from tests.benchmarks.measure import median_seconds, print_table
from tests.observers.distributions import batches, distributions, least_error, squared_error

SCHEME = Affine(8, symmetric=False, granularity=PerTensor(), scale_dtype=torch.float32)
REPEATS = 15
_SHAPE = (2048, 1024)
_P = (99.999, 99.99)
_EXACT = 1 << 16  # values that are all counted

Found = tuple[float, float]
TORCHS = (MinMaxObserver, MovingAverageMinMaxObserver, HistogramObserver)


class Ours:
    """An observer whatever its state: how it folds and what it finds."""

    def __init__(self, observer: AnyStatistic) -> None:
        """Take an observer of any state."""
        self.observer = cast("Observer[object]", observer)

    def state(self, pieces: Sequence[Tensor]) -> object:
        """Return the state of all pieces."""
        first, *rest = map(self.observer.observe, pieces)
        for state in rest:
            first = self.observer.merge(first, state)
        return first

    def found(self, pieces: Sequence[Tensor]) -> Found:
        """Return the range of all pieces."""
        low, high = self.observer.calculate_range(self.state(pieces), SCHEME)
        return float(low), float(high)


OURS: Mapping[str, Ours] = {
    "MinMax": Ours(MinMax()),
    "MovingAverage": Ours(MovingAverage()),
    "Histogram": Ours(Histogram()),
    "Percentile(99.9)": Ours(Percentile(99.9)),
    "Percentile(99.99)": Ours(Percentile(99.99)),
    "Percentile(99.999)": Ours(Percentile(99.999)),
    "MSE": Ours(MSE()),
    "Entropy": Ours(Entropy()),
    "Auto": Ours(Auto()),
}


def main() -> None:
    """Print accuracy, cost and what sampling costs."""
    columns = ("observer", *distributions(), "worst")
    print("dB below the range of least squared error (brute force); 8 bits, asymmetric.\n")
    print_table(columns, _losses())
    print(f"Cost of a batch of {math.prod(_SHAPE)} float32 values; medians of {REPEATS}, by turns.")
    print("`copy` is a copy of that tensor; the range is asked for once, after all batches.\n")
    print_table(("observer", "ms a batch", "of a copy", "ms the range"), _costs())
    print(f"A batch of {math.prod(_SHAPE)} values, sampled, against all of its values counted:\n")
    expected = [f"above p = {p} (exact: {math.prod(_SHAPE) * (1 - p / 100):.0f})" for p in _P]
    columns = ("values", "Histogram: dB lost", "largest error of a cumulative share")
    print_table((*columns, *expected), _sampling())


def _losses() -> Iterator[tuple[str, ...]]:
    yield ("(optimum: SQNR)", *(f"{_optimum(name):.2f}" for name in distributions()), "")
    for cls in TORCHS:
        yield _row(f"torch {cls.__name__}", partial(_torchs, cls))
    for title, ours in OURS.items():
        yield _row(title, ours.found)


def _row(title: str, found: Callable[[Sequence[Tensor]], Found]) -> tuple[str, ...]:
    losses = []
    for name, x in distributions().items():
        error = squared_error(x, *found(batches(x)))
        losses.append(10 * math.log10(error / least_error(name)))
    return (title, *(f"{loss:.3f}" for loss in losses), f"{max(losses):.3f}")


def _optimum(name: str) -> float:
    power = float(distributions()[name].to(torch.float64).square().sum())
    return 10 * math.log10(power / least_error(name))


def _torchs(
    cls: type[MinMaxObserver] | type[MovingAverageMinMaxObserver] | type[HistogramObserver],
    pieces: Sequence[Tensor],
) -> Found:
    observer = cls(dtype=torch.quint8, qscheme=torch.per_tensor_affine)
    for piece in pieces:
        observer(piece)
    scale, zero_point = (float(part) for part in observer.calculate_qparams())
    return -zero_point * scale, (255 - zero_point) * scale


def _costs() -> Iterator[tuple[str, ...]]:
    x = torch.randn(_SHAPE, generator=torch.Generator().manual_seed(0))
    target = torch.empty_like(x)

    def copy() -> object:
        return target.copy_(x)

    for cls in TORCHS:
        observer = cls(dtype=torch.quint8, qscheme=torch.per_tensor_affine)
        yield _cost(f"torch {cls.__name__}", copy, partial(observer, x), observer.calculate_qparams)
    for title, ours in OURS.items():
        state = ours.state([x, x])

        def batch(ours: Ours = ours, state: object = state) -> object:
            return ours.observer.merge(state, ours.observer.observe(x))

        ask = partial(ours.observer.calculate_range, state, SCHEME)
        yield _cost(title, copy, batch, ask)


def _cost(
    title: str, copy: Callable[[], object], batch: Callable[[], object], ask: Callable[[], object]
) -> tuple[str, ...]:
    batch()
    copied, taken, asked = median_seconds([copy, batch, ask], REPEATS)
    return (title, f"{taken * 1e3:.2f}", f"{taken / copied:.1f}", f"{asked * 1e3:.1f}")


def _sampling() -> Iterator[tuple[str, ...]]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(_SHAPE, generator=generator)
    chi_squared = torch.randn((3, *_SHAPE), generator=generator).square().mean(0)
    channels = normal.clone()
    channels[:, 5] *= 40
    for title, x in {
        "normal": normal,
        "student_t3": normal / chi_squared.sqrt(),
        "relu_normal": normal.relu(),
        "an outlier channel": channels,
    }.items():
        pieces = torch.split(x.flatten(), _EXACT)
        sampled, exact = (Ours(Histogram()).found(part) for part in ([x], pieces))
        lost = 10 * math.log10(squared_error(x, *sampled) / squared_error(x, *exact))
        one, all_ = Histogram().observe(x), Ours(Histogram()).state(pieces)
        assert isinstance(all_, type(one))
        shares = (one.counts.cumsum(0) - all_.counts.cumsum(0)).abs() / x.numel()
        clipped = [str(int((x > Ours(Percentile(p)).found([x])[1]).sum())) for p in _P]
        yield (title, f"{lost:.4f}", f"{float(shares.max()):.4f}", *clipped)
