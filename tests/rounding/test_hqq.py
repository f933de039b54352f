"""Half-quadratic quantization: against the paper's formulas in float64, and its promise."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mono_quant import (
    HQQ,
    MSE,
    Affine,
    ConfigurationError,
    FloatCast,
    Grid,
    MinMax,
    PerChannel,
    PerGroup,
    PerTensor,
    QTensor,
    Quantizer,
    RangeEstimator,
    Rounding,
    RoundToNearest,
    Scheme,
    Statistics,
    load_model,
)
from mono_quant.numerics.blocks import AT_ONCE, block_sum
from tests.helpers import noise, same_bits, same_tensors, tensors

FLOATS = Affine(4, False, PerGroup(16), torch.float32, float_zero_point=True)
SCHEMES = st.builds(
    Affine,
    bits=st.integers(2, 8),
    symmetric=st.just(False),
    granularity=st.sampled_from([PerTensor(), PerChannel(), PerGroup(4)]),
    scale_dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    float_zero_point=st.booleans(),
)


def rounded(
    weight: Tensor, scheme: Scheme, rounding: Rounding, observer: RangeEstimator | None = None
) -> QTensor:
    return rounding.round(weight, Grid(scheme, observer or MinMax()), Statistics())


def missed(weight: Tensor, q: QTensor, scheme: Scheme) -> Tensor:
    """Return the sum of absolute errors of each block, in float64."""
    error = scheme.dequantize(q).to(torch.float64) - weight.to(torch.float64)
    return block_sum(error.abs(), q.qparams.block_size)


def zero_points(q: QTensor) -> Tensor:
    assert q.qparams.zero_point is not None
    return q.qparams.zero_point


def published(w: Tensor, scale: Tensor, zero: Tensor, hqq: HQQ, top: int) -> Tensor:
    """Return the zero point for one block, by the formulas of the paper in float64."""
    w, scale, zero = w.double(), scale.double(), zero.double()
    best, least, beta = zero, float("inf"), hqq.beta
    for _ in range(hqq.iterations + 1):
        codes = torch.clamp(torch.round(w / scale + zero), 0, top)
        r = w - (codes - zero) * scale
        error = float(r.abs().mean())
        if not error < least:
            break
        best, least = zero, error
        e = torch.sign(r) * torch.relu(r.abs() - r.abs() ** (hqq.p - 1) / beta)
        e[r == 0] = 0
        zero = torch.mean(codes - (w - e) / scale)
        beta *= hqq.kappa
    return best


@pytest.mark.parametrize("hqq", [HQQ(), HQQ(5, p=0.5, beta=3.0, kappa=1.1), HQQ(p=1.0)], ids=repr)
@pytest.mark.parametrize("magnitude", [0.02, 10.0])
def test_zero_points_are_those_of_the_papers_formulas(hqq: HQQ, magnitude: float) -> None:
    # of an odd number of values: as many errors above as below zero would leave their sum as it is
    # wherever the zero point goes, and float32 would decide
    scheme = attrs.evolve(FLOATS, granularity=PerGroup(15))
    weight = (noise(1, 40, 30) ** 3) * magnitude
    q, before = rounded(weight, scheme, hqq), scheme.choose_qparams(weight, MinMax())
    assert before.scale is not None
    assert before.zero_point is not None
    blocks, scales = weight.reshape(-1, 15), before.scale.reshape(-1)
    starts = before.zero_point.reshape(-1)
    expected = torch.stack(
        [published(*one, hqq, 15) for one in zip(blocks, scales, starts, strict=True)]
    )
    found = zero_points(q).reshape(-1).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert float((expected - starts).abs().amax()) > 0.1, "no zero point moved"
    if magnitude > 1:  # errors are then large enough to be outliers
        plain = attrs.evolve(hqq, beta=1e-9)
        assert not torch.equal(zero_points(rounded(weight, scheme, plain)), zero_points(q))


@given(
    scheme=SCHEMES,
    weight=tensors((2, 3, 8)),
    hqq=st.builds(HQQ, st.integers(1, 20), st.sampled_from([0.5, 0.7, 1.0])),
    observer=st.sampled_from([MinMax(), MSE(steps=5)]),
)
def test_no_block_is_worse_than_rounded_to_nearest_by_its_mean_absolute_error(
    scheme: Affine, weight: Tensor, hqq: HQQ, observer: RangeEstimator
) -> None:
    q = rounded(weight, scheme, hqq, observer)
    nearest = missed(weight, rounded(weight, scheme, RoundToNearest(), observer), scheme)
    assert (missed(weight, q, scheme) <= nearest * (1 + 1e-5) + 1e-30).all()
    assert int(q.codes.min()) >= scheme.quant_min
    assert int(q.codes.max()) <= scheme.quant_max


def test_most_blocks_of_a_normal_weight_are_better_than_rounded_to_nearest() -> None:
    scheme, weight = Affine(4, False, PerGroup(64), float_zero_point=True), noise(1, 64, 512)
    ours, nearest = (
        missed(weight, rounded(weight, scheme, one), scheme) for one in (HQQ(), RoundToNearest())
    )
    assert float((ours < nearest).double().mean()) > 0.5


def test_more_steps_never_make_it_worse() -> None:
    weight = noise(1, 64, 512) ** 3
    errors = [missed(weight, rounded(weight, FLOATS, HQQ(n)), FLOATS) for n in (1, 2, 5, 20, 100)]
    for fewer, more in pairwise(errors):
        assert (more <= fewer * (1 + 1e-6)).all()
    assert float(errors[-1].sum()) < float(errors[0].sum())


def test_scales_are_those_of_the_range() -> None:
    weight = noise(1, 32, 64) ** 3
    for observer in (MinMax(), MSE(steps=20)):
        qparams = FLOATS.choose_qparams(weight, observer)
        q = rounded(weight, FLOATS, HQQ(), observer)
        assert q.qparams.scale is not None
        assert qparams.scale is not None
        assert same_bits(q.qparams.scale, qparams.scale)
        assert not torch.equal(
            zero_points(q), zero_points(rounded(weight, FLOATS, RoundToNearest()))
        )


def test_zero_points_that_are_codes_stay_codes() -> None:
    scheme = Affine(3, False, PerGroup(8))
    q = rounded(noise(2, 5, 64), scheme, HQQ())
    assert zero_points(q).dtype == torch.uint8
    assert int(zero_points(q).max()) <= 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_float_zero_points_are_found_as_they_are_stored(dtype: torch.dtype) -> None:
    q = rounded(noise(1, 8, 64), attrs.evolve(FLOATS, scale_dtype=dtype), HQQ())
    assert zero_points(q).dtype == dtype


@pytest.mark.parametrize("granularity", [PerChannel(), PerGroup(64)], ids=repr)
def test_rows_of_a_large_weight_are_worked_on_in_parts_to_the_same_result(
    granularity: PerChannel | PerGroup,
) -> None:
    scheme = Affine(4, False, granularity, float_zero_point=True)
    weight = noise(2, 1031, 256) * torch.logspace(-3, 3, 1031)[:, None]
    assert weight.numel() > 2 * AT_ONCE
    q = rounded(weight, scheme, HQQ())
    for rows in (slice(0, 3), slice(510, 515), slice(1028, 1031)):
        alone = rounded(weight[:, rows], scheme, HQQ())
        assert same_bits(zero_points(q)[:, rows], zero_points(alone))
        assert same_bits(q.codes[:, rows], alone.codes)


def test_blocks_that_hold_several_rows_have_one_zero_point() -> None:
    scheme = Affine(4, False, PerTensor(), torch.float32, float_zero_point=True)
    weight = noise(2, 6, 8)
    q, row = rounded(weight, scheme, HQQ()), rounded(weight.reshape(1, 1, -1), scheme, HQQ())
    assert zero_points(q).shape == (1, 1, 1)
    torch.testing.assert_close(zero_points(q), zero_points(row), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 0, 64), (1, 4, 0)])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel()], ids=repr)
def test_weights_of_nothing_stay_so(
    shape: tuple[int, ...], granularity: PerTensor | PerChannel
) -> None:
    scheme = Affine(4, False, granularity, float_zero_point=True)
    q = rounded(torch.zeros(shape), scheme, HQQ())
    assert q.shape == shape
    assert zero_points(q).isfinite().all()


def test_rows_of_zeros_stay_zeros_and_the_weight_as_it_was() -> None:
    weight = noise(1, 4, 64)
    weight[0, 2] = 0
    before = weight.clone()
    values = FLOATS.dequantize(rounded(weight, FLOATS, HQQ()))
    assert torch.equal(values[0, 2], torch.zeros(64))
    assert same_bits(weight, before)


@attrs.frozen
class Halves(Affine):
    """Zero points lie between codes, where `HQQ` cannot know them from."""

    kind = "tests.halves"

    def hold_zero_point(self, zero_point: Tensor, scale: Tensor) -> Tensor:
        return (zero_point - 0.5).round().add(0.5).to(scale.dtype)


def test_what_a_zero_point_may_be_is_the_schemes_affair() -> None:
    scheme, weight = Halves(4, False, PerGroup(16)), noise(1, 40, 32) ** 3
    q = rounded(weight, scheme, HQQ())
    assert (zero_points(q).remainder(1) == 0.5).all()
    nearest = missed(weight, rounded(weight, scheme, RoundToNearest()), scheme)
    assert (missed(weight, q, scheme) <= nearest * (1 + 1e-5)).all()


@pytest.mark.parametrize("scheme", [Affine(8), Affine(4, granularity=PerTensor()), FloatCast()])
def test_a_grid_without_zero_points_is_refused(scheme: Scheme) -> None:
    assert scheme.describe() in str(HQQ().refuse(scheme))
    with pytest.raises(ConfigurationError, match=r"has none: say asymmetric\(\)"):
        rounded(noise(1, 4, 64), scheme, HQQ())


def test_the_plan_names_the_layers_that_it_refuses_and_the_call_that_mends_it() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    mixed = Quantizer().bits(4).rounding(HQQ()).override("2", bits=8)
    with pytest.raises(ConfigurationError) as refused:
        mixed.plan(model)
    assert str(refused.value) == (
        "the rounding of 2: HQQ moves zero points, and 8-bit symmetric per-channel has none: say "
        "asymmetric() or float_zero_point(); give it another grid, or round it otherwise with "
        "override('2', rounding=RoundToNearest())"
    )
    for mended in (
        mixed.override("2", rounding=RoundToNearest()),
        mixed.override("2", symmetric=False),
        mixed.float_zero_point(),
    ):
        assert len(mended.plan(model).run(progress=False).report.quantized) == 2
    with pytest.raises(ConfigurationError, match="the rounding of 0, 2: HQQ"):
        Quantizer().rounding(HQQ()).plan(model)


def test_a_model_of_float_zero_points_is_counted_and_comes_back(tmp_path: Path) -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 96), nn.Linear(96, 50))

    x = torch.arange(50)
    quantizer = Quantizer().bits(4).group_size(32).float_zero_point().rounding(HQQ()).only("*")
    result = quantizer.observer(MSE(steps=10)).apply(network(), progress=False)
    assert result.report.bits_per_weight == 4 + 32 / 32
    dense = result.dequantize()
    torch.testing.assert_close(result.model(x), dense(x), rtol=0, atol=1e-4)
    first = result.model.get_submodule("0"), dense.get_submodule("0")
    assert same_bits(first[0](x), first[1](x)), "rows that are looked up"
    for suffix in (".safetensors", ".pt"):
        loaded = load_model(result.save(tmp_path / f"model{suffix}"), network())
        assert same_tensors(loaded, result.model)
        assert same_bits(loaded(x), result.model(x))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"iterations": 0}, "1 step or more, not 0"),
        ({"p": 0.0}, "p lies above 0 and is at most 1, not 0.0"),
        ({"p": 1.5}, "not 1.5"),
        ({"beta": 0.0}, "beta is above 0 and kappa at least 1, not 0.0 and 1.01"),
        ({"kappa": 0.9}, "not 10.0 and 0.9"),
    ],
    ids=str,
)
def test_what_minimizes_nothing_is_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        HQQ.from_config({"kind": "hqq", **fields})


def test_it_is_written_down_and_needs_no_data() -> None:
    made = HQQ(iterations=5, p=1.0)
    assert Rounding.from_config(made.to_config()) == made
    assert repr(made) == "HQQ(iterations=5, p=1.0, beta=10.0, kappa=1.01, zero_on_grid=False)"
    assert made.needs == ()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_zero_may_be_a_grid_point_at_the_start(bits: int, dtype: torch.dtype) -> None:
    scheme = attrs.evolve(FLOATS, bits=bits, scale_dtype=dtype)
    weight = noise(1, 24, 64) + 0.3
    start = Grid(scheme, MinMax()).qparams(weight)
    assert start.zero_point is not None
    assert start.scale is not None
    zeros = start.zero_point.float().round().to(dtype)
    assert not same_bits(zeros, start.zero_point)
    nearest = scheme.quantize(weight, replace(start, zero_point=zeros))
    found = rounded(weight, scheme, HQQ(zero_on_grid=True))
    assert (missed(weight, found, scheme) <= 1.0001 * missed(weight, nearest, scheme)).all()
    assert not same_bits(zero_points(found), zero_points(rounded(weight, scheme, HQQ())))
