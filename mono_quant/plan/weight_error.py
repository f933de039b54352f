"""What rounding did to a weight, value by value and column by column."""

import attrs
import torch
from torch import Tensor

from mono_quant.base import Scheme
from mono_quant.numerics.blocks import row_parts
from mono_quant.numerics.metrics import SquaredError
from mono_quant.numerics.values import QTensor

_ENOUGH_ROWS = 16
"""Fewer rows say nothing of what a column's inputs are like."""

_FAINT = 1e-8
"""Columns fainter than this share of the mean energy count as if they had it."""

_LOOKED_AT = 1 << 14
"""Values that are sorted by size, about, of evenly spread rows: a median takes long."""

_LEAST_ROWS = 64
"""Rows that are looked at however long they are; of such rows evenly spread values."""

_USUAL = (1e-24, 1e24)
"""Mean squares between which values that are a millionth of the usual have float32 squares."""


@attrs.frozen(eq=False)
class WeightError:
    """The error of a quantized stack ``[G, out, in]``.

    Attributes:
        signal: sum of the squared values of each column, ``float64 [G, in]``.
        noise: sum of the squared errors of each column.
        by_row: sum of the squared values of each row, ``float64 [G, out]``.
        faint: sum of the squared errors of the smaller half of each row's values, as a share of
            their squares, 0 to 1, of evenly spread rows and values, ``[G, n]``.
        apart: columns that share no scale with others, ``int64 [k]``; None if there are none.
    """

    signal: Tensor
    noise: Tensor
    by_row: Tensor
    faint: Tensor
    apart: Tensor | None = None

    @classmethod
    def of(
        cls, stack: Tensor, q: QTensor, scheme: Scheme, apart: Tensor | None = None
    ) -> "WeightError":
        """Return the error of `q` against `stack`, some rows at a time.

        Where rows have scales of their own, the dequantized weight never exists as a whole. Squared
        in float32 where squares of usual values are far from the ends of its range, which takes a
        third of the time, else in float64; added up in float64 beyond some rows.
        """
        found = cls._squared(stack, q, scheme, apart, torch.float32)
        mean = float(found.by_row.sum()) / max(1, stack.numel())
        if not _USUAL[0] < mean < _USUAL[1]:  # as of zeros, and of NaN
            found = cls._squared(stack, q, scheme, apart, torch.float64)
        return found

    @classmethod
    def _squared(
        cls, stack: Tensor, q: QTensor, scheme: Scheme, apart: Tensor | None, dtype: torch.dtype
    ) -> "WeightError":
        matrices, rows, length = stack.shape
        whole = None if q.qparams.by_rows else scheme.dequantize(q)
        signal = torch.zeros(matrices, length, dtype=torch.float64, device=stack.device)
        noise = signal.clone()
        by_row = torch.zeros(matrices, rows, dtype=torch.float64, device=stack.device)
        looked_at: list[Tensor] = []
        down, across = _steps(matrices, rows, length)
        room: Tensor | None = None
        for part in row_parts((matrices, rows, length)):
            exact = stack[:, part].to(dtype)
            values = scheme.dequantize(q.rows(part)) if whole is None else whole[:, part]
            if room is None or room.shape[1:] != exact.shape:
                room = torch.empty(2, *exact.shape, dtype=dtype, device=stack.device)
            squares = torch.square(exact, out=room[0])
            errors = torch.sub(exact, values, out=room[1]).square_()
            signal += squares.sum(1)
            noise += errors.sum(1)
            by_row[:, part] = squares.sum(2)
            looked_at.append(room[:, :, -part.start % down :: down, ::across].clone())
        faint = _lost_of_faint(*torch.cat(looked_at, 2)) if looked_at else by_row
        return cls(signal, noise, by_row, faint, apart)

    @property
    def rows(self) -> int:
        """How many rows each matrix has."""
        return self.by_row.shape[1]

    @property
    def total(self) -> SquaredError:
        """The error over all values."""
        count = self.signal.numel() * self.rows
        return SquaredError(float(self.signal.sum()), float(self.noise.sum()), count)

    @property
    def balanced_db(self) -> float | None:
        """SQNR of the product for inputs drawn so that every column counts alike, in dB.

        A trained matrix has large weights where its inputs are small. A few such columns can hide
        from `total` that all others were rounded away. Inputs are taken to be independent, of the
        energy ``1 / mean(column ** 2)``. None for a stack that is no single matrix or has too few
        rows to tell.
        """
        if self.signal.shape[0] != 1 or self.rows < _ENOUGH_ROWS or not bool(self.signal.any()):
            return None
        energy = self.signal / self.rows
        inputs = 1 / energy.clamp(min=_FAINT * float(energy.mean()))
        weighted = SquaredError(
            float((self.signal * inputs).sum()), float((self.noise * inputs).sum()), 1
        )
        return weighted.sqnr_db

    @property
    def faint_db(self) -> float | None:
        """SQNR of the product for inputs that meet the smaller half of each row alone, in dB.

        That half is all that counts where inputs are loud for small weights and faint for large
        ones, which do not stand out as columns if each row has its own. Rows are taken to count
        alike, so that a few loud ones do not hide the others. None as above.
        """
        if self.signal.shape[0] != 1 or self.rows < _ENOUGH_ROWS or not self.faint.numel():
            return None
        return SquaredError(1, float(self.faint.mean()), 1).sqnr_db

    @property
    def estimated_db(self) -> float:
        """What is expected of the SQNR of a product, in dB: `balanced_db`, or of inputs all alike.

        For such inputs it is that of the values, `total`.
        """
        balanced = self.balanced_db
        return self.total.sqnr_db if balanced is None else balanced

    @property
    def outliers(self) -> float | None:
        """Root mean square of the largest column over that of the median one; None as above.

        Columns that are kept apart are not counted.
        """
        if self.signal.shape[0] != 1 or self.rows < _ENOUGH_ROWS:
            return None
        if self.apart is None:
            return _over_median(self.signal)
        return _over_median(self.signal.index_fill(-1, self.apart, 0))

    @property
    def row_outliers(self) -> float | None:
        """Root mean square of the largest row over that of the median one; None for few rows."""
        return _over_median(self.by_row) if self.by_row.numel() >= _ENOUGH_ROWS else None


def _steps(matrices: int, rows: int, length: int) -> tuple[int, int]:
    """Return which rows are looked at closely, and which of their values: one of so many.

    Odd numbers, which do not fall into step with heads of 64 rows or groups of 64 values.
    """
    whole = max(1, matrices * length)
    down = rows // max(_LEAST_ROWS, _LOOKED_AT // whole) | 1
    return down, -(-rows // down) * whole // _LOOKED_AT | 1


def _lost_of_faint(squares: Tensor, errors: Tensor) -> Tensor:
    """Return the share of the squares of the smaller half of each row that errors are, 0 to 1.

    Zeros, which a pruned row is full of, do not count.

    Args:
        squares: of the values, ``[G, n, in]``.
        errors: squared, of the same shape.
    """
    if not squares.shape[-1]:
        return squares.new_zeros(squares.shape[:-1])
    median = squares.masked_fill(squares == 0, torch.nan).nanmedian(-1, keepdim=True).values
    half = squares <= median
    lost = (errors * half).sum(-1) / (squares * half).sum(-1)
    return lost.nan_to_num(0).clamp(max=1)


def _over_median(energies: Tensor) -> float | None:
    median = float(energies.median()) if energies.numel() else 0.0
    return float(energies.max() / median) ** 0.5 if median > 0 else None
