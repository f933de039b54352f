"""Round to nearest: torch's own rounding on the grid that the observer chose."""

import pytest
import torch

from mono_quant import (
    MSE,
    Affine,
    FloatCast,
    Grid,
    MinMax,
    PerChannel,
    PerGroup,
    PerTensor,
    RangeEstimator,
    RoundToNearest,
    Scheme,
    Statistics,
)
from mono_quant.numerics.blocks import AT_ONCE
from mono_quant.plan.weight_error import WeightError
from tests.helpers import noise, same_bits, torch_fake_quantize


@pytest.mark.parametrize("observer", [MinMax(), MSE(steps=8)], ids=repr)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_weight_goes_where_torch_rounds_it(
    bits: int, symmetric: bool, observer: RangeEstimator
) -> None:
    scheme = Affine(bits, symmetric, PerGroup(16))
    weight = noise(2, 5, 64)
    q = RoundToNearest().round(weight, Grid(scheme, observer), Statistics())
    qparams = scheme.choose_qparams(weight, observer)
    assert torch.equal(scheme.dequantize(q), torch_fake_quantize(weight, scheme, qparams))
    assert q.shape == (2, 5, 64)
    assert same_bits(weight, noise(2, 5, 64))


@pytest.mark.parametrize(
    "scheme",
    [
        Affine(8, granularity=PerChannel()),
        Affine(4, symmetric=False, granularity=PerGroup(64)),
        Affine(4, granularity=PerTensor()),
        FloatCast(),
    ],
    ids=repr,
)
def test_a_large_weight_is_rounded_in_parts_to_the_same_codes(scheme: Scheme) -> None:
    weight = noise(2, 1031, 256) * torch.logspace(-3, 3, 1031)[:, None]
    assert weight.numel() > 2 * AT_ONCE
    grid = Grid(scheme, MinMax())
    q = RoundToNearest().round(weight, grid, Statistics())
    whole = scheme.quantize(weight, grid.qparams(weight))
    assert same_bits(q.codes, whole.codes)
    error = WeightError.of(weight, q, scheme)
    exact, found = weight.double(), scheme.dequantize(whole).double()
    # squares are float32, 2**-24 off each, and added up in it over a part's rows
    torch.testing.assert_close(error.signal, exact.square().sum(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(error.noise, (exact - found).square().sum(1), rtol=1e-6, atol=0)


def test_the_default_dtype_has_no_say() -> None:
    scheme = Affine(4, symmetric=False, granularity=PerGroup(64))
    weight = noise(1, 2053, 256)
    grid = Grid(scheme, MinMax())
    expected = RoundToNearest().round(weight, grid, Statistics())
    torch.set_default_dtype(torch.float64)
    try:
        found = RoundToNearest().round(weight, grid, Statistics())
    finally:
        torch.set_default_dtype(torch.float32)
    assert same_bits(found.codes, expected.codes)


def test_a_cast_is_the_cast_of_torch() -> None:
    weight = noise(1, 5, 64)
    q = RoundToNearest().round(weight, Grid(FloatCast(), MinMax()), Statistics())
    assert same_bits(q.codes, weight.half())


def test_it_needs_no_data() -> None:
    assert RoundToNearest().needs == ()
    assert RoundToNearest() == RoundToNearest()
