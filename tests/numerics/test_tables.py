"""The nearest level of a table, and k-means on a line, against definitions in float64."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mono_quant.numerics.tables import Levels, fitted, look_up
from tests.helpers import noise

MANY = 1 << 13
"""More values than a search without cells is used for."""

TABLES = st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=16, unique=True).map(
    lambda levels: torch.tensor(sorted(levels), dtype=torch.float32)
)


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    return Levels(levels).nearest(x)


def borders(levels: Tensor) -> Tensor:
    return (levels[1:] + levels[:-1]) / 2


def awkward(levels: Tensor) -> Tensor:
    """Return values on borders, beside them, on levels and far away, among noise."""
    edges = borders(levels)
    infinity = torch.full_like(edges, torch.inf)
    beside = (torch.nextafter(edges, infinity), torch.nextafter(edges, -infinity))
    ends = torch.tensor([1e38, -1e38, 0.0, -0.0, 1e-45])
    return torch.cat([edges, *beside, levels, ends, noise(MANY)])


@given(levels=TABLES)
def test_the_place_is_that_of_the_nearest_level(levels: Tensor) -> None:
    x = awkward(levels)
    assert x.numel() > MANY
    places = nearest(x, levels)
    assert places.dtype == torch.uint8
    for some, found in ((x, places), (x[:100], nearest(x[:100], levels))):
        assert torch.equal(found.to(torch.int64), torch.bucketize(some, borders(levels)))
    missed = (levels.to(torch.float64)[places.to(torch.int64)] - x.to(torch.float64)).abs()
    least = (levels.to(torch.float64) - x.to(torch.float64).unsqueeze(1)).abs().amin(1)
    assert (missed <= least * (1 + 1e-6) + 1e-7).all()  # a border is rounded to float32


@pytest.mark.parametrize("count", [2, 4, 16, 200, 256])
def test_tables_of_all_sizes_are_searched_alike(count: int) -> None:
    for levels in (noise(count).sort().values, torch.linspace(-1, 1, count)):
        x = awkward(levels)
        assert torch.equal(nearest(x, levels).to(torch.int64), torch.bucketize(x, borders(levels)))


def test_halfway_between_two_levels_is_the_lower_one() -> None:
    levels = torch.tensor([-1.0, 0.0, 0.5, 1.0])
    x = torch.tensor([-0.5, 0.25, 0.75]).repeat(MANY)
    assert nearest(x, levels)[:3].tolist() == [0, 1, 2]
    assert nearest(x[:3], levels).tolist() == [0, 1, 2]


@given(levels=TABLES, scale=st.sampled_from([1.0, -0.37, 3e-20, 7e12]))
def test_what_a_search_looks_up_is_a_level_next_to_the_nearest_at_most(
    levels: Tensor, scale: float
) -> None:
    x = awkward(levels)[:-5] * scale
    found = Levels(levels).on_grid(x, torch.tensor([scale])) / scale
    values = (x / scale).to(torch.float64)
    missed = (found - values).abs()
    least = (levels.to(torch.float64) - values.unsqueeze(1)).abs().amin(1)
    cell = float(levels[-1] - levels[0]) / 4096
    assert (missed <= least + 1.1 * cell + 1e-6).all(), "half a cell beyond halfway, from both"
    apart = (levels.to(torch.float64) - found.to(torch.float64).unsqueeze(1)).abs().amin(1)
    assert (apart <= 1e-6).all(), "every value is a level"


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-44, 1e38])
def test_scales_at_the_ends_of_float32_are_looked_up_alike(scale: float) -> None:
    levels = torch.linspace(-1, 1, 16)
    x = noise(4, MANY).clamp(-1, 1) * scale
    scales = torch.tensor([scale, 1.0, scale, 1.0]).unsqueeze(1)
    found = Levels(levels).on_grid(x, scales)
    exact = look_up(Levels(levels).nearest(x / scales.masked_fill(scales == 0, 1.0)), levels)
    off = (found - exact * scales).abs()
    assert (off <= 0.14 * scales.abs()).all(), "a neighbouring level at most"
    assert float((off != 0).to(torch.float32).mean()) < 1e-2


@given(levels=TABLES)
def test_levels_come_back_from_their_places(levels: Tensor) -> None:
    places = nearest(levels, levels)
    assert torch.equal(look_up(places, levels), levels)
    assert look_up(places[:0].reshape(0, 3), levels).shape == (0, 3)


def error_of(values: Tensor, weights: Tensor, levels: Tensor) -> float:
    """Return the weighted squared error of a table in float64."""
    apart = (values.double().unsqueeze(1) - levels.double()).square().amin(1)
    return float((weights.double() * apart).sum())


MAX_1960 = {
    3: (1.224,),
    5: (0.7646, 1.724),
    7: (0.5606, 1.188, 2.033),
    15: (0.2739, 0.5548, 0.8512, 1.175, 1.546, 2.007, 2.681),
}
"""Positive levels that leave the least squared error of a normal distribution, by their number.

Source: Max, "Quantizing for Minimum Distortion", IRE Transactions on Information Theory 6 (1960),
table I.
"""


@pytest.mark.parametrize("count", MAX_1960)
def test_levels_for_normal_values_are_those_of_max(count: int) -> None:
    chances = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    values = torch.special.ndtri(chances).to(torch.float32)  # quantiles of the normal distribution
    begun = torch.linspace(-2, 2, count)
    found = fitted(values, torch.ones(len(values)), begun, count // 2, 2000)
    positive = found[count // 2 + 1 :].tolist()
    assert positive == pytest.approx(MAX_1960[count], abs=2e-3)
    assert found[: count // 2].tolist() == pytest.approx([-one for one in positive[::-1]], abs=2e-3)


@given(seed=st.integers(0, 1000), count=st.sampled_from([4, 8, 16]))
def test_a_fit_only_ever_gains_and_ends_in_means(seed: int, count: int) -> None:
    values, weights = noise(2000, seed=seed), noise(2000, seed=seed + 1).square()
    begun = torch.linspace(-2, 2, count + 1)[1:]
    zero = count // 2 - 1
    assert begun[zero] == 0
    errors = [
        error_of(values, weights, fitted(values, weights, begun, zero, steps))
        for steps in (0, 1, 2, 5, 500)
    ]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))
    found = fitted(values, weights, begun, zero, 500)
    places = nearest(values, found)
    for place in set(range(count)) - {zero}:
        own = places == place
        if own.any():
            mean = (weights[own].double() * values[own].double()).sum() / weights[
                own
            ].double().sum()
            assert float(found[place]) == pytest.approx(float(mean), abs=1e-5)


def test_a_level_that_nothing_is_nearest_to_stays() -> None:
    values = torch.tensor([0.0, 0.1, 0.9, 1.0])
    found = fitted(values, torch.ones(4), torch.tensor([-5.0, 0.0, 0.8, 9.0]), 1, 10)
    assert found.tolist() == pytest.approx([-5.0, 0.0, 0.95, 9.0])
