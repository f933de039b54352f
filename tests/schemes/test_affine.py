"""The affine grid, against torch's quantized operators and the definition in float64."""

import math
from itertools import product

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mono_quant import (
    Affine,
    ConfigurationError,
    Granularity,
    InputError,
    PackedTensor,
    PerGroup,
    PerTensor,
    QParams,
)
from mono_quant.configurable import Json
from mono_quant.numerics.blocks import AT_ONCE, block_range
from mono_quant.numerics.granularity import Shape
from mono_quant.numerics.values import Layout
from mono_quant.testing import check_stack
from tests.helpers import (
    for_each,
    noise,
    same_bits,
    stack_and_step,
    torch_fake_quantize,
)
from tests.schemes.grids import (
    CODED,
    FLOATING,
    GRANULARITIES,
    GRIDS,
    SHAPE,
    STACKS,
    qparams_of,
    scale_of,
)


def cut(x: Tensor, qparams: QParams) -> Tensor:
    """Return each block of a contiguous stack as a row; blocks here never split other rows."""
    return x.reshape(scale_of(qparams).numel(), -1)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")  # it is deprecated
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
@pytest.mark.parametrize("magnitude", [1e-7, 1e-3, 1.0, 2e7])
def test_symmetric_codes_equal_those_of_torch_bit_for_bit(
    granularity: Granularity, magnitude: float
) -> None:
    scheme = Affine(8, granularity=granularity)
    x = noise(4, 16, 64) * magnitude
    qparams = qparams_of(scheme, x * 0.9)  # so that some of it is clipped
    codes = scheme.quantize(x, qparams).codes
    scale = scale_of(qparams).to(torch.float32).flatten()
    zero = torch.zeros_like(scale, dtype=torch.int64)
    blocks = cut(x, qparams)
    rows = torch.quantize_per_channel(blocks, scale, zero, 0, torch.qint8)
    assert same_bits(codes.reshape(blocks.shape), rows.int_repr())
    if isinstance(granularity, PerTensor):
        whole = torch.quantize_per_tensor(x, float(scale), 0, torch.qint8)
        assert same_bits(codes, whole.int_repr())


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
@pytest.mark.parametrize("magnitude", [1e-7, 1e-3, 1.0, 2e7])
def test_asymmetric_codes_equal_those_of_torch_bit_for_bit(
    granularity: Granularity, magnitude: float
) -> None:
    scheme = Affine(8, symmetric=False, granularity=granularity)
    x = noise(4, 16, 64) * magnitude
    qparams = qparams_of(scheme, x * 0.9)
    blocks = cut(x, qparams)
    codes = scheme.quantize(x, qparams).codes.reshape(blocks.shape)
    scale = scale_of(qparams).to(torch.float32).flatten()
    assert qparams.zero_point is not None
    zero = qparams.zero_point.flatten().to(torch.int64)
    expected = torch.quantize_per_channel(blocks, scale, zero, 0, torch.quint8).int_repr()
    assert torch.equal(codes, expected)
    if isinstance(granularity, PerTensor):
        whole = torch.quantize_per_tensor(x, float(scale), int(zero), torch.quint8)
        assert torch.equal(codes, whole.int_repr().reshape(blocks.shape))


@pytest.mark.parametrize(("scale", "zero_point"), [(0.1, 0), (1 / 3, 7), (0.25, 128), (1.0, 255)])
def test_halves_are_rounded_as_torch_rounds_them(scale: float, zero_point: int) -> None:
    x = (torch.arange(-300, 300) + 0.5) * scale
    zero = torch.tensor([[[zero_point]]], dtype=torch.uint8)
    qparams = QParams(torch.tensor([[[scale]]]), zero, (1, 1, 600))
    found = Affine(8, symmetric=False).quantize(x.reshape(1, 1, -1), qparams).codes
    expected = torch.quantize_per_channel(
        x.unsqueeze(0), torch.tensor([scale]), torch.tensor([zero_point]), 0, torch.quint8
    )
    assert torch.equal(found.flatten(), expected.int_repr().flatten())


