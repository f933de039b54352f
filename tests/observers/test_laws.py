"""What every observer promises, whatever range it proposes."""

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
    InputError,
    MinMax,
    MovingAverage,
    Observer,
    Percentile,
    PerChannel,
    PerGroup,
    PerTensor,
    Scheme,
)
from mono_quant.base import AnyStatistic
from mono_quant.numerics.granularity import Shape
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
@pytest.mark.parametrize("value", [0.0, 3.0, -1e-40, 1e38])
@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_values_that_are_all_alike_are_on_the_grid_or_next_to_it(
    observer: Observer[object], value: float, scheme: Scheme
) -> None:
    x = torch.full((2, 9), value)
    low, high = observer.calculate_range(observer.observe(x), scheme)
    alike = float(x[0, 0])  # as a float32 has it
    assert float(low) <= alike <= float(high)


@each
@pytest.mark.parametrize("name", ["nan", "inf", "-inf"])
def test_what_is_not_finite_is_refused(observer: Observer[object], name: str) -> None:
    x = noise(4, 4)
    x[1, 1] = float(name)
    with pytest.raises(InputError, match=r"the tensor holds (NaN|infinity)"):
        observer.observe(x)


@each
def test_an_empty_tensor_is_refused(observer: Observer[object]) -> None:
    with pytest.raises(InputError, match="an empty tensor has no extremes"):
        observer.observe(torch.empty(0, 4))


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(
    observer: Observer[object], dtype: torch.dtype
) -> None:
    x = (noise(40, 40) * 3).to(dtype)
    found = observer.calculate_range(observer.observe(x), SCHEMES[0])
    expected = observer.calculate_range(observer.observe(x.to(torch.float32)), SCHEMES[0])
    assert list(map(float, found)) == list(map(float, expected))


@each
def test_a_tensor_without_order_in_memory_is_seen_like_any(observer: Observer[object]) -> None:
    x = noise(31, 17)
    assert_same(observer.observe(x.T), observer.observe(x.T.contiguous()), exact=True)


@each
def test_nothing_is_changed_by_observing_merging_or_asking(observer: Observer[object]) -> None:
    x = noise(20, 20)
    left, right = observer.observe(x), observer.observe(x * 2)
    before = [value.clone() for value in (*values(left), *values(right))]
    observer.calculate_range(observer.merge(left, right), SCHEMES[0])
    assert torch.equal(x, noise(20, 20))
    for one, other in zip(before, (*values(left), *values(right)), strict=True):
        assert torch.equal(one, other)


@each
def test_a_states_size_is_bounded(observer: Observer[object]) -> None:
    state = fold(observer, [noise(500, seed=seed) * 3**seed for seed in range(12)])
    assert sum(value.numel() for value in values(state)) <= (1 << 13) + 4


@each
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(8)], ids=repr)
@pytest.mark.parametrize("shape", [(1, 4, 64), (2, 3, 400), (1, 0, 8), (1, 2, 0)], ids=str)
def test_a_weight_has_a_range_for_each_block_within_its_extremes_and_zero(
    observer: Observer[object], granularity: PerTensor | PerChannel | PerGroup, shape: Shape
) -> None:
    x = noise(*shape) ** 3
    scheme = Affine(4, symmetric=False, granularity=granularity, scale_dtype=torch.float32)
    block = granularity.block_size(shape)
    low, high = observer.range_of(x, scheme, block)
    least, most = MinMax().range_of(x, scheme, block)
    assert low.shape == high.shape == least.shape
    assert (least.clamp(max=0) <= low).all()
    assert (high <= most.clamp(min=0)).all()
    assert (low <= high).all()
