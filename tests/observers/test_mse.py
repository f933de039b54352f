"""The MSE search, against brute force in float64."""

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mono_quant import (
    MSE,
    Affine,
    ConfigurationError,
    Granularity,
    MinMax,
    PerChannel,
    PerGroup,
    PerTensor,
    QParams,
    QTensor,
    RangeEstimator,
)
from mono_quant.configurable import Config
from mono_quant.numerics.blocks import block_range
from mono_quant.numerics.granularity import Shape
from tests.helpers import for_each, noise, tensors

SHAPE = (2, 3, 8)
SCHEMES = st.builds(
    Affine,
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    granularity=st.sampled_from([PerTensor(), PerChannel(), PerGroup(4)]),
    scale_dtype=st.sampled_from([torch.float16, torch.float32]),
)
STACKS = st.one_of(
    tensors(SHAPE),
    st.builds(
        # rows of unlike magnitudes, some of them below what float16 can hold
        lambda seed, powers: noise(*SHAPE, seed=seed) * (10.0 ** torch.tensor(powers))[:, None],
        st.integers(0, 1000),
        st.lists(st.floats(-9, 5), min_size=3, max_size=3),
    ),
)


def blocks(x: Tensor, scheme: Affine) -> Tensor:
    """Return each block of a stack as a row, in float64."""
    size = torch.Size(scheme.granularity.block_size(tuple(x.shape))).numel()
    return x.to(torch.float64).reshape(-1, size)


def errors(x: Tensor, scheme: Affine, observer: RangeEstimator) -> Tensor:
    """Return the squared error of each block, summed in float64."""
    found = scheme.fake_quantize(x, scheme.choose_qparams(x, observer))
    return (blocks(found, scheme) - blocks(x, scheme)).square().sum(1)


def least_errors(x: Tensor, scheme: Affine, search: MSE) -> Tensor:
    """Return the least error of each block over all factors, from the definition in float64."""
    rows = blocks(x, scheme)
    least = torch.full(rows.shape[:1], torch.inf, dtype=torch.float64)
    for step in range(search.steps):
        factor = 1 - (1 - search.smallest) * step / (search.steps - 1)
        if scheme.symmetric:
            scale = rows.abs().amax(1, keepdim=True) * factor / scheme.quant_max
            zero = torch.zeros_like(scale)
        else:
            low = rows.amin(1, keepdim=True).clamp(max=0) * factor
            high = rows.amax(1, keepdim=True).clamp(min=0) * factor
            scale = (high - low) / scheme.quant_max
            zero = (-low / scale).round().clamp(0, scheme.quant_max)
        codes = ((rows / scale).round() + zero).clamp(scheme.quant_min, scheme.quant_max)
        least = least.minimum(((codes - zero) * scale - rows).square().sum(1))
    return least


@given(scheme=SCHEMES, x=STACKS)
def test_no_block_is_worse_than_with_min_max(scheme: Affine, x: Tensor) -> None:
    plain, best = errors(x, scheme, MinMax()), errors(x, scheme, MSE(steps=12))
    assert (best <= plain * (1 + 1e-5) + 1e-30).all()


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(16)], ids=repr)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_error_is_the_least_of_all_factors(
    bits: int, symmetric: bool, granularity: Granularity
) -> None:
    scheme = Affine(bits, symmetric, granularity, torch.float32)
    x = noise(2, 3, 64, seed=bits) ** 3  # long tails, so that shrinking pays
    search = MSE(steps=19)
    found, least = errors(x, scheme, search), least_errors(x, scheme, search)
    torch.testing.assert_close(found, least, rtol=1e-3, atol=0)


