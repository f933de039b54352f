"""Round to nearest: torch's own rounding on the grid that the observer chose."""

import pytest
import torch
from torch import Tensor

from mono_quant import MSE, Affine, FloatCast, Grid, MinMax, PerGroup, RoundToNearest, Statistics
from mono_quant.base import RangeEstimator
from tests.helpers import noise, same_bits


def torch_rounded(weight: Tensor, scheme: Affine, observer: RangeEstimator) -> Tensor:
    qparams = scheme.choose_qparams(weight, observer)
    assert qparams.scale is not None
    scale = qparams.scale.to(torch.float32).flatten()
    zero = torch.zeros(scale.shape, dtype=torch.int32)
    if qparams.zero_point is not None:
        zero = qparams.zero_point.flatten().to(torch.int32)
    blocks = weight.reshape(scale.numel(), -1)
    ends = (scheme.quant_min, scheme.quant_max)
    rounded = torch.fake_quantize_per_channel_affine(blocks, scale, zero, 0, *ends)
    return rounded.reshape(weight.shape)


@pytest.mark.parametrize("observer", [MinMax(), MSE(steps=8)], ids=repr)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_weight_goes_where_torch_rounds_it(
    bits: int, symmetric: bool, observer: RangeEstimator
) -> None:
    scheme = Affine(bits, symmetric, PerGroup(16))
    weight = noise(2, 5, 64)
    q = RoundToNearest().round(weight, Grid(scheme, observer), Statistics())
    assert torch.equal(scheme.dequantize(q), torch_rounded(weight, scheme, observer))
    assert q.shape == (2, 5, 64)
    assert same_bits(weight, noise(2, 5, 64))


def test_a_cast_is_the_cast_of_torch() -> None:
    weight = noise(1, 5, 64)
    q = RoundToNearest().round(weight, Grid(FloatCast(), MinMax()), Statistics())
    assert same_bits(q.codes, weight.half())


def test_it_needs_no_data() -> None:
    assert RoundToNearest().needs == ()
    assert RoundToNearest() == RoundToNearest()
