"""Rounding to nearest, on scales that are chosen by what errors cost the layer's output."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from mono_quant.base import AnyStatistic, Grid, Rounding, Scheme, Statistic, Statistics
from mono_quant.configurable import is_count, register
from mono_quant.errors import ConfigurationError, InputError
from mono_quant.numerics.blocks import block_sum
from mono_quant.numerics.granularity import Shape
from mono_quant.numerics.values import QTensor
from mono_quant.rounding.hessian import check_count
from mono_quant.rounding.rows import rows_where


@attrs.frozen(eq=False)
class PowerState:
    """Sums over the rows of inputs that were seen.

    Attributes:
        total: ``sum x^2`` of each column, ``float64 [G, in]``.
        count: how many rows.
    """

    total: Tensor
    count: int

    @property
    def mean(self) -> Tensor:
        """The mean square of each column of inputs, ``float32 [G, in]``."""
        return (self.total / max(1, self.count)).to(torch.float32)


@register
@attrs.frozen
class InputPower(Statistic[PowerState]):
    """The mean square of each column of the inputs that a weight meets: the diagonal of `Hessian`.

    What an error in a column costs the layer's output, by itself. A row of numbers where `Hessian`
    has a square of them.
    """

    kind: ClassVar[str] = "input_power"

    def observe(self, x: Tensor) -> PowerState:
        """Return the sums over rows ``[n, in]``, or over ``[G, n, in]`` for a stack of matrices."""
        rows = x if x.dim() == 3 else x.unsqueeze(0)
        return PowerState(
            rows.to(torch.float32).square().sum(1, dtype=torch.float64), rows.shape[1]
        )

    def merge(self, left: PowerState, right: PowerState) -> PowerState:
        """Return the sums over both."""
        return PowerState(left.total + right.total, left.count + right.count)

    def check_state(self, state: PowerState, stack: Shape | None = None) -> None:
        """Refuse sums that are not as many as the weight has columns."""
        expected = state.total.shape if stack is None else (stack[0], stack[2])
        if state.total.shape != expected:
            raise InputError(
                f"mean squares are {tuple(state.total.shape)}, where {tuple(expected)} were "
                "expected"
            )
        check_count(state.count)


_POWER = InputPower()


@register
@attrs.frozen
class ImportanceWeighted(Rounding):
    """The nearest grid points, on the scales that cost least where inputs are large.

    The scale of each block is multiplied by each of an even grid of factors from `smallest` to
    `largest`, and the one is kept that leaves the least ``sum_k E[x_k^2] (v_k - w_k)^2``: what the
    errors of its columns cost the layer's output if inputs are uncorrelated. The scale that the
    observer found is among them and the first of equals, so no block comes out worse by that
    measure than by rounding to nearest. A grid without scales (a cast) is rounded to nearest.

    Needs a number for each column of inputs, where `GPTQ` needs a square matrix.

    Source: the "importance matrix" of llama.cpp (https://github.com/ggml-org/llama.cpp/pull/4861)
    weights errors so.

    Attributes:
        steps: how many factors are tried beside 1.
        smallest: the smallest of them.
        largest: the largest of them.
    """

    kind: ClassVar[str] = "importance"
    sequential: ClassVar[bool] = True
    steps: int = attrs.field(default=32)
    smallest: float = 0.5
    largest: float = 1.1

    @steps.validator
    def _check_steps(self, _: object, value: object) -> None:
        if not is_count(value, 1):
            raise ConfigurationError(f"steps is a whole number, 1 or more, not {value!r}")

    def __attrs_post_init__(self) -> None:
        """Refuse a search that is none."""
        if not 0 < self.smallest < self.largest <= 2:
            raise ConfigurationError(
                "factors lie between 0 and 2, the smallest before the largest, not "
                f"{self.smallest!r} and {self.largest!r}"
            )

    def describe(self) -> str:
        """Return its name and what it takes."""
        return f"rounding to nearest, {self.steps} scales weighed by the inputs, block after block"

    @property
    def needs(self) -> tuple[AnyStatistic, ...]:
        """The mean squares of the inputs."""
        return (_POWER,)

    def round(self, weight: Tensor, grid: Grid, statistics: Statistics) -> QTensor:
        """Return `weight`, a float32 stack ``[G, out, in]``, on the grid.

        Raises:
            InputError: the mean squares are not finite, or do not fit the weight.
        """
        scheme, state, qparams = grid.scheme, statistics.state(_POWER), grid.qparams(weight)
        if not weight.numel() or not state.count:
            return scheme.quantize_stack(weight, qparams)
        power = state.mean
        expected = (weight.shape[0], weight.shape[2])
        if power.shape != expected:
            raise InputError(
                f"its inputs have mean squares {tuple(power.shape)}, where {expected} were expected"
            )
        if not bool(power.isfinite().all()):
            raise InputError("the mean squares of its inputs are not finite")
        power = power.unsqueeze(1)
        plain = scheme.quantize_stack(weight, qparams)
        scales = self._scales(weight, scheme, plain, power)
        if scales is None:
            return plain
        found = scheme.quantize_stack(weight, scheme.rescaled(qparams, scales))
        errors = [_squares(weight, scheme, q, power).sum(2, keepdim=True) for q in (found, plain)]
        if qparams.block_size[:2] != (1, 1):  # rows share scales
            return found if float(errors[0].sum()) < float(errors[1].sum()) else plain
        return rows_where(errors[0] > errors[1], plain, found)

    def _scales(
        self, weight: Tensor, scheme: Scheme, plain: QTensor, power: Tensor
    ) -> Tensor | None:
        """Return the best scale of each block; None for a grid without scales."""
        before, block_size = scheme.scales(plain.qparams), plain.qparams.block_size
        if before is None:
            return None
        least = block_sum(_squares(weight, scheme, plain, power), block_size)
        best = before
        for factor in torch.linspace(self.smallest, self.largest, self.steps).tolist():
            tried = scheme.rescaled(plain.qparams, before * factor)
            q = scheme.quantize_stack(weight, tried)
            error = block_sum(_squares(weight, scheme, q, power), block_size)
            best = torch.where(error < least, before * factor, best)
            least = torch.minimum(error, least)
        return best


def _squares(weight: Tensor, scheme: Scheme, q: QTensor, power: Tensor) -> Tensor:
    """Return what the error of each weight costs, float32 ``[G, out, in]``."""
    return (scheme.dequantize(q) - weight).square_().mul_(power)
