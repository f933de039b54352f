"""GPTQ beside the textbook's form of it, in float64, and what it promises."""

from typing import ClassVar

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mono_quant import (
    GPTQ,
    MSE,
    Affine,
    CalibrationError,
    FittedCodebook,
    FloatCast,
    Granularity,
    Grid,
    Hessian,
    HessianState,
    InputError,
    LearnedRounding,
    Microscaling,
    MinMax,
    PerChannel,
    PerGroup,
    PerTensor,
    QParams,
    QTensor,
    Quantizer,
    Rounding,
    RoundToNearest,
    Scheme,
    Statistics,
)
from mono_quant.rounding.scales import fit_scales
from tests.helpers import noise, same_tensors

GRIDS = [
    Affine(4, symmetric=False, granularity=PerGroup(16)),
    Affine(3, granularity=PerGroup(8)),
    Affine(4, granularity=PerChannel()),
    Affine(2, symmetric=False, granularity=PerTensor()),
    FloatCast(torch.bfloat16),
    FittedCodebook(3, PerGroup(16), torch.float8_e4m3fn),
    Microscaling.mxfp4(),
]


def inputs(groups: int, length: int, count: int = 300, seed: int = 0) -> Tensor:
    """Return correlated rows whose columns differ in size, ``[G, n, in]``."""
    mix = noise(groups, length, length, seed=seed + 1)
    sizes = noise(groups, 1, length, seed=seed + 2).exp()
    return (noise(groups, count, length, seed=seed) @ mix) * sizes


def state_of(x: Tensor) -> HessianState:
    return Hessian().observe(x)


def gathered(x: Tensor) -> Statistics:
    return Statistics({Hessian(): state_of(x)})


def missed(weight: Tensor, rounded: Tensor, x: Tensor) -> Tensor:
    """Return the squared error of each row's product with the inputs, float64 ``[G, out]``."""
    products = x.double() @ (rounded.double() - weight.double()).mT
    return products.square().sum(1)


def textbook(weight: Tensor, scheme: Scheme, x: Tensor, damping: float, ordered: bool) -> Tensor:
    """Return one matrix rounded column by column, the inverse of H computed anew for each.

    What is left after column k takes over its error by ``H_F^-1[k] / H_F^-1[k, k]`` of the columns
    F that are left: equation 2 of arXiv 2210.17323, before any of its algebra.
    """
    exact, moments = weight.double().clone(), x.double().mT @ x.double() / x.shape[0]
    moments += torch.eye(len(moments)) * moments.diagonal().mean() * damping
    qparams = scheme.choose_qparams(weight[None], MinMax())
    order = (
        moments.diagonal().argsort(descending=True, stable=True) if ordered else range(len(moments))
    )
    todo = [int(place) for place in order]
    while todo:
        column, inverse = todo[0], torch.linalg.inv(moments[todo][:, todo])
        rounded = scheme.fake_quantize(exact[None].float(), qparams)[0, :, column].double()
        error = (exact[:, column] - rounded) / inverse[0, 0]
        exact[:, todo] -= error[:, None] * inverse[0]
        exact[:, column] = rounded
        todo.pop(0)
    return exact.float()


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("scheme", GRIDS, ids=repr)
def test_it_is_the_textbooks(scheme: Scheme, ordered: bool) -> None:
    weight, x = noise(12, 32, seed=5), inputs(1, 32)
    rounding = GPTQ(damping=0.02, activation_order=ordered, block=8)
    found = scheme.dequantize(rounding.round(weight[None], Grid(scheme, MinMax()), gathered(x)))[0]
    expected = textbook(weight, scheme, x[0], 0.02, ordered)
    better = missed(weight[None], expected[None], x) <= missed(
        weight[None],
        scheme.fake_quantize(weight[None], scheme.choose_qparams(weight[None], MinMax())),
        x,
    )
    same = (found == expected).all(1) | ~better[0]  # where it is worse, it is not used
    assert same.double().mean() > 0.9  # a tie that float32 breaks otherwise changes a row
    assert bool(better.any())


@attrs.frozen
class Even(Affine):
    """A grid of every other code: its own way to quantize is what counts."""

    kind: ClassVar[str] = "tests.even"

    def quantize(self, x: Tensor, qparams: QParams) -> QTensor:
        q = super().quantize(x, qparams)
        return QTensor(torch.div(q.codes, 2, rounding_mode="floor") * 2, qparams, q.dtype)


@pytest.mark.parametrize("refinements", [0, 1])
def test_a_grid_that_inherits_a_shorter_way_is_still_asked_itself(refinements: int) -> None:
    weight, x = noise(1, 12, 32), inputs(1, 32)
    found = GPTQ(refinements=refinements).round(weight, Grid(Even(6), MinMax()), gathered(x))
    assert not (found.codes % 2).any()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(GRIDS), st.integers(0, 2), st.booleans())
