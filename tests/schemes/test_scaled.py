"""What all grids that look levels up have in common, against brute force in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mono_quant import (
    MSE,
    Auto,
    Codebook,
    FittedCodebook,
    Float8,
    InputError,
    Layout,
    Microscaling,
    MinMax,
    PackedTensor,
    PerChannel,
    PerGroup,
    PerTensor,
    QParams,
    RangeEstimator,
    Scheme,
)
from mono_quant.schemes.scaled import Scaled
from mono_quant.testing import check_stack
from tests.helpers import (
    for_each,
    levels_and_gaps,
    noise,
    same_bits,
    scales_of,
    table_of,
    tensors,
)

SHAPE = (2, 3, 8)
_E4M3 = torch.float8_e4m3fn
SCHEMES: list[Scaled] = [
    Float8(),
    Float8(torch.float8_e5m2, PerTensor(), torch.bfloat16),
    Codebook.nf4(PerGroup(4)),
    Codebook.nf4(PerTensor(), torch.float32),
    Codebook.nf4(PerGroup(4), _E4M3),
    FittedCodebook(4, PerGroup(4)),
    FittedCodebook(3, PerTensor(), _E4M3),
    FittedCodebook(2, PerChannel(), torch.bfloat16),
    FittedCodebook(8, PerChannel(), _E4M3),
    Microscaling("e2m1", "e8m0", PerGroup(4)),
    Microscaling("e4m3", "e8m0", PerGroup(8)),
    Microscaling("e5m2", "e4m3", PerGroup(2)),
    Microscaling("e2m1", "e4m3", PerGroup(4)),
]
each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.describe())
STACKS = st.one_of(tensors(SHAPE), tensors(SHAPE, -1e-3, 1e-3), tensors(SHAPE, -1e38, 1e38))
LAYOUT = Layout.grouped((6, 8), groups=2)


def packed(scheme: Scheme, x: Tensor, observer: RangeEstimator | None = None) -> PackedTensor:
    qparams = scheme.choose_qparams(x, observer or MinMax())
    q = scheme.quantize(x, qparams)
    layout = Layout.grouped((x.shape[0] * x.shape[1], x.shape[2]), x.shape[0])
    return PackedTensor.pack(q, scheme, layout, torch.float32)


def values_of(weight: PackedTensor) -> Tensor:
    """Return what the tensors of a weight mean, by the specifications, in float64."""
    return levels_and_gaps(weight, weight.layout.stack[2])[0]


@given(scheme=st.sampled_from(SCHEMES), x=STACKS)
def test_no_other_level_is_nearer(scheme: Scaled, x: Tensor) -> None:
    weight = packed(scheme, x)
    table = table_of(scheme, weight.tensors)
    table = table[torch.isfinite(table)]
    scale = for_each(scales_of(weight.tensors), SHAPE)
    chosen = (values_of(weight) - x.double()).abs()
    least = (table * scale.unsqueeze(-1) - x.double().unsqueeze(-1)).abs().amin(-1)
    room = 4e-7 * x.double().abs() + 2e-7 * scale.abs() * table.abs().amax() + 1e-44
    assert (chosen <= least + room).all()


@given(scheme=st.sampled_from(SCHEMES), x=STACKS)
def test_values_are_levels_times_scales_to_the_bit(scheme: Scaled, x: Tensor) -> None:
    weight = packed(scheme, x)
    assert torch.equal(weight.dequantize().reshape(SHAPE).double(), values_of(weight))
    back = weight.unpack()
    assert same_bits(scheme.dequantize(back).reshape(6, 8), weight.dequantize())
    rows = torch.tensor([2, 0])
    alone = packed(scheme, x[:1])
    assert same_bits(alone.rows(rows), alone.dequantize()[rows])
    for part in (slice(0, 1), slice(1, 3)):
        assert same_bits(
            scheme.dequantize(weight.part(part)), scheme.dequantize(back)[:, part].contiguous()
        )


@given(scheme=st.sampled_from(SCHEMES), x=STACKS)
def test_the_laws_hold_of_any_stack(scheme: Scaled, x: Tensor) -> None:
    check_stack(scheme, x)


@each_scheme
def test_zeros_come_back_as_zeros_in_blocks_and_alone(scheme: Scaled) -> None:
    x = torch.zeros(SHAPE)
    assert not scheme.fake_quantize(x, scheme.choose_qparams(x, MinMax())).any()
    x = noise(*SHAPE)
    x[:, 1] = 0
    x[..., 2] = 0
    found = scheme.fake_quantize(x, scheme.choose_qparams(x, MSE(steps=5)))
    assert not found[:, 1].any()
    assert not found[..., 2].any()
    assert found.any()


@each_scheme
@pytest.mark.parametrize("value", [1.0, -1.0, 0.3, -1e-7, 2e7, 1e38, -1e38])
def test_a_constant_comes_back_nearly(scheme: Scaled, value: float) -> None:
    x = torch.full(SHAPE, value)
    found = scheme.fake_quantize(x, scheme.choose_qparams(x, MSE()))
    room = 0.07 if isinstance(scheme, Microscaling) and scheme.scale == "e8m0" else 0.04
    room = 0.25 if scheme.code_bits == 4 and isinstance(scheme, Microscaling) else room
    torch.testing.assert_close(found, x, rtol=room, atol=0)


@each_scheme
@pytest.mark.parametrize("magnitude", [1e-44, 1e-40, 1e-38, 1e-30, 1e-7, 2e7, 1e30, 1e38])
@pytest.mark.parametrize("observer", [MinMax(), MSE(steps=8)], ids=repr)
def test_extreme_magnitudes_stay_finite_and_near(
    scheme: Scaled, magnitude: float, observer: RangeEstimator
) -> None:
    x = noise(*SHAPE).clamp(-3, 3) * magnitude
    found = scheme.fake_quantize(x, scheme.choose_qparams(x, observer))
    assert torch.isfinite(found).all()
    largest = max(float(x.abs().max()), torch.finfo(torch.float32).tiny)  # no scale is smaller
    assert float((found.double() - x.double()).abs().max()) <= 0.65 * largest


def missed(scheme: Scheme, x: Tensor, observer: RangeEstimator) -> Tensor:
    """Return the squared error of each row, in float64."""
    found = scheme.fake_quantize(x, scheme.choose_qparams(x, observer))
    return (found.double() - x.double()).square().sum(-1)


@given(scheme=st.sampled_from(SCHEMES), x=STACKS)
def test_a_searched_range_is_never_worse(scheme: Scaled, x: Tensor) -> None:
    before, after = missed(scheme, x, MinMax()).sum(), missed(scheme, x, MSE(steps=12)).sum()
    # a fit follows the ranges it is given, and ends somewhere else
    room = 2.0 if isinstance(scheme, FittedCodebook) else 1 + 1e-5
    assert after <= before * room + 1e-30


@pytest.mark.parametrize(
    "scheme",
    [one for one in SCHEMES if one.code_bits < 8 and one.granularity.kind != "per_tensor"],
    ids=lambda scheme: scheme.describe(),
)
def test_a_searched_range_pays_on_normal_weights(scheme: Scaled) -> None:
    x = noise(1, 64, 256)
    before, after = missed(scheme, x, MinMax()).sum(), missed(scheme, x, MSE()).sum()
    assert after < 0.99 * before
    assert torch.equal(missed(scheme, x, Auto()), missed(scheme, x, MSE()))


@each_scheme
def test_parts_of_another_scheme_are_refused_with_the_reason(scheme: Scaled) -> None:
    tensors_of = dict(packed(scheme, noise(*SHAPE)).tensors)
    assert scheme.refuse_parts(tensors_of, SHAPE) is None
    without = {name: one for name, one in tensors_of.items() if name != "scale"}
    assert "scale" in str(scheme.refuse_parts(without, SHAPE))
    foreign = {**tensors_of, "g_idx": torch.zeros(8)}
    assert "it has codes, g_idx" in str(scheme.refuse_parts(foreign, SHAPE))
    wider = {**tensors_of, "scale": tensors_of["scale"].to(torch.float64)}
    assert scheme.refuse_parts(wider, SHAPE) == "scale is of torch.float64"
    for name, (size, _) in scheme.extras.items():
        longer = {**tensors_of, name: torch.cat([tensors_of[name]] * 2)}
        assert f"{name} is ({2 * size[0]},)" in str(scheme.refuse_parts(longer, SHAPE))
        other = {**tensors_of, name: tensors_of[name].to(torch.float64)}
        assert "torch.float64" in str(scheme.refuse_parts(other, SHAPE))
        lost = {**tensors_of, name: tensors_of[name] * math.nan}
        assert scheme.refuse_parts(lost, SHAPE) == f"{name} holds NaN or infinity"


@each_scheme
def test_parameters_of_another_scheme_are_refused(scheme: Scaled) -> None:
    with pytest.raises(InputError, match="needs a scale"):
        scheme.quantize(noise(*SHAPE), QParams(None, None, (1, 1, 8)))
    if scheme.extras:
        bare = QParams(torch.ones(2, 3, 1), None, (1, 1, 8))
        with pytest.raises(InputError, match="needs"):
            scheme.quantize(noise(*SHAPE), bare)


@each_scheme
def test_large_weights_are_quantized_in_pieces_to_the_same_end(scheme: Scaled) -> None:
    """More than is worked on at once, where rows have scales of their own."""
    x = noise(2, 600, 256)
    qparams = scheme.choose_qparams(x, MSE(steps=3))
    codes = scheme.quantize(x, qparams).codes
    if qparams.by_rows:
        for part in (slice(0, 1), slice(511, 513), slice(599, 600)):
            some = scheme.quantize(x[:, part], qparams.rows(part))
            assert same_bits(some.codes, codes[:, part].contiguous())
            values = scheme.dequantize(some)
            assert same_bits(values, scheme.fake_quantize(x, qparams)[:, part].contiguous())


def test_words_are_unlike() -> None:
    assert len({scheme.describe() for scheme in SCHEMES}) == len(SCHEMES)