def test_halves_go_to_the_even_code() -> None:
    x = torch.tensor([[[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]]])
    qparams = QParams(torch.ones(1, 1, 1), None, (1, 1, 6))
    assert Affine(4).quantize(x, qparams).codes.tolist() == [[[-2, -2, 0, 0, 2, 2]]]


@given(scheme=CODED, x=STACKS)
def test_values_equal_those_of_torch_at_every_width(scheme: Affine, x: Tensor) -> None:
    qparams = qparams_of(scheme, x)
    found = scheme.fake_quantize(x, qparams)
    expected = torch_fake_quantize(x, scheme, qparams)
    places = x.to(torch.float64) / for_each(scale_of(qparams).to(torch.float64), SHAPE)
    halves = (places.remainder(1) - 0.5).abs() < 1e-4  # it adds the zero point after rounding
    exact = torch.ones_like(halves) if scheme.symmetric else ~halves
    assert torch.equal(found[exact], expected[exact])


@given(scheme=GRIDS, x=STACKS, shrunk=st.sampled_from([1.0, 0.5]))
def test_no_other_grid_point_is_nearer(scheme: Affine, x: Tensor, shrunk: float) -> None:
    qparams = qparams_of(scheme, x * shrunk)
    codes = scheme.quantize(x, qparams).codes
    assert int(codes.min()) >= scheme.quant_min
    assert int(codes.max()) <= scheme.quant_max
    scale = for_each(scale_of(qparams).to(torch.float64), SHAPE)
    zero = torch.zeros(SHAPE, dtype=torch.float64)
    if qparams.zero_point is not None:
        zero = for_each(qparams.zero_point.to(torch.float64), SHAPE)
    exact = x.to(torch.float64)
    grid = torch.arange(scheme.quant_min, scheme.quant_max + 1, dtype=torch.float64)
    points = (grid - zero.unsqueeze(-1)) * scale.unsqueeze(-1)
    least = (points - exact.unsqueeze(-1)).abs().amin(-1)
    chosen = ((codes.to(torch.float64) - zero) * scale - exact).abs()
    room = 4e-7 * exact.abs()  # a float32 reciprocal and product decide near a half
    room += 2.0**-23 * (exact + zero * scale).abs()  # and so does the sum with the zero point
    assert (chosen <= least + room).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_of_float_zero_points_equal_those_of_torch(bits: int) -> None:
    scheme = Affine(bits, False, scale_dtype=torch.float32, float_zero_point=True)
    x = noise(1, 64, 33)
    q = scheme.quantize(x, qparams_of(scheme, x))
    assert q.qparams.zero_point is not None
    scale, zero = scale_of(q.qparams).flatten(), q.qparams.zero_point.flatten()
    assert float((zero - zero.round()).abs().max()) > 0.3, "no fraction was tried"
    # a grid of 8 bits, which is not cut where that of fewer bits is
    theirs = torch.quantize_per_channel(x[0], scale, zero, 0, torch.quint8)
    assert theirs.qscheme() == torch.per_channel_affine_float_qparams
    codes = theirs.int_repr().clamp(max=scheme.quant_max)
    assert torch.equal(q.codes[0], codes)
    if bits == 8:
        torch.testing.assert_close(scheme.dequantize(q)[0], theirs.dequantize())


@given(scheme=FLOATING, x=STACKS)
def test_float_zero_points_are_of_the_dtype_of_the_scale_and_meet_the_low_end(
    scheme: Affine, x: Tensor
) -> None:
    qparams = qparams_of(scheme, x)
    zero = qparams.zero_point
    assert zero is not None
    assert zero.dtype == scale_of(qparams).dtype
    low, _ = block_range(x.clamp(max=0), scheme.granularity.block_size(SHAPE))
    exact = -low.to(torch.float64) / scale_of(qparams).to(torch.float64)
    limits = torch.finfo(zero.dtype)
    room = (limits.eps + 1e-6) * exact.abs().clamp(min=limits.smallest_normal)
    assert ((zero.to(torch.float64) - exact).abs() <= room).all()


