"""SQNR and its sums, against the formula in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mono_quant import sqnr_db
from mono_quant.numerics.metrics import SquaredError, tensor_bytes
from tests.helpers import noise, tensors


def formula(reference: Tensor, other: Tensor) -> float:
    """Return ``10 log10(sum(reference ** 2) / sum((reference - other) ** 2))`` in float64."""
    reference, other = reference.to(torch.float64), other.to(torch.float64)
    ratio = float(reference.square().sum()) / float((reference - other).square().sum())
    return 10 * math.log10(ratio)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-22, 1e-7, 1.0, 2e7, 1e25, 1e35])
def test_sqnr_is_the_formula_at_every_magnitude(magnitude: float) -> None:
    reference = noise(64, 64) * magnitude
    other = reference + noise(64, 64, seed=1) * (magnitude / 100)
    assert sqnr_db(reference, other) == pytest.approx(formula(reference, other), abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sqnr_does_not_lose_digits_to_the_dtype_of_its_tensors(dtype: torch.dtype) -> None:
    reference = noise(1000).to(dtype)
    other = (reference + noise(1000, seed=1) / 50).to(dtype)
    assert sqnr_db(reference, other) == pytest.approx(formula(reference, other), abs=1e-4)


def test_a_sum_of_many_small_squares_keeps_its_digits() -> None:
    count = 1 << 22
    error = SquaredError.between(torch.full((count,), 0.1), torch.zeros(count))
    assert error.signal == pytest.approx(count * float(torch.tensor(0.1)) ** 2, rel=1e-6)
    assert error.noise == error.signal


def test_equal_tensors_have_an_infinite_ratio() -> None:
    assert sqnr_db(noise(8), noise(8)) == math.inf
    assert sqnr_db(torch.zeros(8), torch.zeros(8)) == math.inf


def test_noise_without_a_signal_is_minus_infinity() -> None:
    assert sqnr_db(torch.zeros(8), noise(8)) == -math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_looks_good(bad: float) -> None:
    reference = noise(8)
    for one, other in [(reference, reference + bad), (reference + bad, reference)]:
        found = sqnr_db(one, other)
        assert math.isnan(found) or found == -math.inf


def test_twenty_decibels_are_a_tenth_of_the_amplitude() -> None:
    reference = torch.ones(100, dtype=torch.float64)
    assert sqnr_db(reference, reference * 0.9) == pytest.approx(20, abs=1e-9)


@given(
    st.integers(1, 20).flatmap(lambda n: st.tuples(tensors([n]), tensors([n]))), st.integers(0, 20)
)
def test_sums_over_parts_are_the_sum_over_the_whole(pair: tuple[Tensor, Tensor], cut: int) -> None:
    one, other = pair
    whole = SquaredError.between(one, other)
    parts = [
        SquaredError.between(one[:cut], other[:cut]),
        SquaredError.between(one[cut:], other[cut:]),
    ]
    for total in (SquaredError.total(parts), parts[0] + parts[1]):
        assert total.signal == pytest.approx(whole.signal, rel=1e-12)
        assert total.noise == pytest.approx(whole.noise, rel=1e-12)
        assert total.count == whole.count == one.numel()


def test_nothing_compared_is_no_error() -> None:
    assert SquaredError.total([]) == SquaredError(0.0, 0.0, 0)
    assert SquaredError.between(torch.empty(0), torch.empty(0)) == SquaredError(0.0, 0.0, 0)


def test_comparing_changes_neither_tensor() -> None:
    reference, other = noise(8).to(torch.float64), noise(8, seed=1).to(torch.float64)
    SquaredError.between(reference, other)
    assert torch.equal(reference, noise(8).to(torch.float64))
    assert torch.equal(other, noise(8, seed=1).to(torch.float64))


def test_bytes_are_those_of_the_elements_whatever_the_storage_holds() -> None:
    whole = torch.zeros(10, 10, dtype=torch.float16)
    assert tensor_bytes(whole) == 200
    assert tensor_bytes(whole[:2]) == 40
    assert tensor_bytes(whole[0, :0]) == 0
    assert tensor_bytes(torch.zeros(3).expand(5, 3)) == 60