def test_no_row_is_worse_than_rounded_to_nearest(
    seed: int, scheme: Scheme, refinements: int, ordered: bool
) -> None:
    weight, x = noise(2, 6, 32, seed=seed), inputs(2, 32, 80, seed)
    grid, statistics = Grid(scheme, MSE(steps=4)), gathered(x)
    plain = scheme.dequantize(RoundToNearest().round(weight, grid, statistics))
    rounding = GPTQ(activation_order=ordered, refinements=refinements)
    found = scheme.dequantize(rounding.round(weight, grid, statistics))
    assert (missed(weight, found, x) <= missed(weight, plain, x) * (1 + 1e-4)).all()


@pytest.mark.parametrize("scheme", GRIDS, ids=repr)
def test_it_leaves_much_less_error_and_refining_less_again(scheme: Scheme) -> None:
    weight, x = noise(1, 48, 64), inputs(1, 64, 500)
    grid, statistics = Grid(scheme, MinMax()), gathered(x)
    errors = [
        missed(weight, scheme.dequantize(rounding.round(weight, grid, statistics)), x).sum()
        for rounding in (RoundToNearest(), GPTQ(), GPTQ(refinements=1), GPTQ(refinements=3))
    ]
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < errors[1]
    assert errors[3] <= errors[2]


def test_refined_scales_are_those_of_least_squares() -> None:
    scheme = Affine(4, symmetric=False, granularity=PerGroup(16), scale_dtype=torch.float32)
    weight, x = noise(1, 5, 48), inputs(1, 48, 400)
    q = RoundToNearest().round(weight, Grid(scheme, MinMax()), Statistics())
    moments = state_of(x).mean
    found = fit_scales(weight @ moments, scheme, q, moments)
    assert found is not None
    assert found.qparams.scale is not None
    assert q.qparams.zero_point is not None
    levels = (q.codes.double() - q.qparams.zero_point.double().repeat_interleave(16, 2))[0]
    for row in range(5):
        parts = levels[row].reshape(3, 16)
        columns = torch.stack(
            [x[0, :, 16 * k : 16 * k + 16].double() @ parts[k] for k in range(3)], 1
        )
        wanted = x[0].double() @ weight[0, row].double()
        best = torch.linalg.lstsq(columns, wanted[:, None]).solution[:, 0]
        torch.testing.assert_close(found.qparams.scale[0, row].double(), best, rtol=3e-3, atol=0)


@pytest.mark.parametrize("block", [1, 7, 32, 1000])
def test_the_number_of_columns_at_once_changes_nothing(block: int) -> None:
    weight, x = noise(1, 8, 32), inputs(1, 32)
    grid = Grid(GRIDS[0], MinMax())
    expected = GPTQ(block=16, refinements=1).round(weight, grid, gathered(x))
    found = GPTQ(block=block, refinements=1).round(weight, grid, gathered(x))
    assert (found.codes == expected.codes).double().mean() > 0.98  # sums in another order


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("granularity", [PerChannel(), PerGroup(16)], ids=repr)
def test_few_rows_of_few_groups_are_refined_too(rows: int, granularity: Granularity) -> None:
    weight, x, scheme = noise(1, rows, 32), inputs(1, 32), Affine(3, granularity=granularity)
    grid, statistics = Grid(scheme, MinMax()), gathered(x)
    errors = [
        missed(weight, scheme.dequantize(rounding.round(weight, grid, statistics)), x).sum()
        for rounding in (GPTQ(), GPTQ(refinements=2))
    ]
    assert errors[1] < errors[0]


def test_each_matrix_of_a_stack_has_its_own_inputs() -> None:
    weight, x, grid = noise(3, 4, 16), inputs(3, 16), Grid(GRIDS[0], MinMax())
    rounding = GPTQ(refinements=1)
    together = grid.scheme.dequantize(rounding.round(weight, grid, gathered(x)))
    for place in range(3):
        alone = rounding.round(weight[[place]], grid, gathered(x[[place]]))
        assert torch.equal(together[[place]], grid.scheme.dequantize(alone))


def test_inputs_that_are_always_zero_are_rounded_to_nearest_and_move_nothing() -> None:
    weight, x, grid = noise(1, 6, 32), inputs(1, 32), Grid(GRIDS[0], MinMax())
    x[:, :, [3, 20]] = 0
    found = grid.scheme.dequantize(GPTQ().round(weight, grid, gathered(x)))
    plain = grid.scheme.dequantize(RoundToNearest().round(weight, grid, Statistics()))
    assert torch.equal(found[:, :, [3, 20]], plain[:, :, [3, 20]])
    assert not torch.equal(found, plain)


def test_inputs_that_are_all_zero_leave_rounding_to_nearest() -> None:
    weight, grid = noise(1, 6, 32), Grid(GRIDS[0], MinMax())
    found = GPTQ(refinements=1).round(weight, grid, gathered(torch.zeros(1, 20, 32)))
    assert torch.equal(found.codes, RoundToNearest().round(weight, grid, Statistics()).codes)


