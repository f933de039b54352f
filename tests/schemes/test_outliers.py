"""A grid with a few columns beside it: torch's own operators on the rest, halves on the columns."""

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mono_quant import (
    Affine,
    ConfigurationError,
    FloatCast,
    Grid,
    InputError,
    MinMax,
    OutlierColumns,
    Outliers,
    PackedTensor,
    PerGroup,
    QTensor,
    Rounding,
    RoundToNearest,
    Scheme,
    Statistics,
)
from mono_quant.configurable import Json, register
from mono_quant.numerics.values import Layout
from mono_quant.schemes.outliers import COLUMNS, WEIGHTS, ColumnPeaks
from tests.helpers import noise, same_bits, torch_fake_quantize

ROWS, LENGTH = 24, 64
GRIDS: dict[str, Scheme] = {
    "8-bit": Affine(8),
    "8-bit asymmetric": Affine(8, symmetric=False),
    "4-bit in groups": Affine(4, symmetric=False, granularity=PerGroup(16)),
    "3-bit": Affine(3),
}


def weight(*loud: int, by: float = 50.0, groups: int = 1) -> Tensor:
    """Return noise in which some columns are larger than the rest."""
    stack = noise(groups, ROWS, LENGTH)
    stack[:, :, list(loud)] *= by
    return stack


def rounded(scheme: Scheme, stack: Tensor, peaks: Tensor | None = None) -> tuple[Scheme, QTensor]:
    """Return a stack rounded to nearest, with what calibration saw of its inputs."""
    statistics = Statistics({ColumnPeaks(): peaks} if peaks is not None else {})
    return scheme.rounded(stack, RoundToNearest(), MinMax(), statistics)


def columns_of(scheme: Scheme, stack: Tensor, peaks: Tensor | None = None) -> list[int]:
    """Return the columns that are kept."""
    kept = rounded(scheme, stack, peaks)[1].qparams.extra.get(COLUMNS)
    return kept.tolist() if kept is not None else []


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("groups", [1, 3])
def test_columns_are_halves_and_the_rest_is_what_torch_makes_of_it_alone(
    grid: Scheme, groups: int
) -> None:
    stack = weight(3, 40, groups=groups)
    scheme, q = rounded(Outliers(grid), stack)
    values = scheme.dequantize(q)
    assert same_bits(q.qparams.extra[COLUMNS], torch.tensor([3, 40]))
    assert same_bits(values[..., [3, 40]], stack[..., [3, 40]].half().float())
    rest = stack.clone()
    rest[..., [3, 40]] = 0
    assert isinstance(grid, Affine)
    qparams = grid.choose_qparams(rest, MinMax())
    expected = torch_fake_quantize(rest, grid, qparams)
    others = [place for place in range(LENGTH) if place not in (3, 40)]
    torch.testing.assert_close(values[..., others], expected[..., others], rtol=1e-6, atol=0)


def test_the_rest_is_no_worse_than_if_nothing_had_stood_out() -> None:
    stack = weight(3, 40, by=1000)
    quiet = weight()
    others = [place for place in range(LENGTH) if place not in (3, 40)]

    def error(scheme: Scheme, given: Tensor) -> float:
        own, q = rounded(scheme, given)
        return float((own.dequantize(q) - given)[..., others].square().sum())

    assert error(Outliers(Affine(8)), stack) <= error(Affine(8), quiet) * 1.05
    assert error(Affine(8), stack) > 1000 * error(Outliers(Affine(8)), stack)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("groups", [1, 3])
def test_bytes_are_those_of_the_tensors_and_were_foretold(grid: Scheme, groups: int) -> None:
    stack = weight(3, 40, groups=groups)
    shape = tuple(stack.shape)
    scheme, q = rounded(Outliers(grid), stack)
    packed = PackedTensor.pack(q, scheme, Layout(shape, shape, (0, 1, 2), shape), torch.float32)
    plain = rounded(grid, stack)
    without = PackedTensor.pack(plain[1], grid, packed.layout, torch.float32)
    assert packed.nbytes == without.nbytes + 2 * (8 + 2 * groups * ROWS)
    assert scheme.nbytes(shape) == packed.nbytes
    assert scheme.bits_per_weight(shape) == 8 * packed.nbytes / stack.numel()
    most = Outliers(grid).nbytes(shape)
    assert most == without.nbytes + 4 * (8 + 2 * groups * ROWS), "a sixteenth of 64 columns"
    assert Outliers(grid, 100).nbytes(shape) == grid.nbytes(shape) + 64 * (8 + 2 * groups * ROWS)


