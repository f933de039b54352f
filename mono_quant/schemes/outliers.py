"""A few columns in half precision beside a grid for the rest."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from mono_quant.base import (
    AnyStatistic,
    PackedTensor,
    RangeEstimator,
    Rounding,
    Scheme,
    Statistic,
    Statistics,
)
from mono_quant.configurable import Configurable, register
from mono_quant.errors import ConfigurationError, InputError
from mono_quant.numerics.extremes import all_finite
from mono_quant.numerics.granularity import Granularity, Shape
from mono_quant.numerics.values import QParams, QTensor
from mono_quant.schemes.affine import Affine

COLUMNS = "outlier_columns"
"""Name of the tensor that lists the columns: ``int64 [k]``, ascending."""

WEIGHTS = "outlier_weights"
"""Name of the tensor that holds them: ``float16 [G, out, k]``, or float32 where that is too small.
"""

_SHARE = 16


@register
@attrs.frozen
class ColumnPeaks(Statistic[Tensor]):
    """The largest magnitude of what each column of a weight meets, ``float32 [in]``."""

    kind: ClassVar[str] = "column_peaks"

    def observe(self, x: Tensor) -> Tensor:
        """Return those of rows of inputs ``[..., in]``."""
        return x.abs().to(torch.float32).reshape(-1, x.shape[-1]).amax(0)

    def merge(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the larger of both."""
        return torch.maximum(left, right)

    def check_state(self, state: Tensor, stack: Shape | None = None) -> None:
        """Refuse as many as the weight has no columns."""
        if stack is not None and len(state) != stack[2]:
            raise InputError(f"there are {len(state)} peaks of inputs for {stack[2]} columns")


def _check_times(_: object, __: object, times: float) -> None:
    if type(times) not in (int, float) or not 1 <= times < math.inf:
        raise ConfigurationError(f"an outlier is 1 or more times the median, not {times!r}")


def _check_count(_: object, __: object, count: int | None) -> None:
    if count is not None and (type(count) is not int or count < 1):
        raise ConfigurationError(f"outlier columns are 1 or more, not {count!r}")


