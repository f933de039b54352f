"""Half precision: the cast of torch, and nothing that does not fit it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mono_quant import (
    MSE,
    ConfigurationError,
    FloatCast,
    InputError,
    MinMax,
    PackedTensor,
    PerTensor,
    RangeEstimator,
    Scheme,
)
from mono_quant.configurable import Json
from mono_quant.numerics.granularity import Shape
from mono_quant.numerics.values import Layout
from tests.helpers import noise, same_bits, tensors

SHAPE = (2, 3, 4)
DTYPES = [torch.float16, torch.bfloat16]


class NeverAsked(RangeEstimator):
    """An observer that must not be used."""

    def range_of(self, x: Tensor, scheme: Scheme, block_size: Shape) -> tuple[Tensor, Tensor]:
        raise AssertionError("a cast has no range")


@given(x=tensors(SHAPE, -65504, 65504), dtype=st.sampled_from(DTYPES))
def test_values_are_the_nearest_of_the_dtype(x: Tensor, dtype: torch.dtype) -> None:
    scheme = FloatCast(dtype)
    q = scheme.quantize(x, scheme.choose_qparams(x, NeverAsked()))
    assert same_bits(q.codes, x.to(dtype))
    found = scheme.dequantize(q)
    assert same_bits(found, x.to(dtype).to(torch.float32))
    error = (found.to(torch.float64) - x.to(torch.float64)).abs()
    digits = torch.finfo(dtype)
    room = x.to(torch.float64).abs() * digits.eps / 2 + digits.smallest_normal * digits.eps / 2
    assert (error <= room).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_the_dtype_has_come_back_exactly(dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    every = bits.view(dtype)
    x = every[torch.isfinite(every)].to(torch.float32)
    scheme = FloatCast(dtype)
    assert same_bits(scheme.fake_quantize(x, scheme.choose_qparams(x, NeverAsked())), x)


@pytest.mark.parametrize(
    ("dtype", "fits", "overflows"),
    [(torch.float16, 65519.0, 65520.0), (torch.bfloat16, 3.3961e38, 3.3962e38)],
)
def test_what_rounds_to_infinity_is_refused(
    dtype: torch.dtype, fits: float, overflows: float
) -> None:
    scheme = FloatCast(dtype)
    for sign in (1, -1):
        x = torch.tensor([[[sign * fits, 1.0]]])
        assert torch.isfinite(scheme.fake_quantize(x, scheme.choose_qparams(x, MinMax()))).all()
        with pytest.raises(InputError, match="do not fit"):
            scheme.choose_qparams(torch.tensor([[[sign * overflows, 1.0]]]), MinMax())


def test_an_overflow_of_float16_names_the_dtype_that_would_do() -> None:
    with pytest.raises(InputError, match=r"7e\+04 do not fit .*; use FloatCast\(torch.bfloat16\)"):
        FloatCast().choose_qparams(torch.full((1, 1, 1), 7e4), MinMax())


def test_an_overflow_of_bfloat16_does_not_name_bfloat16_as_the_cure() -> None:
    with pytest.raises(InputError) as raised:
        FloatCast(torch.bfloat16).choose_qparams(torch.full((1, 1, 1), 3.4e38), MinMax())
    assert "use FloatCast(torch.bfloat16)" not in str(raised.value)


@pytest.mark.parametrize("observer", [MinMax(), MSE()])
def test_the_observer_makes_no_difference(observer: RangeEstimator) -> None:
    x = noise(*SHAPE)
    qparams = FloatCast().choose_qparams(x, observer)
    assert qparams.scale is None
    assert qparams.zero_point is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3, 5), (4, 2, 9)])
def test_a_value_takes_sixteen_bits(dtype: torch.dtype, shape: Shape) -> None:
    scheme = FloatCast(dtype)
    x = noise(*shape)
    q = scheme.quantize(x, scheme.choose_qparams(x, MinMax()))
    layout = Layout.grouped((shape[0] * shape[1], shape[2]), shape[0])
    packed = PackedTensor.pack(q, scheme, layout, torch.float32)
    assert packed.nbytes == scheme.nbytes(shape) == 2 * x.numel()
    assert scheme.bits_per_weight(shape) == 16
    assert list(packed.tensors) == ["codes"]
    assert same_bits(packed.unpack().codes, x.to(dtype))
    assert same_bits(packed.dequantize().reshape(shape), x.to(dtype).float())


def test_codes_are_floats_without_a_width() -> None:
    scheme = FloatCast()
    assert scheme.code_bits is None
    assert scheme.granularity == PerTensor()
    assert scheme.refuse((1, 3, 7)) is None
    assert (
        scheme.remark(scheme.quantize(noise(*SHAPE), scheme.choose_qparams(noise(1), MinMax())))
        is None
    )


@pytest.mark.parametrize("dtype", ["float32", "float64", "int8", "float8_e4m3fn", "nonsense", 16])
def test_a_cast_is_to_half_precision(dtype: Json) -> None:
    with pytest.raises(ConfigurationError):
        FloatCast.from_config({"kind": "float_cast", "dtype": dtype})


def test_casts_describe_themselves_by_their_dtype() -> None:
    assert FloatCast().describe() == "float16"
    assert FloatCast(torch.bfloat16).describe() == "bfloat16"