@given(scheme=CODED, x=STACKS)
def test_zero_is_on_every_grid_whose_zero_points_are_codes(scheme: Affine, x: Tensor) -> None:
    qparams = qparams_of(scheme, x)
    zeros = scheme.fake_quantize(torch.zeros(SHAPE), qparams)
    assert torch.equal(zeros, torch.zeros(SHAPE))


@given(scheme=GRIDS, x=STACKS)
def test_the_laws_hold_of_any_stack(scheme: Affine, x: Tensor) -> None:
    check_stack(scheme, x)


@given(scheme=GRIDS, x=STACKS)
def test_the_error_is_half_a_step_and_what_a_rounded_scale_adds(scheme: Affine, x: Tensor) -> None:
    qparams = qparams_of(scheme, x)
    step = for_each(scale_of(qparams).to(torch.float64), SHAPE)
    error = (scheme.fake_quantize(x, qparams).to(torch.float64) - x.to(torch.float64)).abs()
    # Half a step; an eighth because the scale is rounded to its dtype; another half where the
    # rounded zero point pushes an end of the range off the grid.
    room = 0.625 + (0.5 if not scheme.symmetric else 0)
    assert (error <= step * room * (1 + 1e-5)).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_span_the_whole_width(bits: int, symmetric: bool) -> None:
    scheme = Affine(bits, symmetric)
    assert (scheme.quant_min, scheme.quant_max) == (
        (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    )
    assert scheme.code_bits == bits
    assert scheme.code_min == scheme.quant_min
    x = torch.linspace(-1, 1, 4 * 2**bits).reshape(1, 1, -1)
    q = scheme.quantize(x, qparams_of(scheme, x))
    assert q.codes.dtype == (torch.int8 if symmetric else torch.uint8)
    seen = set(q.codes.flatten().tolist())
    lowest = scheme.quant_min + (1 if symmetric else 0)  # max|x| is the largest code, mirrored
    assert seen == set(range(lowest, scheme.quant_max + 1))


EVERY_GRID = [
    Affine(bits, symmetric, granularity)
    for bits, symmetric, granularity in product((2, 4, 8), (True, False), GRANULARITIES)
]


@pytest.mark.parametrize("scheme", EVERY_GRID, ids=Affine.describe)
@pytest.mark.parametrize("value", [1.0, -1.0, 0.3, -1e-7, 2e7, 1e38, -1e38])
def test_a_constant_block_comes_back(scheme: Affine, value: float) -> None:
    x = torch.full(SHAPE, value)
    exact = attrs.evolve(scheme, scale_dtype=torch.float32)
    found = exact.fake_quantize(x, qparams_of(exact, x))
    torch.testing.assert_close(found, x, rtol=1e-6, atol=0)
    found = scheme.fake_quantize(x, qparams_of(scheme, x))
    torch.testing.assert_close(found, x, rtol=1e-3, atol=0)  # a float16 scale has 11 bits


@pytest.mark.parametrize("scheme", EVERY_GRID, ids=Affine.describe)
@pytest.mark.parametrize("magnitude", [1e-44, 1e-40, 1e-38, 1e-30, 1e-7, 2e7, 1e30, 1e38])
def test_extreme_magnitudes_stay_finite_and_lie_within_a_step(
    scheme: Affine, magnitude: float
) -> None:
    x = noise(*SHAPE).clamp(-3, 3) * magnitude
    qparams = qparams_of(scheme, x)
    found = scheme.fake_quantize(x, qparams)
    assert torch.isfinite(found).all()
    assert torch.isfinite(scale_of(qparams)).all()
    assert (scale_of(qparams) > 0).all()
    step = for_each(scale_of(qparams).to(torch.float64), SHAPE)
    assert ((found.to(torch.float64) - x.to(torch.float64)).abs() <= step * 1.001).all()


@pytest.mark.parametrize("scheme", EVERY_GRID, ids=Affine.describe)
def test_a_grid_over_the_largest_floats_is_finite_or_refused(scheme: Affine) -> None:
    largest = torch.finfo(torch.float32).max
    for x in (torch.full(SHAPE, largest), noise(*SHAPE).sign() * largest):
        try:
            qparams = qparams_of(scheme, x)
        except InputError as error:
            assert "3.4e+38 are too large" in str(error)  # noqa: PT017  # either one is right
            continue
        assert torch.isfinite(scheme.fake_quantize(x, qparams)).all()


def test_an_asymmetric_grid_over_all_floats_is_refused() -> None:
    largest = torch.finfo(torch.float32).max
    x = noise(*SHAPE).sign() * largest
    with pytest.raises(InputError, match="ends of a 4-bit grid over them pass the largest float32"):
        qparams_of(Affine(4, symmetric=False), x)


def test_a_remark_says_how_much_is_clipped() -> None:
    scheme = Affine(8)
    x = torch.linspace(-1, 1, 1000).reshape(1, 1, -1)
    ends = (torch.tensor([[[-0.5]]]), torch.tensor([[[0.5]]]))
    q = scheme.quantize(x, scheme.calculate_qparams(*ends, block_size=(1, 1, 1000)))
    remark = scheme.remark(q)
    assert remark is not None
    assert remark.startswith("50% of its codes lie on the ends")


@pytest.mark.parametrize("clipped", [0.1, 0.24, 0.3, 0.9])
def test_of_many_codes_the_share_that_is_clipped_is_counted_where_some_are(clipped: float) -> None:
    scheme = Affine(8)
    x = torch.linspace(0, 1, 1 << 19).reshape(1, 512, -1)  # whole rows of it are clipped
    assert x.numel() > AT_ONCE
    high = torch.full((1, 512, 1), 1 - clipped)
    q = scheme.quantize(x, scheme.calculate_qparams(-high, high, block_size=(1, 1, 1024)))
    codes = q.codes.to(torch.int16)
    share = float(((codes == 127) | (codes == -128)).double().mean())
    expected = f"{share:.0%} of its codes lie on the ends of the grid" if share > 0.25 else None
    assert scheme.remark(q) == expected
    assert (clipped > 0.25) is (expected is not None)


@pytest.mark.parametrize(("group", "bits"), [(32, 4.625), (64, 4.3125), (128, 4.15625)])
@pytest.mark.parametrize("shape", [(1, 384, 384), (1, 1536, 384), (1, 384, 1536), (1, 384, 128)])
def test_four_bits_take_what_their_group_adds(group: int, bits: float, shape: Shape) -> None:
    scheme = Affine(4, symmetric=False, granularity=PerGroup(group))
    assert scheme.bits_per_weight(shape) == bits
    assert scheme.nbytes(shape) == bits * math.prod(shape) / 8


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        (Affine(8), 8 + 16 / 384),
        (Affine(8, scale_dtype=torch.float32), 8 + 32 / 384),
        (Affine(4, granularity=PerGroup(64)), 4 + 16 / 64),
        (Affine(3, symmetric=False, granularity=PerGroup(64)), 3 + (16 + 3) / 64),
        (Affine(2, symmetric=False, granularity=PerGroup(16)), 2 + (16 + 2) / 16),
        (Affine(8, granularity=PerTensor()), 8 + 16 / (384 * 384)),
        (Affine(4, False, PerGroup(64), float_zero_point=True), 4 + 32 / 64),
        (Affine(3, False, PerGroup(32), torch.float32, float_zero_point=True), 3 + 64 / 32),
    ],
    ids=repr,
)
def test_bits_per_weight_count_scales_and_zero_points(scheme: Affine, bits: float) -> None:
    assert scheme.bits_per_weight((1, 384, 384)) == pytest.approx(bits, abs=1e-12)