def test_a_weight_in_which_nothing_stands_out_is_stored_on_the_plain_grid() -> None:
    scheme, q = rounded(Outliers(Affine(8)), weight())
    plain = Affine(8).quantize(weight(), Affine(8).choose_qparams(weight(), MinMax()))
    assert scheme == Affine(8)
    assert not q.qparams.extra
    assert same_bits(q.codes, plain.codes)


# --- which columns -------------------------------------------------------------------------------


def test_inputs_choose_too_where_data_came_by() -> None:
    peaks = torch.ones(LENGTH)
    peaks[7] = 6.5
    peaks[9] = 5.5
    assert columns_of(Outliers(), weight(3), peaks) == [3, 7]
    assert columns_of(Outliers(), weight(3)) == [3]


def test_a_column_has_to_stand_out_by_more_than_was_asked() -> None:
    stack = torch.ones(1, ROWS, LENGTH)
    stack[..., 5], stack[..., 6] = -9, 8
    assert columns_of(Outliers(columns=OutlierColumns(8)), stack) == [5]
    assert columns_of(Outliers(columns=OutlierColumns(7.5)), stack) == [5, 6]


def test_of_too_many_those_are_kept_that_stand_out_most() -> None:
    stack = torch.ones(1, ROWS, LENGTH)
    stack[..., :10] = 10 + torch.arange(10.0)
    assert columns_of(Outliers(), stack) == [6, 7, 8, 9], "a sixteenth of 64"
    assert columns_of(Outliers(columns=OutlierColumns(at_most=2)), stack) == [8, 9]


def test_a_number_means_so_many() -> None:
    assert columns_of(Outliers(columns=3), weight(5, 6, 7, by=1.0 + 1e-4)) != []
    assert len(columns_of(Outliers(columns=3), weight())) == 3
    assert columns_of(Outliers(columns=2), weight(63, 0)) == [0, 63]
    assert columns_of(Outliers(columns=1000), weight()) == list(range(LENGTH))


def test_inputs_that_are_never_there_do_not_make_others_stand_out() -> None:
    peaks = torch.zeros(LENGTH)
    peaks[:8] = 1.0
    assert columns_of(Outliers(), weight(), peaks) == []
    assert columns_of(Outliers(), torch.zeros(1, ROWS, LENGTH), torch.zeros(LENGTH)) == []


@given(st.integers(1, 4), st.integers(1, 5))
def test_peaks_are_those_of_all_rows_however_they_came(parts: int, count: int) -> None:
    x, fold = noise(parts * count, LENGTH), ColumnPeaks()
    states = [fold.observe(one) for one in x.chunk(parts)]
    merged = states[0]
    for state in states[1:]:
        merged = fold.merge(merged, state)
    assert same_bits(merged, x.abs().amax(0))


# --- roundings, values, files --------------------------------------------------------------------


@register
@attrs.frozen
class Watching(Rounding):
    """Rounds to nearest, and looks at what it is given."""

    kind = "tests.watching"

    def round(self, weight: Tensor, grid: Grid, statistics: Statistics) -> QTensor:
        assert grid.scheme == Affine(8), "a rounding need not know of outliers"
        assert not weight[..., 3].any()
        return grid.scheme.quantize(weight, grid.qparams(weight))


def test_a_rounding_sees_the_grid_and_a_weight_without_the_columns() -> None:
    scheme, q = Outliers().rounded(weight(3), Watching(), MinMax(), Statistics())
    expected, same = rounded(Outliers(), weight(3))
    assert scheme == expected
    assert same_bits(scheme.dequantize(q), expected.dequantize(same))


@register
@attrs.frozen
class MakingUp(Rounding):
    """Rounds a weight to whose columns something was added, as one does that makes up for errors.

    Attributes:
        by: what it adds.
    """

    kind = "tests.making_up"
    by: float = 0.5

    def round(self, weight: Tensor, grid: Grid, statistics: Statistics) -> QTensor:
        return grid.scheme.quantize(weight + self.by, grid.qparams(weight))


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_what_a_rounding_adds_to_make_up_for_errors_is_added_to_the_columns(grid: Scheme) -> None:
    stack = weight(3, by=10)
    scheme, q = Outliers(grid).rounded(stack, MakingUp(), MinMax(), Statistics())
    others, alone = grid.rounded(_zeroed(stack), MakingUp(), MinMax(), Statistics())
    added = others.dequantize(alone)[..., 3]
    assert 0.2 < added.mean() < 0.8
    found = scheme.dequantize(q)[..., 3]
    torch.testing.assert_close(found, stack[..., 3] + added, rtol=1e-3, atol=1e-2)


def _zeroed(stack: Tensor) -> Tensor:
    rest = stack.clone()
    rest[..., 3] = 0
    return rest


