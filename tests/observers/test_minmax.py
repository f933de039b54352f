"""Min-max: a fold whose pieces give what the whole gives."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mono_quant import Affine, InputError, MinMax, Observer, RangeEstimator, Statistic
from mono_quant.numerics.granularity import Shape
from mono_quant.observers import MinMaxState
from tests.helpers import noise, tensors

PIECES = st.lists(st.integers(1, 9).flatmap(lambda n: tensors([n])), min_size=1, max_size=6)


def ends(state: MinMaxState) -> tuple[float, float]:
    return float(state.low), float(state.high)


def fold(pieces: list[Tensor]) -> MinMaxState:
    observer = MinMax()
    first, *rest = map(observer.observe, pieces)
    for state in rest:
        first = observer.merge(first, state)
    return first


@given(PIECES)
def test_merged_pieces_have_the_range_of_the_whole(pieces: list[Tensor]) -> None:
    values = [value for piece in pieces for value in piece.tolist()]
    assert ends(fold(pieces)) == (min(values), max(values))
    assert ends(fold(pieces)) == ends(MinMax().observe(torch.cat(pieces)))


@given(*[tensors([4])] * 3)
def test_merge_is_associative_and_in_any_order(one: Tensor, two: Tensor, three: Tensor) -> None:
    observer = MinMax()
    a, b, c = map(observer.observe, (one, two, three))
    left = observer.merge(observer.merge(a, b), c)
    right = observer.merge(a, observer.merge(b, c))
    other = observer.merge(c, observer.merge(b, a))
    assert ends(left) == ends(right) == ends(other)
    assert observer.order_free


@given(tensors([4]))
def test_merging_a_state_with_itself_changes_nothing(x: Tensor) -> None:
    state = MinMax().observe(x)
    assert ends(MinMax().merge(state, state)) == ends(state)


@given(tensors([4]), tensors([4]))
def test_merging_leaves_both_states_as_they_were(one: Tensor, two: Tensor) -> None:
    left, right = MinMax().observe(one), MinMax().observe(two)
    before = ends(left), ends(right)
    MinMax().merge(left, right)
    assert (ends(left), ends(right)) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_state_is_two_floats_without_a_dimension(dtype: torch.dtype) -> None:
    """Of one dtype, so that a file tells what it is to hold; 16 bits lose nothing in it."""
    x = noise(3, 5).to(dtype)
    state = MinMax().observe(x)
    assert state.low.shape == state.high.shape == ()
    assert state.low.dtype == state.high.dtype == torch.float32
    assert ends(state) == (float(x.amin().float()), float(x.amax().float()))


def test_the_range_of_a_state_is_its_extremes_whatever_the_scheme() -> None:
    state = MinMaxState(torch.tensor(-1.0), torch.tensor(3.0))
    for scheme in (Affine(8), Affine(4, symmetric=False)):
        low, high = MinMax().calculate_range(state, scheme)
        assert (float(low), float(high)) == (-1.0, 3.0)


def test_an_empty_tensor_is_refused() -> None:
    with pytest.raises(InputError, match="an empty tensor has no extremes"):
        MinMax().observe(torch.empty(0))


@pytest.mark.parametrize("block", [(1, 1, 8), (1, 1, 4), (2, 3, 8)])
def test_a_weight_has_the_range_of_each_block(block: Shape) -> None:
    x = noise(2, 3, 8)
    low, high = MinMax().range_of(x, Affine(8), block)
    rows = x.reshape(low.numel(), -1).tolist()
    assert low.flatten().tolist() == [min(row) for row in rows]
    assert high.flatten().tolist() == [max(row) for row in rows]


def test_it_is_a_statistic_and_an_estimator() -> None:
    assert isinstance(MinMax(), Observer)
    assert isinstance(MinMax(), Statistic)
    assert isinstance(MinMax(), RangeEstimator)
    assert MinMax() == MinMax()
    assert len({MinMax(), MinMax()}) == 1
