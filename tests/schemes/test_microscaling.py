"""Block formats, from the arithmetic of their specifications in float64, and 8-bit floats."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mono_quant import (
    MSE,
    ConfigurationError,
    Float8,
    Microscaling,
    MinMax,
    PackedTensor,
    PerChannel,
    PerGroup,
    PerTensor,
    Scheme,
)
from mono_quant.configurable import Json
from mono_quant.numerics.values import Layout
from tests.helpers import E2M1, noise, same_bits, tensors

SHAPE = (1, 4, 64)
LARGEST = {"e2m1": 2, "e2m3": 2, "e3m2": 4, "e4m3": 8, "e5m2": 15}
"""The exponent of the largest value of each element format: OCP Microscaling 1.0, tables 2 to 5."""


def nearest_e2m1(value: float) -> float:
    """Return the nearest e2m1 value in float64; of two, that whose pattern is even."""
    places = range(len(E2M1))
    best = min(places, key=lambda place: (abs(abs(value) - E2M1[place]), place % 2))
    return math.copysign(E2M1[best], value)


def mxfp4(block: list[float]) -> list[float]:
    """Return a block as OCP Microscaling 1.0, section 6.3, converts it."""
    largest = max(map(abs, block))
    if largest == 0:
        return [0.0] * len(block)
    scale = 2.0 ** max(-127, math.floor(math.log2(largest)) - LARGEST["e2m1"])
    return [nearest_e2m1(value / scale) * scale for value in block]


@given(x=tensors((1, 2, 32)))
def test_mxfp4_is_what_its_specification_says(x: Tensor) -> None:
    x = torch.where(x.abs() < 1e-30, 0.0, x)  # so that float64 and float32 divide alike
    scheme = Microscaling.mxfp4()
    found = scheme.fake_quantize(x, scheme.choose_qparams(x, MinMax()))
    assert found[0].tolist() == [mxfp4(row) for row in x[0].tolist()]


def test_a_vector_of_mxfp4_by_hand() -> None:
    """The largest, 7, lies between 4 and 8: the scale is 2 ** (2 - 2), and 7 is clamped to 6."""
    values = [7.0, -6.0, 5.0, 3.5, 2.5, -1.75, 1.25, 0.75, 0.25, -0.25, 0.2, 0.0]
    onto = [6.0, -6.0, 4.0, 4.0, 2.0, -2.0, 1.0, 1.0, 0.0, -0.0, 0.0, 0.0]
    codes = [7, 15, 6, 6, 4, 12, 2, 2, 0, 8, 0, 0]
    x = torch.tensor([[values + [0.0] * 20]])
    scheme = Microscaling.mxfp4()
    qparams = scheme.choose_qparams(x, MinMax())
    assert qparams.scale is not None
    assert qparams.scale.dtype == torch.uint8
    assert qparams.scale.tolist() == [[[127]]]
    q = scheme.quantize(x, qparams)
    assert q.codes[0, 0, :12].tolist() == codes
    assert same_bits(scheme.dequantize(q)[0, 0, :12], torch.tensor(onto))
    packed = PackedTensor.pack(q, scheme, Layout.grouped((1, 32)), torch.float32)
    # as torch's float4_e2m1fn_x2 and the specification have it, the first in the low nibble
    assert packed.tensors["codes"][0, 0, :3].tolist() == [0xF7, 0x66, 0xC4]


@pytest.mark.parametrize("element", LARGEST)
@given(x=tensors((1, 2, 32), 2.0**-30, 2.0**30))
def test_an_e8m0_scale_is_the_exponent_of_the_largest_less_that_of_the_element(
    element: str, x: Tensor
) -> None:
    scheme = Microscaling(element)
    scale = scheme.choose_qparams(x, MinMax()).scale
    assert scale is not None
    expected = [math.floor(math.log2(float(row.max()))) - LARGEST[element] + 127 for row in x[0]]
    assert scale.flatten().tolist() == expected


@given(x=tensors((1, 3, 16), -100, 100))
def test_nvfp4_is_what_its_authors_say(x: Tensor) -> None:
    """NVIDIA, arXiv 2509.25149, appendix C."""
    x = torch.where(x.abs() < 1e-3, 0.0, x)
    scheme = Microscaling.nvfp4()
    qparams = scheme.choose_qparams(x, MinMax())
    assert qparams.scale is not None
    whole = qparams.extra["global_scale"]
    largest = float(x.abs().max())
    assert float(whole) == pytest.approx(largest / (6 * 448) if largest else 1.0, rel=1e-6)
    for row, scale in zip(x[0], qparams.scale[0, :, 0], strict=True):
        wanted = (row.abs().max() / 6 / whole[0]).clamp(2.0**-9, 448)
        exact = float(row.abs().max()) != 0
        assert float(scale) == (float(wanted.to(torch.float8_e4m3fn)) if exact else 0.0)
    found = scheme.fake_quantize(x, qparams)
    scales = qparams.scale.to(torch.float32) * whole
    for place, scale in enumerate(scales.flatten().tolist()):
        for value, onto in zip(x[0, place].tolist(), found[0, place].tolist(), strict=True):
            expected = nearest_e2m1(value / scale) * scale if scale else 0.0
            near = abs(abs(onto) - abs(value)) <= abs(abs(expected) - abs(value)) * (1 + 1e-5)
            assert near or onto == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("scheme", "bits", "words"),
    [
        (Microscaling.mxfp4(), 4.25, "MXFP4"),
        (Microscaling.mxfp6(), 6.25, "MXFP6 (e3m2)"),
        (Microscaling.mxfp6("e2m3"), 6.25, "MXFP6 (e2m3)"),
        (Microscaling.mxfp8(), 8.25, "MXFP8 (e4m3)"),
        (Microscaling.mxfp8("e5m2"), 8.25, "MXFP8 (e5m2)"),
        (Microscaling.nvfp4(), 4.5 + 32 / 384**2, "NVFP4"),
        (Microscaling("e2m1", "e8m0", PerGroup(16)), 4.5, "e2m1 with e8m0 scales per-group 16"),
        (Float8(), 8 + 32 / 384, "float8_e4m3fn per-channel"),
        (
            Float8(torch.float8_e5m2, PerTensor(), torch.bfloat16),
            8 + 16 / 384**2,
            "float8_e5m2 per-tensor, bfloat16 scales",
        ),
    ],
    ids=str,
)
def test_formats_take_what_they_say(scheme: Scheme, bits: float, words: str) -> None:
    assert scheme.bits_per_weight((1, 384, 384)) == bits
    assert scheme.describe() == words


@pytest.mark.parametrize("scheme", [Microscaling.mxfp4(), Microscaling.nvfp4()], ids=str)
def test_the_search_finds_larger_scales_too(scheme: Microscaling) -> None:
    x = noise(1, 64, 64)
    plain, searched = (scheme.choose_qparams(x, one) for one in (MinMax(), MSE()))
    before, after = plain.scale, searched.scale
    assert before is not None
    assert after is not None
    assert (after.float() > before.float()).any()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@given(x=tensors(SHAPE, -1e4, 1e4))
def test_float8_is_torchs_cast_of_the_scaled_values(dtype: torch.dtype, x: Tensor) -> None:
    scheme = Float8(dtype)
    qparams = scheme.choose_qparams(x, MinMax())
    assert qparams.scale is not None
    largest = x.abs().amax(-1, keepdim=True)
    tiny = torch.finfo(torch.float32).tiny
    expected = (largest / torch.finfo(dtype).max).clamp(min=tiny).masked_fill(largest == 0, 0.0)
    assert same_bits(qparams.scale, expected)
    end = torch.finfo(dtype).max
    theirs = (x / expected.masked_fill(expected == 0, 1.0)).clamp(-end, end).to(dtype)
    q = scheme.quantize(x, qparams)
    assert q.codes.dtype == torch.int8
    assert same_bits(q.codes.view(dtype), theirs)
    assert same_bits(scheme.dequantize(q), theirs.to(torch.float32) * expected)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(16)], ids=repr)
def test_float8_codes_are_bytes_that_torch_reads(granularity: PerTensor) -> None:
    x = noise(*SHAPE)
    scheme = Float8(granularity=granularity)
    q = scheme.quantize(x, scheme.choose_qparams(x, MinMax()))
    packed = PackedTensor.pack(q, scheme, Layout.grouped((4, 64)), torch.float32)
    codes = packed.tensors["codes"]
    assert codes.shape == SHAPE
    values = codes.view(torch.float8_e4m3fn).to(torch.float32)
    assert float(values.abs().max()) == 448


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "float8", "dtype": "float16"}, "Float8 is to float8_e4m3fn or float8_e5m2"),
        ({"kind": "float8", "scale_dtype": "float8_e4m3fn"}, "scale_dtype is one of float16"),
        ({"kind": "float8", "granularity": 3}, "granularity is a Granularity"),
        ({"kind": "microscaling", "element": "e1m2"}, "element is one of 'e2m1'"),
        ({"kind": "microscaling", "scale": "e5m2"}, "scale is one of 'e8m0', 'e4m3'"),
        ({"kind": "microscaling", "granularity": {"kind": "per_tensor"}}, "a scale per group"),
    ],
    ids=str,
)
def test_formats_that_there_are_not_are_refused(config: dict[str, Json], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Scheme.from_config(config)


@given(size=st.sampled_from([16, 24, 100]))
def test_rows_that_blocks_do_not_tile_are_refused(size: int) -> None:
    reason = Microscaling.mxfp4().refuse((1, 4, size))
    assert reason == f"a group of 32 does not divide a row of {size}"