@pytest.mark.parametrize("group", [16, 64, 256])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_of_many_factors_few_are_tried_and_miss_next_to_nothing(
    monkeypatch: pytest.MonkeyPatch, bits: int, symmetric: bool, group: int
) -> None:
    scheme = Affine(bits, symmetric, PerGroup(group), torch.float32)
    x = noise(2, 64, 256, seed=bits)
    ranges, cover = list[Tensor](), Affine.calculate_qparams

    def noted(self: Affine, low: Tensor, high: Tensor, *, block_size: Shape) -> QParams:
        ranges.append(high)
        return cover(self, low, high, block_size=block_size)

    monkeypatch.setattr(Affine, "calculate_qparams", noted)
    found = errors(x, scheme, MSE()).sum()
    assert len(ranges) == 16 + 1, "and the best one"
    assert found <= 10**0.003 * least_errors(x, scheme, MSE()).sum(), "0.03 dB"


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1.0, 1e18, 1e25])
def test_weights_far_from_one_are_searched_alike(size: float) -> None:
    scheme = Affine(3, symmetric=False, scale_dtype=torch.float32)
    x = (noise(1, 16, 256) * size).to(torch.float32)
    search = MSE(steps=19)
    found, least = errors(x, scheme, search), least_errors(x, scheme, search)
    assert least.sum() < 0.9 * errors(x, scheme, MinMax()).sum(), "there is something to find"
    torch.testing.assert_close(found / size**2, least / size**2, rtol=1e-3, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_shrinking_pays_on_normal_weights_of_few_bits(bits: int) -> None:
    scheme = Affine(bits, symmetric=False, scale_dtype=torch.float32)
    x = noise(1, 16, 256)
    assert errors(x, scheme, MSE()).sum() < 0.9 * errors(x, scheme, MinMax()).sum()


@given(x=tensors(SHAPE), steps=st.integers(2, 9), smallest=st.floats(0.1, 0.9))
def test_both_ends_are_shrunk_by_one_factor_of_the_grid(
    x: Tensor, steps: int, smallest: float
) -> None:
    scheme = Affine(3, symmetric=False, scale_dtype=torch.float32)
    low, high = MSE(steps, smallest).range_of(x, scheme, (1, 1, 8))
    whole_low, whole_high = (end.to(torch.float64) for end in block_range(x, (1, 1, 8)))
    factors = torch.linspace(1, smallest, steps, dtype=torch.float64)
    lows, highs = whole_low.unsqueeze(-1) * factors, whole_high.unsqueeze(-1) * factors
    near_low = (low.to(torch.float64).unsqueeze(-1) - lows).abs() <= lows.abs() * 1e-6 + 1e-40
    near_high = (high.to(torch.float64).unsqueeze(-1) - highs).abs() <= highs.abs() * 1e-6 + 1e-40
    assert (near_low & near_high).any(-1).all()


def test_the_first_of_equals_wins_so_that_an_exact_range_is_kept() -> None:
    scheme = Affine(4, scale_dtype=torch.float32)
    x = torch.arange(-7.0, 8.0).reshape(1, 1, 15)  # every value lies on the min-max grid
    low, high = MSE().range_of(x, scheme, (1, 1, 15))
    assert (float(low), float(high)) == (-7.0, 7.0)


@attrs.frozen
class Blind(Affine):
    """A grid on which every range is as bad as any other."""

    def dequantize(self, q: QTensor) -> Tensor:
        return torch.zeros(q.shape)


def test_of_ranges_that_are_equally_bad_the_whole_one_is_kept() -> None:
    x = noise(*SHAPE)
    low, high = MSE().range_of(x, Blind(4), (1, 1, 8))
    assert torch.equal(low, x.amin(-1, keepdim=True))
    assert torch.equal(high, x.amax(-1, keepdim=True))


@pytest.mark.parametrize("granularity", [PerChannel(), PerGroup(32)], ids=repr)
def test_a_large_weight_is_searched_in_pieces_to_the_same_end(granularity: Granularity) -> None:
    scheme = Affine(4, symmetric=False, granularity=granularity, scale_dtype=torch.float32)
    x = noise(2, 1200, 128)  # more than what is searched at a time
    block = granularity.block_size((2, 1200, 128))
    search = MSE(steps=4)
    low, high = search.range_of(x, scheme, block)
    for row in (0, 511, 512, 1023, 1024, 1199):
        alone = search.range_of(x[:, row : row + 1], scheme, block)
        assert torch.equal(low[:, row : row + 1], alone[0])
        assert torch.equal(high[:, row : row + 1], alone[1])


@pytest.mark.parametrize("shape", [(1, 0, 8), (1, 4, 0)])
def test_empty_blocks_have_an_empty_range(shape: tuple[int, int, int]) -> None:
    block = PerChannel().block_size(shape)
    low, high = MSE().range_of(torch.zeros(shape), Affine(4), block)
    assert not low.any()
    assert not high.any()
    assert low.shape == high.shape == (*shape[:2], 1)


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_have_the_range_zero(symmetric: bool) -> None:
    low, high = MSE().range_of(torch.zeros(SHAPE), Affine(4, symmetric), (1, 1, 8))
    assert not low.any()
    assert not high.any()


def test_the_weight_is_not_changed() -> None:
    x = noise(*SHAPE)
    MSE().range_of(x, Affine(4), (1, 1, 8))
    assert torch.equal(x, noise(*SHAPE))


@pytest.mark.parametrize(
    "config",
    [{"steps": 1}, {"steps": 0}, {"smallest": 0.0}, {"smallest": 1.0}, {"smallest": -1.0}],
    ids=str,
)
def test_a_search_that_is_none_is_refused(config: Config) -> None:
    with pytest.raises(ConfigurationError):
        MSE.from_config({"kind": "mse", **config})


def test_searches_are_values_that_differ_in_every_field() -> None:
    base = MSE()
    assert len({base, MSE(), attrs.evolve(base, steps=9), attrs.evolve(base, smallest=0.5)}) == 3


def test_values_of_one_block_share_a_range() -> None:
    """The oracle itself: ranges spread over the values of their block."""
    low, high = MSE().range_of(noise(*SHAPE), Affine(4), (1, 1, 4))
    assert low.shape == high.shape == (2, 3, 2)
    assert (for_each(low, SHAPE) <= for_each(high, SHAPE)).all()
