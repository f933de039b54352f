"""Half-quadratic quantization: zero points that leave less error, found without data."""

from dataclasses import replace
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from mono_quant.base import Grid, Rounding, Scheme, Statistics
from mono_quant.configurable import register
from mono_quant.errors import ConfigurationError, Mend
from mono_quant.numerics.blocks import block_rows, row_parts
from mono_quant.numerics.values import QParams, QTensor


@register
@attrs.frozen
class HQQ(Rounding):
    """The nearest grid point, of a grid whose zero points were moved to where errors are small.

    With ``r`` the errors of a block's values, it minimizes the sum of ``|r| ** p``, in which
    outliers count for little, by half-quadratic splitting: each step takes errors ``e`` for granted
    (shrinkage, ``sign(r) * max(0, |r| - |r| ** (p - 1) / beta)``) and moves the zero point to where
    the rest, ``r - e``, is zero on average, in closed form. Scales stay what the range made them.

    Each block stops on its own when a step no longer lowers its mean absolute error, by which the
    authors' code stops a whole tensor, and keeps the zero point before that step: its mean absolute
    error is never above that of `RoundToNearest`, whose zero point it starts from.

    It moves zero points by fractions of a step, so it is made for float zero points. Zero points
    that are codes hardly ever move, and the result is that of `RoundToNearest`.

    Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023,
    https://mobiusml.github.io/hqq_blog; defaults as there.

    Attributes:
        iterations: the most steps.
        p: the exponent, above 0 and at most 1.
        beta: how soon an error is an outlier, in units of the weights: where
            ``|r| ** (2 - p) > 1 / beta``.
        kappa: what beta is multiplied by after each step.
        zero_on_grid: start from zero points that are whole numbers, by which zero is a grid point,
            as torchao's does; then the promise above is to `RoundToNearest` with those. The weights
            are a little worse and outputs were better at 3 and 4 bits (see "Choose bits and
            method"), not at 2.
    """

    kind: ClassVar[str] = "hqq"
    iterations: int = 20
    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    zero_on_grid: bool = False

    def __attrs_post_init__(self) -> None:
        """Refuse what minimizes nothing."""
        if self.iterations < 1:
            raise ConfigurationError(f"HQQ takes 1 step or more, not {self.iterations}")
        if not 0 < self.p <= 1:
            raise ConfigurationError(f"p lies above 0 and is at most 1, not {self.p}")
        if self.beta <= 0 or self.kappa < 1:
            raise ConfigurationError(
                f"beta is above 0 and kappa at least 1, not {self.beta} and {self.kappa}"
            )

    def refuse(self, scheme: Scheme) -> str | None:
        """Return that there are no zero points to move, or None."""
        if scheme.has_zero_point:
            return None
        return (
            f"HQQ moves zero points, and {scheme.describe()} has none: say asymmetric() or "
            "float_zero_point()"
        )

    def round(self, weight: Tensor, grid: Grid, statistics: Statistics) -> QTensor:
        """Return `weight`, a float32 stack ``[G, out, in]``, on the grid with moved zero points.

        Some rows at a time, where no two share a scale.

        Raises:
            ConfigurationError: the scheme has no zero points.
        """
        scheme, qparams = grid.scheme, grid.qparams(weight)
        if reason := self.refuse(scheme):
            raise ConfigurationError(reason, Mend.GRID, layer="...")
        if self.zero_on_grid:
            qparams = _whole(scheme, qparams)
        if not weight.numel():
            return scheme.quantize_stack(weight, qparams)
        if qparams.by_rows:
            parts = row_parts(tuple(weight.shape))
            found = [self._moved(weight[:, part], scheme, qparams.rows(part)) for part in parts]
            zero_point = torch.cat(found, 1)
        else:
            zero_point = self._moved(weight, scheme, qparams)
        moved = QParams(qparams.scale, zero_point, qparams.block_size, qparams.extra)
        return scheme.quantize_stack(weight, moved)

    def _moved(self, x: Tensor, scheme: Scheme, qparams: QParams) -> Tensor:
        """Return the best zero point of each block of `x`, shaped like the scales."""
        assert qparams.scale is not None  # `refuse` asked whether values are made of both
        assert qparams.zero_point is not None
        x = block_rows(x, qparams.block_size)  # [blocks, values]
        block = (1, x.shape[1])
        scale, zero = qparams.scale.reshape(-1, 1), qparams.zero_point.reshape(-1, 1)
        best, least = zero.clone(), torch.full((len(x),), torch.inf, device=x.device)
        left = torch.arange(len(x), device=x.device)  # blocks that still gain
        beta = self.beta
        for _ in range(self.iterations + 1):  # the first one only measures
            on_grid = scheme.fake_quantize(x, QParams(scale, zero, block, qparams.extra))
            missed = x - on_grid
            error = missed.abs().sum(1)
            gains = (error < least).nonzero().flatten()
            if not len(gains):
                break
            if len(gains) < len(left):
                x, missed, error, left = x[gains], missed[gains], error[gains], left[gains]
                scale, zero = scale[gains], zero[gains]
            best[left], least = zero, error
            step = self._tamed(missed, beta).mean(1, keepdim=True) / scale.to(torch.float32)
            zero = scheme.hold_zero_point(zero.to(torch.float32) - step, scale)
            beta *= self.kappa
        return best.reshape(qparams.scale.shape)

    def _tamed(self, missed: Tensor, beta: float) -> Tensor:
        """Return errors r less what shrinkage takes of them: ``min(|r|, |r| ** (p - 1) / beta)``.

        With the signs of r.
        """
        size = missed.abs()
        if float(size.amax()) <= beta ** (1 / (self.p - 2)):
            return missed  # so far there is none, and powers are slow
        return torch.minimum(size, size.pow(self.p - 1) / beta).copysign(missed)


def _whole(scheme: Scheme, qparams: QParams) -> QParams:
    """Return the parameters with whole zero points, where the scheme has floats."""
    scale, zero_point = qparams.scale, qparams.zero_point
    assert scale is not None  # `HQQ.refuse` asked whether values are made of both
    assert zero_point is not None
    nearest = zero_point.to(torch.float32).round()
    return replace(qparams, zero_point=scheme.hold_zero_point(nearest, scale))
