"""What every observer here promises beyond the laws of the kit: exactness, and bounds."""

from typing import cast

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mono_quant import (
    MSE,
    Affine,
    Auto,
    Entropy,
    FloatCast,
    Histogram,
    MinMax,
    MovingAverage,
    Observer,
    Percentile,
    PerTensor,
    Scheme,
)
from mono_quant.base import AnyStatistic
from tests.helpers import noise, tensors

OBSERVERS: list[AnyStatistic] = [
    MinMax(),
    MovingAverage(0.3),
    Histogram(bins=64),
    Percentile(90.0),
    MSE(steps=5),
    Entropy(bins=300),
    Auto(),
]
"""One of each. Few bins, so that they are merged often."""

SCHEMES: list[Scheme] = [
    Affine(8, symmetric=False, granularity=PerTensor(), scale_dtype=torch.float32),
    Affine(8, symmetric=True),
    Affine(3, symmetric=False),
    FloatCast(torch.bfloat16),
]
LARGEST = 1e38  # beyond about this, an odd grid over both ends passes the largest float32
PIECES = st.lists(
    st.one_of(
        tensors([7]),
        tensors([7], -LARGEST, LARGEST),
        tensors([7], -1e-38, 1e-38),
        tensors([7], 0, 1),
        tensors([7], 1e3, 1e4),
        st.just(torch.zeros(3)),
    ),
    min_size=1,
    max_size=4,
)
each = pytest.mark.parametrize("observer", OBSERVERS, ids=repr)


def fold(observer: Observer[object], pieces: list[Tensor]) -> object:
    first, *rest = map(observer.observe, pieces)
    for state in rest:
        first = observer.merge(first, state)
    return first


def values(state: object) -> list[Tensor]:
    """Return the fields of a state as float64 tensors."""
    fields = attrs.asdict(cast("attrs.AttrsInstance", state), recurse=False).values()
    return [torch.as_tensor(field).to(torch.float64) for field in fields]


def assert_same(one: object, other: object, exact: bool) -> None:
    for left, right in zip(values(one), values(other), strict=True):
        room = 0.0 if exact else 1e-5
        torch.testing.assert_close(left, right, rtol=room, atol=room * float(left.abs().max()))


@each
@given(one=PIECES, two=PIECES, three=PIECES)
def test_merge_is_associative(
    observer: Observer[object], one: list[Tensor], two: list[Tensor], three: list[Tensor]
) -> None:
    merge = observer.merge
    a, b, c = (fold(observer, pieces) for pieces in (one, two, three))
    exact = observer.order_free  # an average rounds
    assert_same(merge(merge(a, b), c), merge(a, merge(b, c)), exact)


@each
@given(pieces=PIECES)
def test_where_order_is_free_any_cut_and_any_order_give_one_state(
    observer: Observer[object], pieces: list[Tensor]
) -> None:
    if not observer.order_free:
        return
    whole = observer.observe(torch.cat(pieces))
    assert_same(fold(observer, pieces), whole, exact=True)
    assert_same(fold(observer, pieces[::-1]), whole, exact=True)


def test_only_the_moving_average_depends_on_the_order() -> None:
    assert [one for one in OBSERVERS if not one.order_free] == [MovingAverage(0.3)]


@each
@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
@given(pieces=PIECES)
def test_the_range_lies_within_the_extremes_of_what_was_seen_and_zero(
    observer: Observer[object], scheme: Scheme, pieces: list[Tensor]
) -> None:
    low, high = observer.calculate_range(fold(observer, pieces), scheme)
    seen = torch.cat([*pieces, torch.zeros(1)])
    assert low.shape == high.shape == ()
    assert low.dtype == high.dtype == torch.float32
    assert float(seen.min()) <= float(low)
    assert float(high) <= float(seen.max())
    scheme.calculate_qparams(low, high, block_size=())  # it is one that a grid can cover


@each
def test_a_states_size_is_bounded(observer: Observer[object]) -> None:
    state = fold(observer, [noise(500, seed=seed) * 3**seed for seed in range(12)])
    assert sum(value.numel() for value in values(state)) <= (1 << 13) + 4
