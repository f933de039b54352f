"""The choice, and the reason that is given for it."""

import pytest
import torch
from torch import Tensor

from mono_quant import MSE, Affine, Auto, MinMax, Percentile, PerGroup, PerTensor
from tests.helpers import noise
from tests.observers.distributions import distributions

SCHEME = Affine(8, symmetric=False, granularity=PerTensor(), scale_dtype=torch.float32)
EVEN = torch.linspace(-1, 1, 10001)


@pytest.mark.parametrize(
    ("x", "name", "words"),
    [
        (EVEN, "minmax", ("values of both signs", "light tails", "clipping gains 0.0")),
        (torch.full((9,), 2.0), "minmax", ("all values are alike",)),
        (torch.zeros(9), "minmax", ("all values are alike",)),
        (noise(50_000) ** 3, "mse", ("heavy tails", "gains", "dB over min-max", "clipping to [")),
        ((noise(50_000) ** 3).relu(), "mse", ("values of one sign, 50% of them zero",)),
    ],
    ids=["even", "constant", "zeros", "heavy", "one-sided"],
)
def test_the_choice_fits_the_distribution_and_the_reason_says_how(
    x: Tensor, name: str, words: tuple[str, ...]
) -> None:
    state = Auto().observe(x)
    choice = Auto().choose(state, SCHEME)
    assert choice.name == name
    reason = Auto().explain(state, SCHEME)
    assert reason == choice.reason
    assert reason.startswith(f"{name}: ")
    for word in words:
        assert word in reason
    assert Auto().calculate_range(state, SCHEME) == (choice.low, choice.high)


def test_a_percentile_is_chosen_where_it_is_near_enough() -> None:
    state = Auto().observe(distributions()["gelu_normal"])
    choice = Auto().choose(state, SCHEME)
    assert choice.name == "percentile 99.999"
    found = Percentile(99.999).calculate_range(state, SCHEME)
    assert (choice.low, choice.high) == found
    assert choice.reason.endswith("dB from the least error")


def test_the_choice_depends_on_the_grid() -> None:
    state = Auto().observe(noise(20_000))
    chosen = {Auto().choose(state, Affine(bits, False, PerTensor())).name for bits in (3, 8)}
    low, high = Auto().calculate_range(state, Affine(3, False, PerTensor()))
    assert "mse" in chosen
    assert float(high - low) < 0.8 * float(state.high - state.low)


def test_a_weight_gets_the_search_only_where_it_pays() -> None:
    block = (1, 1, 32)
    exact = torch.arange(96.0, 128.0).repeat(1, 9, 1)  # on the grid of min-max
    eight = Affine(8, granularity=PerGroup(32), scale_dtype=torch.float32)
    kept = Auto().range_of(exact, eight, block)
    assert all(map(torch.equal, kept, MinMax().range_of(exact, eight, block)))
    three = Affine(3, False, PerGroup(32), torch.float32)
    normal = noise(1, 300, 32)
    found = Auto().range_of(normal, three, block)
    assert all(map(torch.equal, found, MSE().range_of(normal, three, block)))
