"""The histogram: no count is lost, and pieces give what the whole gives."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mono_quant import InputError
from mono_quant.numerics.histogram import (
    SAMPLED_FROM,
    HistogramState,
    cells,
    merge,
    observe,
    quantile,
)
from tests.helpers import noise, tensors

BINS = 32
LARGEST = float(torch.finfo(torch.float32).max)
PIECES = st.lists(
    st.one_of(
        st.integers(1, 12).flatmap(lambda n: tensors([n])),
        st.integers(1, 12).flatmap(lambda n: tensors([n], -LARGEST, LARGEST)),
        st.integers(1, 12).flatmap(lambda n: tensors([n], -1e-38, 1e-38)),
        st.integers(1, 3).map(torch.zeros),
    ),
    min_size=1,
    max_size=6,
)


def fold(pieces: list[Tensor], bins: int = BINS) -> HistogramState:
    first, *rest = (observe(piece, bins) for piece in pieces)
    for state in rest:
        first = merge(first, state, bins)
    return first


def seen(state: HistogramState) -> tuple[object, ...]:
    """Return everything a state holds."""
    return (
        float(state.low),
        float(state.high),
        int(state.exponent),
        state.counts.tolist(),
        int(state.zeros),
    )


def counted(values: list[float], bins: int) -> tuple[int, dict[int, int]]:
    """Return the exponent and the counts by bin of all values but zero, in exact arithmetic."""
    low, high = min(*values, 0.0), max(*values, 0.0)
    exponent = -300
    while math.floor(math.ldexp(high, -exponent)) - math.floor(math.ldexp(low, -exponent)) >= bins:
        exponent += 1
    places = [math.floor(math.ldexp(value, -exponent)) for value in values if value]
    return exponent, {place: places.count(place) for place in set(places)}


@given(PIECES)
def test_pieces_in_any_cut_have_the_histogram_of_the_whole(pieces: list[Tensor]) -> None:
    assert seen(fold(pieces)) == seen(observe(torch.cat(pieces), BINS))
    assert seen(fold(pieces[::-1])) == seen(fold(pieces))


@given(PIECES, PIECES, PIECES)
def test_merging_is_associative(one: list[Tensor], two: list[Tensor], three: list[Tensor]) -> None:
    a, b, c = fold(one), fold(two), fold(three)
    left = merge(merge(a, b, BINS), c, BINS)
    right = merge(a, merge(b, c, BINS), BINS)
    assert seen(left) == seen(right)


@given(PIECES)
def test_every_value_is_counted_in_its_bin(pieces: list[Tensor]) -> None:
    values = [value for piece in pieces for value in piece.tolist()]
    state = fold(pieces)
    if any(values):
        exponent, counts = counted([0.0, *values], BINS)
        first = math.floor(math.ldexp(min(*values, 0.0), -exponent))
        found = {first + place: n for place, n in enumerate(state.counts.tolist()) if n}
        assert (int(state.exponent), found) == (exponent, counts)
    assert int(state.zeros) == values.count(0.0)
    assert (float(state.low), float(state.high)) == (min(values), max(values))


@given(PIECES, st.integers(2, 100))
def test_no_count_is_lost_and_bins_are_bounded(pieces: list[Tensor], bins: int) -> None:
    state = fold(pieces, bins)
    assert int(state.counts.sum() + state.zeros) == sum(piece.numel() for piece in pieces)
    assert int(state.counts.min()) >= 0
    assert state.counts.numel() <= bins


@given(PIECES)
def test_cells_are_in_order_within_the_extremes_and_hold_all(pieces: list[Tensor]) -> None:
    state = fold(pieces)
    lower, upper, counts = cells(state)
    assert (lower <= upper).all()
    assert (upper[:-1] <= lower[1:]).all()
    assert float(lower[0]) == float(state.low)
    assert float(upper[-1]) == float(state.high)
    assert int(counts.sum()) == sum(piece.numel() for piece in pieces)


def test_at_least_half_of_the_bins_are_used() -> None:
    for scale in (0.51, 0.99, 1.0, 1.01, 1.99):
        state = observe(torch.tensor([-0.3, 1.0]) * scale, 1000)
        assert 500 <= state.counts.numel() <= 1000


@pytest.mark.parametrize("share", [0.0, 1e-4, 0.01, 0.3, 0.5, 0.77, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["normal", "relu", "far"])
def test_a_quantile_is_torchs_to_the_width_of_a_bin(share: float, kind: str) -> None:
    x = {"normal": noise(5000), "relu": noise(5000).relu(), "far": noise(5000) + 50}[kind]
    state = observe(x, 4096)
    exact = torch.quantile(x.to(torch.float64), share)
    assert abs(float(quantile(state, share)) - float(exact)) <= 2.0 ** int(state.exponent)
    if share in (0.0, 1.0):
        assert float(quantile(state, share)) == float(exact)


def large(*shape: int) -> Tensor:
    """Return long-tailed noise with a channel of outliers, of more values than are all counted."""
    x = noise(*shape) ** 3
    x[..., 5] *= 40
    return x


@pytest.mark.parametrize("shape", [(300, 256), (1024, 512), (333, 771), (SAMPLED_FROM + 1,)])
def test_a_large_tensor_keeps_extremes_sum_and_tails_to_the_count(shape: tuple[int, ...]) -> None:
    x = large(*shape)
    state = observe(x, 4096)
    exact = fold(list(torch.split(x.flatten(), SAMPLED_FROM)), 4096)
    assert float(state.low) == float(x.min())
    assert float(state.high) == float(x.max())
    assert int(state.exponent) == int(exact.exponent)
    assert int(state.counts.sum() + state.zeros) == x.numel()
    reach = int((exact.counts.cumsum(0) < 32).sum())  # bins that hold the outermost values
    assert torch.equal(state.counts[:reach], exact.counts[:reach])
    reach = int((exact.counts.flip(0).cumsum(0) < 32).sum())
    assert torch.equal(state.counts[-reach:], exact.counts[-reach:])


def test_a_sample_meets_every_channel() -> None:
    """A step that divided the row would see the same few channels again and again."""
    x = torch.arange(512.0).repeat(1024, 1)
    lower, _, counts = cells(observe(x, 1024))
    assert lower.numel() == 512
    assert int(counts.min()) > 0.8 * 1024
    assert int(counts.max()) < 1.2 * 1024


def test_a_sampled_histogram_is_near_the_exact_one() -> None:
    x = noise(1024, 1024)
    found, exact = observe(x, 64), fold(list(torch.split(x.flatten(), SAMPLED_FROM)), 64)
    assert found.counts.shape == exact.counts.shape
    shares = (found.counts - exact.counts).abs() / x.numel()
    # a count of a binomial sample of 32768 lies within 5 standard deviations: 2.5 / sqrt(32768)
    assert float(shares.max()) < 2.5 / math.sqrt(32768)


def test_a_large_tensor_of_one_value_is_one_count() -> None:
    state = observe(torch.full((400, 400), 3.0), 64)
    assert int(state.counts.sum()) == 400 * 400
    assert int(state.counts.count_nonzero()) == 1
    zeros = observe(torch.zeros(400, 400), 64)
    assert int(zeros.zeros) == 400 * 400
    assert not zeros.counts.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [100, SAMPLED_FROM + 300])
def test_other_dtypes_are_counted_as_float32(dtype: torch.dtype, size: int) -> None:
    x = noise(size).to(dtype)
    assert seen(observe(x, 64)) == seen(observe(x.to(torch.float32), 64))


@pytest.mark.parametrize("shape", [(8, 6), (700, 300)])
def test_the_layout_in_memory_does_not_matter(shape: tuple[int, int]) -> None:
    x = noise(*shape).T
    assert not x.is_contiguous()
    assert seen(observe(x, 64)) == seen(observe(x.contiguous(), 64))


@pytest.mark.parametrize("size", [5, SAMPLED_FROM + 300])
@pytest.mark.parametrize(
    ("value", "name"),
    [(math.nan, "NaN"), (math.inf, "infinity"), (-math.inf, "infinity")],
)
@pytest.mark.parametrize("place", [0, 2, -1])
def test_what_is_not_finite_is_refused(size: int, value: float, name: str, place: int) -> None:
    x = noise(size)
    x[place] = value
    with pytest.raises(InputError, match=f"the tensor holds {name}"):
        observe(x, 64)


def test_an_empty_tensor_is_refused() -> None:
    with pytest.raises(InputError, match="an empty tensor has no extremes"):
        observe(torch.empty(0, 3), 64)


def test_the_tensor_is_not_changed() -> None:
    for shape in ((8, 8), (300, 300)):
        x = noise(*shape)
        observe(x, 64)
        assert torch.equal(x, noise(*shape))