def test_a_grid_by_itself_chooses_by_the_weight() -> None:
    stack, grid = weight(3), Grid(Outliers(), MinMax())
    q = RoundToNearest().round(stack, grid, Statistics())
    expected, same = rounded(Outliers(), stack)
    assert same_bits(grid.scheme.dequantize(q), expected.dequantize(same))
    assert same_bits(
        grid.scheme.fake_quantize(stack, grid.qparams(stack)), expected.dequantize(same)
    )


@pytest.mark.parametrize("size", [1e-7, 1e6])
def test_columns_that_halves_cannot_hold_are_wider_and_it_is_said(size: float) -> None:
    stack = weight(3) * size
    scheme, q = rounded(Outliers(), stack)
    assert same_bits(q.qparams.extra[WEIGHTS], stack[..., [3]])
    remark = scheme.remark(q)
    assert remark is not None
    assert "outlier columns are float32" in remark
    assert scheme.remark(rounded(Outliers(), weight(3))[1]) is None


@pytest.mark.parametrize("groups", [1, 3])
def test_no_tensors_but_those_of_the_stack_pass(groups: int) -> None:
    scheme, q = rounded(Outliers(), weight(3, 40, groups=groups))
    shape, extra = (groups, ROWS, LENGTH), dict(q.qparams.extra)
    assert scheme.refuse_parts(extra, shape) is None
    wrong: dict[str, Tensor] = {
        "beyond": torch.tensor([3, LENGTH]),
        "negative": torch.tensor([-1, 3]),
        "twice": torch.tensor([3, 3]),
        "disordered": torch.tensor([40, 3]),
        "int32": torch.tensor([3, 40], dtype=torch.int32),
        "one too few": torch.tensor([3]),
        "a matrix": torch.tensor([[3, 40]]),
    }
    for what, columns in wrong.items():
        assert scheme.refuse_parts({**extra, COLUMNS: columns}, shape), what
    assert scheme.refuse_parts({**extra, WEIGHTS: extra[WEIGHTS].to(torch.int64)}, shape)
    assert scheme.refuse_parts({COLUMNS: extra[COLUMNS]}, shape)
    assert scheme.refuse_parts({}, shape)


CONFIGS: dict[str, Scheme] = {
    "as it is": Outliers(),
    "so many": Outliers(Affine(4), 3),
    "a rule": Outliers(GRIDS["4-bit in groups"], OutlierColumns(times=3, at_most=2)),
}


@pytest.mark.parametrize("scheme", CONFIGS.values(), ids=CONFIGS)
def test_the_configuration_comes_back(scheme: Scheme) -> None:
    config: Json = scheme.to_config()
    assert isinstance(config, dict)
    assert Scheme.from_config(config) == scheme
    assert hash(Scheme.from_config(config)) == hash(scheme)


def test_words_say_how_many_columns() -> None:
    assert Outliers().describe() == (
        "8-bit symmetric per-channel, outlier columns (at most 1/16 of all) in float16"
    )
    assert Outliers(columns=OutlierColumns(at_most=4)).describe().endswith("(at most 4) in float16")
    assert rounded(Outliers(), weight(3))[0].describe().endswith("1 outlier column in float16")
    assert rounded(Outliers(), weight(3, 4))[0].describe().endswith("2 outlier columns in float16")


@pytest.mark.parametrize("bad", [FloatCast(), Outliers()], ids=["a cast", "outliers"])
def test_what_is_no_grid_of_few_bits_is_refused(bad: Scheme) -> None:
    with pytest.raises(ConfigurationError, match="beside a grid"):
        Outliers(bad)


@pytest.mark.parametrize("count", [0, -1, True])
def test_what_is_no_number_of_columns_is_refused(count: int) -> None:
    with pytest.raises(ConfigurationError, match="1 or more"):
        Outliers(columns=count)
    with pytest.raises(ConfigurationError, match="1 or more"):
        OutlierColumns(at_most=count)


@pytest.mark.parametrize("times", [0.0, float("nan"), float("inf")])
def test_what_no_column_can_stand_out_by_is_refused(times: float) -> None:
    with pytest.raises(ConfigurationError, match="times the median"):
        OutlierColumns(times)


def test_what_the_grid_refuses_is_refused() -> None:
    scheme = Outliers(Affine(4, granularity=PerGroup(48)))
    assert scheme.refuse((1, ROWS, LENGTH)) == scheme.scheme.refuse((1, ROWS, LENGTH)) is not None
    with pytest.raises(InputError, match="not finite"):
        Outliers().calculate_qparams(
            torch.tensor([0.0]), torch.tensor([torch.inf]), block_size=(1,)
        )
