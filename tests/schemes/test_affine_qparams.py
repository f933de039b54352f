"""Scales and zero points, from their formulas in float64, and how they are stored."""

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mono_quant import (
    Affine,
    PackedTensor,
)
from mono_quant.numerics.values import Layout
from tests.helpers import (
    noise,
)
from tests.schemes.grids import GRIDS, STACKS, qparams_of, scale_of


@given(bits=st.integers(2, 8), x=STACKS)
def test_a_symmetric_scale_is_the_largest_magnitude_over_the_largest_code(
    bits: int, x: Tensor
) -> None:
    scheme = Affine(bits, scale_dtype=torch.float32)
    qparams = qparams_of(scheme, x)
    largest = x.abs().amax(-1, keepdim=True).to(torch.float64)
    expected = (largest / (2 ** (bits - 1) - 1)).clamp(min=torch.finfo(torch.float32).tiny)
    expected[largest == 0] = 1
    usual = largest / (2 ** (bits - 1) - 1) > 1e-44  # below, float32 knows zero and its neighbour
    found = scale_of(qparams)
    assert torch.equal(found[usual], expected.to(torch.float32)[usual])
    assert qparams.zero_point is None


@given(bits=st.integers(2, 8), x=STACKS)
def test_an_asymmetric_scale_is_the_range_with_zero_over_the_steps(bits: int, x: Tensor) -> None:
    scheme = Affine(bits, symmetric=False, scale_dtype=torch.float32)
    qparams = qparams_of(scheme, x)
    low = x.amin(-1, keepdim=True).to(torch.float64).clamp(max=0)
    high = x.amax(-1, keepdim=True).to(torch.float64).clamp(min=0)
    expected = (high - low) / (2**bits - 1)
    usual = expected > torch.finfo(torch.float32).tiny
    found = scale_of(qparams).to(torch.float64)
    torch.testing.assert_close(found[usual], expected[usual], rtol=3e-7, atol=0)
    assert qparams.zero_point is not None
    assert qparams.zero_point.dtype == torch.uint8
    exact = (-low / found).clamp(0, 2**bits - 1)
    assert ((qparams.zero_point.to(torch.float64) - exact).abs() <= 0.5 + 1e-4).all()


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero_point"),
    [
        (-1.0, 2.0, 3 / 15, 5),
        (0.0, 3.0, 3 / 15, 0),
        (1.0, 3.0, 3 / 15, 0),  # the range is made to include zero
        (-3.0, 0.0, 3 / 15, 15),
        (-3.0, -1.0, 3 / 15, 15),
        (-1.5, 1.5, 3 / 15, 8),  # 7.5 goes to the even one
        (0.0, 0.0, 1.0, 0),
    ],
)
def test_asymmetric_qparams_of_four_bits(
    low: float, high: float, scale: float, zero_point: int
) -> None:
    scheme = Affine(4, symmetric=False, scale_dtype=torch.float32)
    ends = (torch.tensor([[[low]]]), torch.tensor([[[high]]]))
    qparams = scheme.calculate_qparams(*ends, block_size=(1, 1, 8))
    assert qparams.zero_point is not None
    assert float(scale_of(qparams)) == pytest.approx(scale, rel=1e-6)
    assert int(qparams.zero_point) == zero_point
    assert qparams.block_size == (1, 1, 8)


def test_the_zero_point_is_chosen_for_the_scale_as_it_is_stored() -> None:
    # 8.9 / 255 in float16 is 0.034912, 3.2e-4 above: -8.8 / scale then rounds to another code.
    scheme = Affine(8, symmetric=False)
    found: list[bool] = []
    for tenth in range(1, 100):
        low, high = torch.tensor([[[-tenth / 10 - 0.03]]]), torch.tensor([[[0.1]]])
        qparams = scheme.calculate_qparams(low, high, block_size=(1, 1, 8))
        stored, wide = scale_of(qparams).to(torch.float64), (high - low).to(torch.float64) / 255
        assert scale_of(qparams).dtype == torch.float16
        assert qparams.zero_point is not None
        expected = int((-low.to(torch.float64) / stored).round().clamp(0, 255))
        assert int(qparams.zero_point) == expected
        found.append(expected != int((-low.to(torch.float64) / wide).round().clamp(0, 255)))
    assert any(found), "no case where it matters was tried"


@pytest.mark.parametrize("magnitude", [1e-7, 2e7])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_scale_that_half_precision_cannot_hold_makes_all_of_them_float32(
    magnitude: float, symmetric: bool
) -> None:
    scheme = Affine(8, symmetric)
    x = noise(1, 4, 64)
    x[0, 2] *= magnitude
    q = scheme.quantize(x, qparams_of(scheme, x))
    assert scale_of(q.qparams).dtype == torch.float32
    remark = scheme.remark(q)
    assert remark is not None
    assert "its scales are float32, since float16 cannot hold them closely enough" in remark
    layout = Layout.grouped((4, 64))
    packed = PackedTensor.pack(q, scheme, layout, torch.float32)
    assert packed.nbytes == scheme.nbytes((1, 4, 64)) + 4 * 2
    assert torch.equal(packed.dequantize(), scheme.dequantize(q)[0])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("magnitude", [1e-2, 1.0, 1e3])
def test_usual_scales_are_stored_in_half_precision_without_a_remark(
    bits: int, magnitude: float
) -> None:
    scheme = Affine(bits, symmetric=False)
    x = noise(1, 64, 64) * magnitude
    q = scheme.quantize(x, qparams_of(scheme, x))
    assert scale_of(q.qparams).dtype == torch.float16
    assert scheme.remark(q) is None


@given(scheme=GRIDS, x=STACKS)
def test_a_stored_scale_is_as_close_as_its_dtype_allows_or_within_an_eighth_of_a_step(
    scheme: Affine, x: Tensor
) -> None:
    """An eighth of a step at the end of the grid, over all codes."""
    wide = qparams_of(attrs.evolve(scheme, scale_dtype=torch.float32), x)
    stored = qparams_of(scheme, x)
    assert scale_of(stored).dtype in (scheme.scale_dtype, torch.float32)
    exact = scale_of(wide).to(torch.float64)
    drift = (scale_of(stored).to(torch.float64) - exact).abs()
    allowed = max(torch.finfo(scale_of(stored).dtype).eps, 1 / 8 / (2**scheme.bits - 1))
    assert (drift <= exact * allowed * (1 + 1e-6)).all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_in_bfloat16_are_stored_so_at_every_width(bits: int, symmetric: bool) -> None:
    scheme = Affine(bits, symmetric, scale_dtype=torch.bfloat16)
    x = noise(1, 64, 64)
    q = scheme.quantize(x, qparams_of(scheme, x))
    assert scale_of(q.qparams).dtype == torch.bfloat16
    assert "scales are" not in (scheme.remark(q) or "")
    layout = Layout.grouped((64, 64))
    packed = PackedTensor.pack(q, scheme, layout, torch.float32)
    assert packed.nbytes == scheme.nbytes((1, 64, 64))
