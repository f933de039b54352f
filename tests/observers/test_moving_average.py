"""The moving average, against its definition in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mono_quant import Affine, ConfigurationError, MinMax, MovingAverage
from mono_quant.configurable import Config
from tests.helpers import noise, tensors

SCHEME = Affine(8, symmetric=False)
BATCHES = st.lists(tensors([3]), min_size=1, max_size=7)
MOMENTA = st.floats(0.01, 1.0)


def averages(batches: list[Tensor], momentum: float) -> tuple[float, float]:
    """Return the averaged extremes, by the recurrence."""
    low, high = float(batches[0].min()), float(batches[0].max())
    for batch in batches[1:]:
        low += momentum * (float(batch.min()) - low)
        high += momentum * (float(batch.max()) - high)
    return low, high


@given(batches=BATCHES, momentum=MOMENTA, cut=st.integers(0, 7))
def test_any_bracketing_gives_the_average_by_the_recurrence(
    batches: list[Tensor], momentum: float, cut: int
) -> None:
    observer = MovingAverage(momentum)
    states = [observer.observe(batch) for batch in batches]
    cut = min(cut, len(states) - 1)
    right = states[-1]
    for state in states[cut:-1][::-1]:  # the later ones among themselves, from the end
        right = observer.merge(state, right)
    found = right
    if cut:
        left = states[0]
        for state in states[1:cut]:
            left = observer.merge(left, state)
        found = observer.merge(left, right)
    largest = max(float(batch.abs().max()) for batch in batches)
    expected = pytest.approx(averages(batches, momentum), rel=1e-5, abs=1e-5 * largest + 1e-30)
    assert tuple(map(float, observer.calculate_range(found, SCHEME))) == expected
    assert found.batches == len(batches)


def test_the_latest_batch_weighs_what_the_momentum_says() -> None:
    observer = MovingAverage(0.25)
    one, two = torch.tensor([-1.0, 1.0]), torch.tensor([-5.0, 9.0])
    state = observer.merge(observer.observe(one), observer.observe(two))
    assert (float(state.low), float(state.high)) == (-2.0, 3.0)


def test_with_momentum_one_only_the_latest_batch_counts() -> None:
    observer = MovingAverage(1)
    state = observer.merge(observer.observe(noise(9)), observer.observe(noise(9, seed=1)))
    assert float(state.low) == float(noise(9, seed=1).min())


def test_a_weight_is_one_batch() -> None:
    x = noise(2, 3, 8)
    found, expected = (one.range_of(x, SCHEME, (1, 1, 4)) for one in (MovingAverage(), MinMax()))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("config", [{"momentum": 0}, {"momentum": 1.01}, {"momentum": -1}], ids=str)
def test_a_weight_that_is_none_is_refused(config: Config) -> None:
    with pytest.raises(ConfigurationError, match="momentum is above 0 and at most 1"):
        MovingAverage.from_config({"kind": "movingaverage", **config})
