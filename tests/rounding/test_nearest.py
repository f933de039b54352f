"""Round to nearest: torch's own rounding on the grid that the observer chose."""

import pytest
import torch

from mono_quant import (
    MSE,
    Affine,
    FloatCast,
    Grid,
    MinMax,
    PerGroup,
    RangeEstimator,
    RoundToNearest,
    Statistics,
)
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


def test_a_cast_is_the_cast_of_torch() -> None:
    weight = noise(1, 5, 64)
    q = RoundToNearest().round(weight, Grid(FloatCast(), MinMax()), Statistics())
    assert same_bits(q.codes, weight.half())


def test_it_needs_no_data() -> None:
    assert RoundToNearest().needs == ()
    assert RoundToNearest() == RoundToNearest()