@pytest.mark.parametrize("count", [1, 5])
def test_fewer_inputs_than_columns_are_no_matter(count: int) -> None:
    weight, x, grid = noise(1, 6, 64), inputs(1, 64, count), Grid(GRIDS[0], MinMax())
    found = grid.scheme.dequantize(GPTQ().round(weight, grid, gathered(x)))
    plain = grid.scheme.dequantize(RoundToNearest().round(weight, grid, Statistics()))
    assert missed(weight, found, x).sum() < missed(weight, plain, x).sum()


def test_moments_that_are_not_finite_are_refused() -> None:
    state = HessianState(torch.full((1, 32, 32), torch.inf), 10)
    with pytest.raises(InputError, match="second moments of its inputs are not finite"):
        GPTQ().round(noise(1, 6, 32), Grid(GRIDS[0], MinMax()), Statistics({Hessian(): state}))


def test_inputs_whose_squares_overflow_are_refused_with_what_mends_it() -> None:
    settings = Quantizer().bits(4).only("*").rounding(GPTQ()).fit(noise(8, 32) * 1e30)
    message = r"weight cannot be quantized: .* not finite.*override\('\*', rounding=RoundToN"
    with pytest.raises(InputError, match=message):
        settings.apply(nn.Linear(32, 8))


def test_moments_of_other_inputs_are_refused() -> None:
    with pytest.raises(InputError, match=r"second moments \(1, 16, 16\), where \(1, 32, 32\)"):
        GPTQ().round(noise(1, 6, 32), Grid(GRIDS[0], MinMax()), gathered(inputs(1, 16)))


@pytest.mark.parametrize("granularity", [PerGroup(16), PerChannel(), PerTensor()], ids=repr)
def test_an_empty_weight_stays_empty(granularity: Granularity) -> None:
    scheme = Affine(4, granularity=granularity)
    q = GPTQ().round(torch.zeros(1, 0, 32), Grid(scheme, MinMax()), gathered(inputs(1, 32)))
    assert q.codes.shape == (1, 0, 32)


def test_the_hessian_is_the_sum_of_outer_products() -> None:
    x, statistic = inputs(2, 8, 50), Hessian()
    state = statistic.merge(statistic.observe(x[:, :20]), statistic.observe(x[:, 20:]))
    expected = torch.einsum("gni,gnj->gij", x.double(), x.double())
    torch.testing.assert_close(state.gram.double(), expected, rtol=1e-4, atol=1e-2)
    assert state.count == 50


def test_every_kind_of_layer_is_rounded_by_it() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, groups=1)
            self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
            self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
            self.lstm = nn.LSTM(4, 16, batch_first=True)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.head = nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            maps = self.up(self.depthwise(self.conv(x).relu()).relu())
            steps, _ = self.lstm(maps.flatten(2).mT)
            mixed, _ = self.attention(steps, steps, steps)
            out: Tensor = self.head(mixed)
            return out

    torch.manual_seed(0)
    source, data = Net().eval(), [noise(4, 3, 9, 9, seed=place) for place in range(3)]
    quantizer = Quantizer().bits(3).only("*").granularity("channel").activations(None).fit(data)
    plain = quantizer.apply(source).report
    found = quantizer.rounding(GPTQ(refinements=1)).apply(source).report
    assert not [row for row in found.layers if row.name.endswith("weight") and row.scheme is None]
    assert found.output_sqnr_db is not None
    assert plain.output_sqnr_db is not None
    assert found.output_sqnr_db > plain.output_sqnr_db + 1


def test_it_is_deterministic_and_comes_back_from_its_configuration() -> None:
    data = [noise(8, 64, seed=place) for place in range(4)]
    source = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    quantizer = Quantizer().bits(4).rounding(GPTQ(damping=0.05, refinements=2)).fit(data)
    again = Quantizer.from_config(quantizer.to_config()).fit(data)
    assert same_tensors(quantizer.apply(source).model, again.apply(source).model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rounding", [GPTQ(), LearnedRounding(steps=2)], ids=["gptq", "learned"])
def test_rows_that_are_looked_up_are_rounded_to_nearest_and_the_plan_says_so(
    rounding: Rounding, tied: bool
) -> None:
    torch.manual_seed(0)
    source = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 32), nn.Linear(32, 50, bias=False))
    if tied:
        source[2].weight = source[0].weight
    data = [torch.randint(0, 50, (8, 6)) for _ in range(3)]
    quantizer = Quantizer().bits(4).only("*").fit(data)
    plan = quantizer.rounding(rounding).plan(source.eval())
    name = type(rounding).__name__
    told = f"rows of 0.weight are looked up and meet no inputs for {name}: rounded to nearest"
    assert told in plan.explain()
    result, nearest = plan.run(progress=False), quantizer.apply(source)
    assert result.validate()
    embeddings = [one.model.get_submodule("0") for one in (result, nearest)]
    assert same_tensors(embeddings[0], embeddings[1])
    assert not same_tensors(result.model.get_submodule("1"), nearest.model.get_submodule("1"))


def test_without_data_the_plan_refuses_it() -> None:
    with pytest.raises(CalibrationError, match=r"rounding of 0 needs data; give some with fit"):
        Quantizer().bits(4).rounding(GPTQ()).plan(nn.Sequential(nn.Linear(64, 64)))
