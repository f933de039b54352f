"""Scales chosen by what errors cost: beside a search in float64, and what it promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mono_quant import (
    MSE,
    Affine,
    ConfigurationError,
    FittedCodebook,
    FloatCast,
    Grid,
    ImportanceWeighted,
    InputError,
    InputPower,
    Microscaling,
    MinMax,
    PerChannel,
    PerGroup,
    PerTensor,
    PowerState,
    Quantizer,
    RoundToNearest,
    Scheme,
    Statistics,
)
from tests.helpers import noise, same_bits, same_tensors

GRIDS: list[Scheme] = [
    Affine(4, symmetric=False, granularity=PerGroup(16)),
    Affine(3, granularity=PerGroup(8)),
    Affine(4, granularity=PerChannel()),
    Affine(2, symmetric=False, granularity=PerTensor()),
    FittedCodebook(3, granularity=PerGroup(16)),
    Microscaling(),
]


def inputs(groups: int, length: int, count: int = 100, seed: int = 0) -> Tensor:
    """Return rows whose columns differ in size, ``[G, n, in]``."""
    sizes = noise(groups, 1, length, seed=seed + 2).mul(2).exp()
    return noise(groups, count, length, seed=seed) * sizes


def gathered(x: Tensor) -> Statistics:
    return Statistics({InputPower(): InputPower().observe(x)})


def cost(weight: Tensor, rounded: Tensor, x: Tensor) -> Tensor:
    """Return the cost of each weight, float64."""
    return (rounded.double() - weight.double()).square() * x.double().square().mean(1).unsqueeze(1)


@pytest.mark.parametrize("scheme", GRIDS[:3], ids=repr)
def test_each_block_has_the_best_scale_of_those_that_are_tried(scheme: Scheme) -> None:
    weight, x = noise(1, 6, 32, seed=3), inputs(1, 32)
    rounding = ImportanceWeighted(steps=9, smallest=0.6, largest=1.0)
    found = scheme.dequantize(rounding.round(weight, Grid(scheme, MinMax()), gathered(x)))
    plain = scheme.choose_qparams(weight, MinMax())
    scales = scheme.scales(plain)
    assert scales is not None
    _, _, size = plain.block_size

    def by_block(rounded: Tensor) -> Tensor:
        return cost(weight, rounded, x).view(1, 6, -1, size).sum(3)

    tried = [
        by_block(scheme.fake_quantize(weight, scheme.rescaled(plain, scales * factor)))
        for factor in torch.linspace(0.6, 1.0, 9).tolist()
    ]
    best = torch.stack(tried).amin(0)
    torch.testing.assert_close(by_block(found), best, rtol=1e-5, atol=1e-7)
    assert (best < by_block(scheme.fake_quantize(weight, plain))).any(), "the search is worth it"


@pytest.mark.parametrize("scheme", GRIDS, ids=repr)
@pytest.mark.parametrize("observer", [MinMax(), MSE(steps=8)], ids=repr)
@given(seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_no_row_is_worse_than_to_nearest(scheme: Scheme, observer: MinMax | MSE, seed: int) -> None:
    weight, x = noise(2, 5, 32, seed=seed), inputs(2, 32, seed=seed)
    grid = Grid(scheme, observer)
    costs = [
        cost(weight, scheme.dequantize(rounding.round(weight, grid, gathered(x))), x).sum(2)
        for rounding in (ImportanceWeighted(steps=8), RoundToNearest())
    ]
    if isinstance(scheme, Affine) and isinstance(scheme.granularity, PerTensor):
        costs = [one.sum() for one in costs]  # rows share a scale
    assert bool((costs[0] <= costs[1] * (1 + 1e-5)).all())


def test_small_inputs_pay_for_large_ones() -> None:
    weight = torch.linspace(-1, 1, 16).reshape(1, 1, 16)
    x = torch.ones(1, 4, 16)
    x[:, :, [0, 15]] = 1e-4  # what sets the range meets next to nothing
    scheme = Affine(2, granularity=PerChannel(), scale_dtype=torch.float32)
    found = ImportanceWeighted().round(weight, Grid(scheme, MinMax()), gathered(x)).qparams.scale
    plain = scheme.choose_qparams(weight, MinMax()).scale
    assert found is not None
    assert plain is not None
    assert float(found) < 0.9 * float(plain)


def test_power_is_the_mean_square_of_all_rows() -> None:
    x = noise(3, 50, 8)
    parts = [InputPower().observe(part) for part in torch.split(x, 20, dim=1)]
    merged = InputPower().merge(InputPower().merge(parts[0], parts[1]), parts[2])
    torch.testing.assert_close(merged.mean, x.double().square().mean(1).float())
    assert same_bits(
        InputPower().observe(x[0].half()).mean,
        PowerState(x[0].half().float().square().sum(0, dtype=torch.float64)[None], 50).mean,
    )


@pytest.mark.parametrize("x", [torch.zeros(1, 20, 32), torch.zeros(1, 0, 32)], ids=["zero", "none"])
def test_inputs_that_say_nothing_leave_the_nearest(x: Tensor) -> None:
    weight, grid = noise(1, 4, 32), Grid(GRIDS[0], MinMax())
    found = ImportanceWeighted().round(weight, grid, gathered(x))
    assert same_bits(found.codes, RoundToNearest().round(weight, grid, Statistics()).codes)


def test_a_cast_has_no_scales_to_choose() -> None:
    weight, grid = noise(1, 4, 32), Grid(FloatCast(), MinMax())
    found = ImportanceWeighted().round(weight, grid, gathered(inputs(1, 32)))
    assert same_bits(found.codes, weight.half())


def test_statistics_of_other_inputs_are_refused() -> None:
    grid = Grid(GRIDS[0], MinMax())
    with pytest.raises(InputError, match=r"\(1, 16\), where \(1, 32\)"):
        ImportanceWeighted().round(noise(1, 6, 32), grid, gathered(inputs(1, 16)))
    state = PowerState(torch.full((1, 32), torch.inf, dtype=torch.float64), 1)
    with pytest.raises(InputError, match="not finite"):
        ImportanceWeighted().round(noise(1, 6, 32), grid, Statistics({InputPower(): state}))


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"steps": 2.5}, {"steps": True}, {"smallest": 0.0}, {"smallest": 1.2}],
    ids=str,
)
def test_a_search_that_is_none_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError):
        ImportanceWeighted(**wrong)  # type: ignore[arg-type]  # what is tested


def test_a_model_is_better_on_its_data_and_comes_back_the_same() -> None:
    torch.manual_seed(0)
    source = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    data = list(torch.split(inputs(1, 64, 256)[0], 64))
    quantizer = Quantizer().bits(3).rounding(ImportanceWeighted()).fit(data)
    result = quantizer.apply(source)
    assert result.validate()
    x = torch.cat(data)
    errors = [
        (one(x) - source(x)).square().mean()
        for one in (result.model, Quantizer().bits(3).apply(source).model)
    ]
    assert errors[0] < errors[1]
    again = Quantizer.from_config(quantizer.to_config()).fit(data)
    assert same_tensors(result.model, again.apply(source).model)