@register
@attrs.frozen
class OutlierColumns(Configurable):
    """Which columns of a weight stand out.

    Those whose largest weight, or largest input where data reached the layer, is more than `times`
    that of the median column; of too many, those that stand out most. Columns of nothing but zeros
    are not counted.

    Attributes:
        times: how far a column must stand out.
        at_most: how many there may be; a sixteenth of all by default.
    """

    kind: ClassVar[str] = "outlier_columns"
    times: float = attrs.field(default=6.0, validator=_check_times)
    at_most: int | None = attrs.field(default=None, validator=_check_count)

    def limit(self, length: int) -> int:
        """Return how many there may be of `length`."""
        return min(length, -(-length // _SHARE) if self.at_most is None else self.at_most)

    def describe(self) -> str:
        """Return how many columns there may be."""
        most = f"1/{_SHARE} of all" if self.at_most is None else str(self.at_most)
        return f"outlier columns (at most {most})"

    def choose(self, standing: Tensor) -> Tensor:
        """Return the columns, ``int64 [k]`` ascending, by how far each stands out ``[in]``."""
        found = _most(standing, self.limit(len(standing)))
        return found[standing[found] > self.times]


def _check_scheme(_: object, __: object, scheme: object) -> None:
    if not isinstance(scheme, Scheme):
        raise ConfigurationError(f"Outliers takes a scheme for the other columns, not {scheme!r}")
    if scheme.code_bits is None or isinstance(scheme, Outliers):
        raise ConfigurationError(
            f"columns are kept beside a grid of few bits, such as Affine(8), not {scheme!r}"
        )


def _check_columns(instance: object, attribute: object, columns: "OutlierColumns | int") -> None:
    if not isinstance(columns, OutlierColumns | int):
        raise ConfigurationError(
            f"outlier columns are OutlierColumns() or a number, not {columns!r}"
        )
    if isinstance(columns, int):
        _check_count(instance, attribute, columns)


@register
@attrs.frozen
class Outliers(Scheme):
    """A few columns in float16, and all others on a grid whose ranges they do not stretch.

    The columns stay in the codes as zeros. Where the inputs of a matrix are quantized as they come
    (`activations("dynamic")`), those that meet these columns stay float, and the range of the rest
    is found without them. A weight without such columns is stored on the grid alone.

    Source: Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at
    Scale", https://arxiv.org/abs/2208.07339. There the columns are found anew for each input, by a
    magnitude of 6; here once, when the weight is quantized.

    Attributes:
        scheme: the grid of the others.
        columns: which are kept; a number means so many, those that stand out most.
    """

    kind: ClassVar[str] = "outliers"
    columns_apart: ClassVar[str | None] = COLUMNS
    scheme: Scheme = attrs.field(factory=Affine, validator=_check_scheme)
    columns: OutlierColumns | int = attrs.field(factory=OutlierColumns, validator=_check_columns)

    @property
    def granularity(self) -> Granularity:
        """That of the grid."""
        return self.scheme.granularity

    @property
    def code_bits(self) -> int | None:
        """The width of a code on the grid."""
        return self.scheme.code_bits

    @property
    def code_min(self) -> int:
        """The smallest code of the grid."""
        return self.scheme.code_min

    @property
    def uses(self) -> tuple[AnyStatistic, ...]:
        """The largest input of each column."""
        return (_PEAKS, *self.scheme.uses)

    def nbytes(self, shape: Shape) -> int:
        """Return the bytes of a packed stack of `shape` with as many columns as there may be."""
        matrices, rows, length = shape
        columns = self.columns
        count = min(length, columns) if isinstance(columns, int) else columns.limit(length)
        kept = count * (torch.int64.itemsize + matrices * rows * torch.float16.itemsize)
        return self.scheme.nbytes(shape) + kept

    def calculate_qparams(self, min_val: Tensor, max_val: Tensor, *, block_size: Shape) -> QParams:
        """Return the parameters of the grid, with no column kept."""
        return self.scheme.calculate_qparams(min_val, max_val, block_size=block_size)

    def choose_qparams(self, x: Tensor, observer: RangeEstimator) -> QParams:
        """Return the parameters for a stack, whose columns are chosen by its values alone.

        Raises:
            InputError: `x` holds NaN or infinity.
        """
        if not all_finite(x):
            raise InputError("the tensor holds NaN or infinity")
        kept = _kept(x, self._chosen(x, None))
        qparams = self.scheme.choose_qparams(_without(x, kept[COLUMNS]), observer)
        return replace(qparams, extra={**qparams.extra, **kept})

    def quantize(self, x: Tensor, qparams: QParams) -> QTensor:
        """Return the codes of all other columns, and zeros."""
        kept = qparams.extra.get(COLUMNS)
        rest = x if kept is None else _without(x, kept)
        return replace(self.scheme.quantize(rest, _of_grid(qparams)), qparams=qparams)

    def dequantize(self, q: QTensor) -> Tensor:
        """Return the values of the codes in float32, the columns in their places."""
        values = self.scheme.dequantize(replace(q, qparams=_of_grid(q.qparams)))
        kept = q.qparams.extra.get(COLUMNS)
        if kept is None:
            return values
        return values.index_copy(-1, kept, q.qparams.extra[WEIGHTS].to(values.dtype))

    def rounded(
        self, weight: Tensor, rounding: Rounding, observer: RangeEstimator, statistics: Statistics
    ) -> tuple[Scheme, QTensor]:
        """Return the weight with its columns kept, and the scheme with their number.

        The rounding sees a weight that has zeros there; what it makes of those, to make up for
        errors elsewhere, is added to the columns. Without any, grid and weight are plain.
        """
        peaks = statistics.state(_PEAKS) if _PEAKS in statistics else None
        columns = self._chosen(weight, peaks)
        if not len(columns):
            return self.scheme.rounded(weight, rounding, observer, statistics)
        rest = _without(weight, columns)
        scheme, q = self.scheme.rounded(rest, rounding, observer, statistics)
        zeros = scheme.fake_quantize(weight.new_zeros(1).expand_as(weight), q.qparams)
        moved = scheme.dequantize(q) - zeros  # by what makes up for other columns' errors
        moved[..., columns] += weight[..., columns]
        extra = {**q.qparams.extra, **_kept(moved, columns)}
        found = replace(q, qparams=replace(q.qparams, extra=extra))
        return Outliers(scheme, len(columns)), found

    def ranged(self, x: Tensor, qparams: QParams) -> tuple[Tensor, Scheme, QParams]:
        """Return zeros for the columns, and the grid with its parameters."""
        rest = _without(x, qparams.extra[COLUMNS])
        return self.scheme.ranged(rest, _of_grid(qparams))

    def extra_of_rows(self, extra: Mapping[str, Tensor], rows: Tensor) -> Mapping[str, Tensor]:
        """Return those rows of the columns too."""
        of_grid = self.scheme.extra_of_rows(_others(extra), rows)
        return {
            **of_grid,
            COLUMNS: extra[COLUMNS],
            WEIGHTS: extra[WEIGHTS].index_select(1, rows),
        }

    def refuse(self, shape: Shape) -> str | None:
        """Return why the grid refuses a stack of `shape`, or None."""
        return self.scheme.refuse(shape)

    def refuse_parts(self, parts: Mapping[str, Tensor], shape: Shape) -> str | None:
        """Return why the columns cannot be those of a stack of `shape`, or None."""
        columns, weights = parts.get(COLUMNS), parts.get(WEIGHTS)
        if columns is None or weights is None:
            return f"{COLUMNS} or {WEIGHTS} is missing"
        matrices, rows, length = shape
        if columns.dtype != torch.int64 or columns.dim() != 1:
            return f"{COLUMNS} are {tuple(columns.shape)} of {columns.dtype}"
        if weights.shape != (matrices, rows, len(columns)) or not weights.is_floating_point():
            return f"{WEIGHTS} are {tuple(weights.shape)} of {weights.dtype}"
        inside = bool(((columns >= 0) & (columns < length)).all())
        if not inside or not bool((columns.diff() > 0).all()):
            return f"{COLUMNS} are not ascending places in a row of {length}"
        return self.scheme.refuse_parts(_others(parts), shape)

    def describe(self) -> str:
        """Return the grid and how many columns are kept."""
        if not isinstance(self.columns, int):
            return f"{self.scheme.describe()}, {self.columns.describe()} in float16"
        some = "columns" if self.columns > 1 else "column"
        return f"{self.scheme.describe()}, {self.columns} outlier {some} in float16"

    def remark(self, q: QTensor) -> str | None:
        """Return that the columns had to be wider, and what the grid remarks."""
        weights = q.qparams.extra.get(WEIGHTS)
        wide = weights is not None and weights.dtype != torch.float16
        of_grid = self.scheme.remark(replace(q, qparams=_of_grid(q.qparams)))
        remarks = (of_grid, "outlier columns are float32: float16 cannot hold them" if wide else "")
        return "; ".join(filter(None, remarks)) or None

    def on_grid(self, weight: PackedTensor) -> PackedTensor:
        """Return what the codes of a weight stand for, without its outlier columns."""
        return replace(weight, tensors=_others(weight.tensors), scheme=self.scheme)

    def _chosen(self, weight: Tensor, peaks: Tensor | None) -> Tensor:
        largest = weight.abs().amax((0, 1)) if weight.numel() else weight.new_zeros(weight.shape[2])
        standing = _standing(largest)
        if peaks is not None:
            standing = torch.maximum(standing, _standing(peaks.to(standing.device)))
        if isinstance(self.columns, OutlierColumns):
            return self.columns.choose(standing)
        return _most(standing, self.columns)


_PEAKS = ColumnPeaks()


def _standing(peaks: Tensor) -> Tensor:
    """Return how many times the median column each is, those left out that are zero."""
    present = peaks[peaks > 0]
    return peaks / present.median() if len(present) else peaks


def _most(standing: Tensor, count: int) -> Tensor:
    """Return the places of the largest values, ascending."""
    found = standing.sort(descending=True, stable=True).indices
    return found[:count].sort().values


def _without(x: Tensor, columns: Tensor) -> Tensor:
    return x.index_fill(-1, columns, 0)


def _kept(weight: Tensor, columns: Tensor) -> Mapping[str, Tensor]:
    """Return columns of a stack as they are stored."""
    exact = weight.index_select(-1, columns)
    half = exact.to(torch.float16)
    room = torch.finfo(torch.float16).eps * exact.abs().max() if exact.numel() else exact.sum()
    fits = bool(((half.to(exact.dtype) - exact).abs() <= room).all())
    return {COLUMNS: columns, WEIGHTS: half if fits else exact.to(torch.float32)}


def _others(parts: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {name: part for name, part in parts.items() if name not in (COLUMNS, WEIGHTS)}


def _of_grid(qparams: QParams) -> QParams:
    return replace(qparams, extra=_others(qparams.extra))
