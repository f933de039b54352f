"""Floats put on a grid in one pass, beside the grid's own arithmetic."""

import pytest
import torch
from torch import Tensor

from mono_quant import Affine, PerTensor
from mono_quant.kernels import quantized
from mono_quant.numerics.values import QParams
from tests.helpers import noise

pytestmark = pytest.mark.skipif(quantized.refuse() is not None, reason=str(quantized.refuse()))


def layouts(x: Tensor) -> tuple[Tensor, ...]:
    return x, x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("zero", [0, 117, 255])
def test_codes_are_those_of_the_grid_but_for_halves(images: int, zero: int) -> None:
    scheme, scale = Affine(8, symmetric=False, granularity=PerTensor()), 0.0375
    for x in layouts(noise(images, 24, 31, 17) * 5):
        unit = torch.full((1,) * 4, scale)
        qparams = QParams(unit, torch.full((1,) * 4, zero, dtype=torch.uint8), x.shape)
        expected = scheme.quantize(x, qparams).codes
        found = quantized.codes(x, unit.item(), zero)
        assert found.dtype == torch.uint8
        assert found.stride() == x.stride()
        off = found != expected
        assert int(off.sum()) <= 2
        exact = x.double() / float(torch.tensor(scale)) + zero
        assert ((found.double() - exact.clamp(0, 255)).abs() <= 0.5 + 1e-4).all()


def test_they_outlive_what_they_were_made_by() -> None:
    x = noise(4, 1000)
    found = quantized.codes(x, 0.03, 100)
    copy = found.clone()
    for _ in range(50):
        torch.randint(0, 256, (4, 1000), dtype=torch.uint8)
    assert torch.equal(found, copy)
    found.add_(1)
    assert not torch.equal(found, copy)


def test_no_value_has_no_code() -> None:
    assert quantized.codes(torch.zeros(0, 3), 1.0, 7).shape == (0, 3)