@given(
    scheme=GRIDS,
    groups=st.integers(1, 3),
    rows=st.integers(1, 7),
    columns=st.integers(1, 9).map(lambda n: 4 * n),
)
def test_predicted_bytes_are_the_packed_bytes(
    scheme: Affine, groups: int, rows: int, columns: int
) -> None:
    stack = (groups, rows, columns)
    x = noise(*stack)
    q = scheme.quantize(x, qparams_of(scheme, x))
    layout = Layout.grouped((groups * rows, columns), groups)
    packed = PackedTensor.pack(q, scheme, layout, torch.float32)
    scales = scale_of(q.qparams)
    wider = scales.numel() * (scales.element_size() - scheme.scale_dtype.itemsize)
    assert packed.nbytes == scheme.nbytes(stack) + wider
    if wider == 0:
        assert scheme.bits_per_weight(stack) == 8 * packed.nbytes / x.numel()


@given(scheme=GRIDS, x=STACKS)
def test_packing_loses_nothing(scheme: Affine, x: Tensor) -> None:
    q = scheme.quantize(x, qparams_of(scheme, x))
    layout = Layout.grouped((6, 8), groups=2)
    packed = PackedTensor.pack(q, scheme, layout, torch.float32)
    back = packed.unpack()
    assert same_bits(back.codes, q.codes)
    assert same_bits(scale_of(back.qparams), scale_of(q.qparams))
    assert (back.qparams.zero_point is None) == (q.qparams.zero_point is None)
    if back.qparams.zero_point is not None and q.qparams.zero_point is not None:
        assert same_bits(back.qparams.zero_point, q.qparams.zero_point)
    assert back.qparams.block_size == q.qparams.block_size
    values, _ = stack_and_step(packed, 8)
    smallest = 2.0**-149  # what float32 rounds to down there
    torch.testing.assert_close(
        packed.dequantize(torch.float64).reshape(SHAPE), values, rtol=1e-6, atol=smallest
    )


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16, 4.0, "4", True, None])
def test_a_width_is_a_whole_number_from_2_to_8(bits: Json) -> None:
    with pytest.raises(ConfigurationError, match="Affine has 2 to 8 bits, not"):
        Affine.from_config({"kind": "affine", "bits": bits})


