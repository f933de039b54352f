"""Floats of few bits, against torch's own casts and brute force over the specifications' tables."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mono_quant.numerics.minifloat import FORMATS, POWERS, MiniFloat, power_below
from tests.helpers import E2M1, noise, same_bits

E2M3 = tuple(n / 8 for n in range(8)) + tuple(
    (1 + n / 8) * 2.0**power for power in range(3) for n in range(8)
)
E3M2 = tuple(n / 16 for n in range(4)) + tuple(
    (1 + n / 4) * 2.0**power for power in range(-2, 5) for n in range(4)
)
"""OCP Microscaling specification 1.0, section 5.3.2: subnormal values, then each binade."""

OWN = [name for name, one in FORMATS.items() if one.dtype is not None]


def plain(of: MiniFloat) -> MiniFloat:
    """Return a format that cannot ask torch."""
    return MiniFloat(of.exponent, of.mantissa, of.largest)


@pytest.mark.parametrize(
    ("name", "magnitudes"), [("e2m1", E2M1), ("e2m3", E2M3), ("e3m2", E3M2)], ids=str
)
def test_values_are_those_of_the_specification(name: str, magnitudes: tuple[float, ...]) -> None:
    assert FORMATS[name].values == (*magnitudes, *(-value for value in magnitudes))
    assert FORMATS[name].largest == magnitudes[-1]


@pytest.mark.parametrize("name", OWN)
def test_bytes_mean_what_they_mean_to_torch(name: str) -> None:
    dtype = FORMATS[name].dtype
    assert dtype is not None
    theirs = torch.arange(256).to(torch.uint8).view(dtype).to(torch.float32)
    ours = torch.tensor(FORMATS[name].values, dtype=torch.float32)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert FORMATS[name].largest == torch.finfo(dtype).max


@pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="torch 2.6 has no e8m0")
def test_powers_mean_what_they_mean_to_torch() -> None:
    theirs = torch.arange(256).to(torch.uint8).view(torch.float8_e8m0fnu).to(torch.float32)
    ours = torch.tensor(POWERS, dtype=torch.float32)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@given(
    name=st.sampled_from(list(FORMATS)),
    drawn=st.lists(
        st.floats(-(2.0**126), 2.0**126, width=32) | st.floats(-10, 10, width=32), min_size=1
    ),
)
def test_a_pattern_is_that_of_the_nearest_value(name: str, drawn: list[float]) -> None:
    found = FORMATS[name]
    x = torch.tensor(drawn, dtype=torch.float32)
    for one in (found, plain(found)):
        assert_nearest(one, x)


@pytest.mark.parametrize("name", FORMATS)
def test_halves_go_to_the_even_mantissa(name: str) -> None:
    found = FORMATS[name]
    values = torch.tensor(found.values[: 1 << found.bits - 1], dtype=torch.float64)
    values = values[torch.isfinite(values)]
    halves = ((values[1:] + values[:-1]) / 2).to(torch.float32)
    for one in (found, plain(found)):
        for sign in (1, -1):
            patterns = one.encode(sign * halves)
            assert (patterns % 2 == 0).all()
            assert_nearest(one, sign * halves)


@pytest.mark.parametrize("name", OWN)
def test_patterns_are_those_of_torchs_cast(name: str) -> None:
    found = FORMATS[name]
    x = torch.cat([noise(10000) * scale for scale in (1e-6, 1e-3, 1.0, found.largest / 6)])
    x = x.clamp(-found.largest, found.largest)
    assert found.dtype is not None
    theirs = x.to(found.dtype).view(torch.uint8)
    assert same_bits(plain(found).encode(x), theirs)
    assert same_bits(found.encode(x), theirs)


@pytest.mark.parametrize("name", FORMATS)
def test_every_value_is_its_own_nearest_and_zeros_keep_their_sign(name: str) -> None:
    found = FORMATS[name]
    patterns = torch.arange(1 << found.bits).to(torch.uint8)
    values = torch.tensor(found.values, dtype=torch.float32)
    finite = torch.isfinite(values)
    assert torch.equal(found.encode(values[finite]), patterns[finite])
    assert torch.equal(plain(found).encode(values[finite]), patterns[finite])
    assert float(found.largest_power) == 2.0 ** int(torch.tensor(found.largest).log2().floor())


@pytest.mark.parametrize("power", [-149, -127, -126, -1, 0, 1, 100, 127])
def test_the_power_below_is_the_exponent(power: int) -> None:
    exact = torch.tensor([2.0**power], dtype=torch.float32)
    place = max(power, -127) + 127
    assert power_below(exact).tolist() == [place]
    if power > -126:
        assert power_below(exact * 1.9999999).tolist() == [place]
        assert power_below(torch.nextafter(exact, torch.zeros(1))).tolist() == [place - 1]


def assert_nearest(found: MiniFloat, x: Tensor) -> None:
    """Assert that no value of a format lies nearer to any of `x`, in float64."""
    values = torch.tensor(found.values, dtype=torch.float64)
    finite = values[torch.isfinite(values)]
    chosen = values[found.encode(x).to(torch.int64)]
    bounded = x.to(torch.float64).clamp(-found.largest, found.largest)
    least = (bounded.unsqueeze(-1) - finite).abs().amin(-1)
    assert torch.equal((chosen - bounded).abs(), least)
