"""Codes of inputs that share a grid: found with few operators, and the same to the bit."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mono_quant import Activation, Affine, PerTensor, PerToken
from mono_quant.kernels.digits import digits_of_codes, digits_of_few, digits_on_one_grid
from tests.helpers import noise, same_bits

values = st.floats(-(2.0**127), 2.0**127, width=32)
schemes = st.builds(
    Affine,
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from([PerToken(), PerTensor()]),
    st.just(torch.float32),
)


@given(scheme=schemes, row=st.lists(values, min_size=1, max_size=9), exponent=st.integers(-90, 0))
def test_a_row_has_the_codes_that_many_operators_find(
    scheme: Affine, row: list[float], exponent: int
) -> None:
    x = torch.tensor([row]) * 2.0**exponent
    activation = Activation(scheme)
    found = digits_on_one_grid(x, activation)
    qparams = activation.qparams(x)
    if found is None:
        assert float(x.abs().max()) <= 1e-30
        return
    expected = digits_of_codes(x, scheme, qparams, None)
    assert same_bits(found.digits, expected.digits)
    assert same_bits(found.unit, expected.unit)
    assert same_bits(found.zero, expected.zero)


@given(
    symmetric=st.booleans(),
    bits=st.integers(2, 8),
    rows=st.integers(1, 9).flatmap(
        lambda length: st.lists(
            st.lists(values, min_size=length, max_size=length), min_size=2, max_size=5
        )
    ),
    exponent=st.integers(-90, 0),
)
def test_a_few_rows_have_the_codes_that_many_operators_find(
    symmetric: bool, bits: int, rows: list[list[float]], exponent: int
) -> None:
    x = torch.tensor(rows) * 2.0**exponent
    activation = Activation(Affine(bits, symmetric, PerToken(), torch.float32))
    found = digits_of_few(x, activation)
    if found is None:
        assert float(x.abs().amax(1).min()) <= 1e-30
        return
    expected = digits_of_codes(x, activation.scheme, activation.qparams(x), None)
    assert same_bits(found.digits, expected.digits)
    assert same_bits(found.unit, expected.unit)
    assert same_bits(found.zero, expected.zero)


def test_one_row_many_rows_and_what_is_not_finite_are_no_few_rows() -> None:
    token = Activation(Affine(8, False, PerToken(), torch.float32))
    assert digits_of_few(noise(16, 5), token) is not None
    for count in (0, 1, 17):
        assert digits_of_few(noise(count, 5), token) is None
    others = (
        Activation(Affine(8, False, PerTensor(), torch.float32)),
        Activation(Affine(8, False, PerToken(), torch.float16)),
        Activation(Affine(8, True, PerTensor(), torch.float32), torch.tensor([0.5])),
    )
    for activation in others:
        assert digits_of_few(noise(2, 5), activation) is None
    for value in (math.nan, math.inf, -math.inf):
        x = noise(3, 5)
        x[1, 2] = value
        assert digits_of_few(x, token) is None
    assert digits_of_few(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), token) is None


@pytest.mark.parametrize("zero_point", [None, 7])
def test_calibrated_inputs_have_one_grid_whatever_their_number(zero_point: int | None) -> None:
    scheme = Affine(8, zero_point is None, PerTensor(), torch.float32)
    zero = torch.tensor([zero_point], dtype=torch.uint8) if zero_point is not None else None
    activation = Activation(scheme, torch.tensor([0.03]), zero)
    for rows in (1, 2, 256):
        x = noise(rows, 33, seed=rows) * 4  # some of it beyond the grid
        found = digits_on_one_grid(x, activation)
        expected = digits_of_codes(x, scheme, activation.qparams(x), None)
        assert found is not None
        assert same_bits(found.digits, expected.digits)
        assert torch.equal(found.zero.flatten(), expected.zero.flatten())


def test_what_has_no_single_grid_or_is_not_finite_is_left_to_the_usual_way() -> None:
    token = Activation(Affine(8, False, PerToken(), torch.float32))
    tensor = Activation(Affine(8, False, PerTensor(), torch.float32))
    static = Activation(Affine(8, True, PerTensor(), torch.float32), torch.tensor([0.5]))
    assert digits_on_one_grid(noise(2, 5), token) is None
    assert digits_on_one_grid(noise(2, 5), tensor) is not None
    half = Activation(Affine(8, False, PerToken(), torch.float16))
    assert digits_on_one_grid(noise(1, 5), half) is None
    for value in (math.nan, math.inf, -math.inf):
        x = noise(1, 5)
        x[0, 2] = value
        for activation in (token, tensor, static):
            assert digits_on_one_grid(x, activation) is None
    assert digits_on_one_grid(torch.zeros(1, 5), token) is None
    assert digits_on_one_grid(torch.zeros(0, 5), static) is None