@pytest.mark.parametrize("symmetric", ["no", "false", 0, None])
def test_symmetric_is_a_boolean(symmetric: Json) -> None:
    with pytest.raises(ConfigurationError, match="symmetric"):
        Affine.from_config({"kind": "affine", "symmetric": symmetric})


def test_a_symmetric_grid_has_no_float_zero_points() -> None:
    with pytest.raises(ConfigurationError, match="say symmetric=False"):
        Affine(4, float_zero_point=True)
    with pytest.raises(ConfigurationError, match="float_zero_point is True or False, not 1"):
        Affine.from_config({"kind": "affine", "symmetric": False, "float_zero_point": 1})


@pytest.mark.parametrize("dtype", ["float64", "int8", "nonsense", 16, None])
def test_a_scale_dtype_is_one_of_three(dtype: Json) -> None:
    with pytest.raises(ConfigurationError):
        Affine.from_config({"kind": "affine", "scale_dtype": dtype})


@pytest.mark.parametrize("granularity", ["channel", 64, None, {"kind": "minmax"}])
def test_a_granularity_is_an_object(granularity: Json) -> None:
    with pytest.raises(ConfigurationError, match="granularity is a Granularity"):
        Affine.from_config({"kind": "affine", "granularity": granularity})


def test_a_group_that_does_not_divide_is_refused_with_the_reason() -> None:
    scheme = Affine(4, granularity=PerGroup(64))
    assert scheme.refuse((1, 8, 128)) is None
    assert scheme.refuse((1, 8, 100)) == "a group of 64 does not divide a row of 100"


def test_qparams_without_a_scale_are_refused() -> None:
    with pytest.raises(InputError, match="Affine needs a scale"):
        Affine().quantize(noise(*SHAPE), QParams(None, None, (1, 1, 8)))


def test_a_scale_dtype_may_be_given_by_name() -> None:
    assert Affine.from_config({"kind": "affine", "scale_dtype": "bfloat16"}) == Affine(
        scale_dtype=torch.bfloat16
    )


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (Affine(), "8-bit symmetric per-channel"),
        (Affine(4, False, PerGroup(64)), "4-bit asymmetric per-group 64"),
        (Affine(2, True, PerTensor()), "2-bit symmetric per-tensor"),
        (
            Affine(4, False, PerGroup(64), float_zero_point=True),
            "4-bit asymmetric per-group 64, float zero points",
        ),
    ],
    ids=repr,
)
def test_schemes_describe_themselves_in_a_few_words(scheme: Affine, words: str) -> None:
    assert scheme.describe() == words
