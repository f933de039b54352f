"""The matrix that spreads channels: orthogonal, and as its sources say."""

import pytest
import torch
from torch import Tensor

from mono_quant.numerics.rotation import SIZES, block_of, matrix_of, rotated
from tests.helpers import noise


def sylvester(size: int) -> Tensor:
    """Return Sylvester's matrix by his construction."""
    made = torch.ones(1, 1, dtype=torch.float64)
    while len(made) < size:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return made


def rudin_shapiro(size: int) -> Tensor:
    """Return the sequence by its recurrence: a(2n) = a(n), a(2n + 1) = (-1)^n a(n)."""
    made = [1.0]
    for place in range(1, size):
        half = place // 2
        made.append(made[half] * (-1) ** (half * (place % 2)))
    return torch.tensor(made, dtype=torch.float64)


@pytest.mark.parametrize("size", SIZES)
def test_it_is_hadamards_matrix_with_signs_and_orthogonal(size: int) -> None:
    found = matrix_of(size)
    expected = rudin_shapiro(size)[:, None] * sylvester(size) / size**0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
    unit = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(found @ found.t(), unit, rtol=0, atol=1e-14)


@pytest.mark.parametrize("size", SIZES)
def test_what_one_channel_has_and_what_all_have_is_spread_evenly(size: int) -> None:
    alone, common = torch.eye(size, dtype=torch.float64)[3], torch.ones(size, dtype=torch.float64)
    assert float(rotated(alone).abs().max()) == pytest.approx(size**-0.5)
    assert float(rotated(common).abs().max()) < 1.5  # of size**0.5, were it left in one channel


@pytest.mark.parametrize(
    ("channels", "size"), [(128, 128), (384, 128), (96, 32), (1000, None), (16, 16), (0, None)]
)
def test_blocks_are_the_largest_that_divide_the_channels(channels: int, size: int | None) -> None:
    assert block_of(channels) == size


@pytest.mark.parametrize("channels", [16, 96, 384])
def test_products_stay_what_they_were(channels: int) -> None:
    x, weight = noise(2, 5, channels).double(), noise(7, channels, seed=1).double()
    torch.testing.assert_close(
        rotated(x) @ rotated(weight).t(), x @ weight.t(), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(rotated(x)[1, 2], rotated(x[1, 2]), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_are_turned_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    x = noise(4, 256).to(dtype)
    found = rotated(x)
    assert found.dtype == dtype
    exact = (x.double().reshape(4, 2, 128) @ matrix_of(128)).reshape(4, 256)
    room = torch.finfo(dtype).eps * exact.abs() + 1e-6
    assert ((found.double() - exact).abs() <= room).all()


def test_there_may_be_no_row() -> None:
    assert rotated(torch.zeros(0, 64)).shape == (0, 64)
