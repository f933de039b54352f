"""Second moments of a weight's inputs: what an error in each of its columns costs together."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from mono_quant.base import Statistic
from mono_quant.configurable import register
from mono_quant.errors import InputError
from mono_quant.numerics.granularity import Shape

_TRIES = 3
"""How often damping is multiplied by ten where rounding made a matrix indefinite."""


_STRIP = 192
"""Rows or columns of a large matrix that are worked on at once, so that no second one is made."""


def _products(rows: Tensor) -> Tensor:
    """Return ``rows^T rows`` of ``[G, n, in]``; what lies below the diagonal is copied."""
    matrices, _, length = rows.shape
    found = rows.new_empty(matrices, length, length)
    for start in range(0, length, _STRIP):
        end = min(start + _STRIP, length)
        strip = rows[:, :, start:end].mT @ rows[:, :, start:]
        found[:, start:end, start:] = strip
        found[:, end:, start:end] = strip[:, :, end - start :].mT
    return found


def check_count(count: int) -> None:
    """Refuse a number of rows that is none.

    Raises:
        InputError: it is negative.
    """
    if count < 0:
        raise InputError(f"rows are counted from 0 on, not {count}")


@attrs.frozen(eq=False)
class HessianState:
    """Sums over the rows of inputs that were seen.

    Attributes:
        gram: ``sum x x^T`` over rows x, ``float32 [G, in, in]``.
        count: how many rows.
    """

    gram: Tensor
    count: int
    _factors: dict[tuple[float, bool], "Factor"] = attrs.field(factory=dict, init=False)

    @property
    def mean(self) -> Tensor:
        """The second moments, ``gram / count``, ``float32 [G, in, in]``."""
        return self.gram / max(1, self.count)

    def damped(self, damping: float) -> Tensor:
        """The second moments with that share of the mean of their diagonal added to each of it."""
        moments = self.mean
        diagonal = moments.diagonal(dim1=1, dim2=2)  # a view
        diagonal.add_(diagonal.mean(1, keepdim=True) * damping)
        return moments

    def factor(self, damping: float, ordered: bool) -> "Factor":
        """Return the factor; weights that meet the same inputs share it.

        Args:
            damping: share of the mean of the diagonal that is added to each of its elements.
            ordered: take columns in the order of falling diagonal elements.

        Raises:
            ValueError: the matrix is not finite.
        """
        key = (damping, ordered)
        if key not in self._factors:
            self._factors[key] = Factor.of(self, damping, ordered)
        return self._factors[key]


@attrs.frozen(eq=False)
class Factor:
    """``U`` with ``H + damping = U D U^T``, D diagonal, rows and columns of H in some order.

    Attributes:
        upper: ``float32 [G, in, in]``, upper triangular with ones on its diagonal.
        order: the column of the weight that each row belongs to, ``int64 [G, in]``.
    """

    upper: Tensor
    order: Tensor

    @classmethod
    def of(cls, state: HessianState, damping: float, ordered: bool) -> "Factor":
        """Return the factor of second moments.

        An input that was always zero costs nothing: its place on the diagonal becomes one, so that
        its column is rounded to nearest and moves no other. With the order of rows reversed, the
        Cholesky factor of the matrix is an upper triangular one, ``U D^(1/2)``.
        """
        gram = state.gram
        if not bool(torch.isfinite(gram).all()):
            raise ValueError("the second moments of its inputs are not finite")
        matrices, count, _ = gram.shape
        order = (
            gram.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
            if ordered
            else torch.arange(count, device=gram.device).expand(matrices, count)
        )
        failed = torch.empty(matrices, dtype=torch.int32, device=gram.device)
        for added in (damping * 10**power for power in range(_TRIES)):
            moments = _rearranged(gram, order.flip(1)).div_(max(1, state.count))
            diagonal = moments.diagonal(dim1=1, dim2=2)  # a view
            level = diagonal.mean(1, keepdim=True)
            diagonal.masked_fill_(diagonal == 0, 1.0).add_(level * added)
            lower = moments.mT  # in whose order of values the factor takes the matrix's place
            torch.linalg.cholesky_ex(lower, out=(lower, failed))
            if not bool(failed.any()):
                lower /= lower.diagonal(dim1=1, dim2=2).unsqueeze(1).clone()  # which becomes ones
                return cls(_turned(lower), order)
        raise ValueError(f"the second moments of its inputs are singular, damped by {added:.2g}")


def _rearranged(gram: Tensor, order: Tensor) -> Tensor:
    """Return symmetric matrices with rows and columns in some order, ``float64 [G, in, in]``."""
    found = torch.empty(gram.shape, dtype=torch.float64, device=gram.device)
    for start in range(0, gram.shape[1], _STRIP):
        places = order[:, start : start + _STRIP, None]
        rows = gram.gather(1, places.expand(-1, -1, gram.shape[2]))
        found[:, start : start + _STRIP] = rows.gather(2, order[:, None].expand_as(rows))
    return found


def _turned(matrices: Tensor) -> Tensor:
    """Return matrices with rows and columns in reverse, in float32."""
    found = torch.empty(matrices.shape, dtype=torch.float32, device=matrices.device)
    count = found.shape[1]
    for start in range(0, count, _STRIP):
        end = min(start + _STRIP, count)
        found[:, start:end] = matrices[:, count - end : count - start].flip(1, 2)
    return found


@register
@attrs.frozen
class Hessian(Statistic[HessianState]):
    """``sum x x^T`` of the rows that a weight meets: half of the Hessian of its squared error.

    For a weight w and its rounded form v, the squared error of ``w x`` summed over inputs is
    ``(v - w) H (v - w)^T``.
    """

    kind: ClassVar[str] = "hessian"

    def observe(self, x: Tensor) -> HessianState:
        """Return the sums over rows ``[n, in]``, or over ``[G, n, in]`` for a stack of matrices."""
        rows = (x if x.dim() == 3 else x.unsqueeze(0)).to(torch.float32)
        return HessianState(_products(rows), rows.shape[1])

    def merge(self, left: HessianState, right: HessianState) -> HessianState:
        """Return the sums over both."""
        return HessianState(left.gram + right.gram, left.count + right.count)

    def check_state(self, state: HessianState, stack: Shape | None = None) -> None:
        """Refuse sums that are no square, or not as wide as the weight."""
        matrices, _, columns = state.gram.shape if stack is None else stack
        if state.gram.shape != (matrices, columns, columns):
            raise InputError(
                f"second moments are {tuple(state.gram.shape)}, where "
                f"{(matrices, columns, columns)} were expected"
            )
        check_count(state.count)
