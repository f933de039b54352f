"""Rounding columns one by one, the others making up for what each misses."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from mono_quant.base import AnyStatistic, Grid, Rounding, Scheme, Statistics
from mono_quant.configurable import is_count, register
from mono_quant.errors import ConfigurationError, InputError
from mono_quant.numerics.granularity import Shape
from mono_quant.numerics.values import QParams, QTensor
from mono_quant.rounding.columns import columns_of, rows_where
from mono_quant.rounding.hessian import Factor, Hessian, HessianState
from mono_quant.rounding.nearest import to_nearest
from mono_quant.rounding.scales import fit_scales

_HESSIAN = Hessian()


@register
@attrs.frozen
class GPTQ(Rounding):
    """Each column on the nearest grid point, its error taken over by the columns that come later.

    Minimizes the error of the layer's output on the inputs that calibration saw, greedily: with
    ``H = E[x x^T]``, what column k misses is spread over the later ones by row k of the Cholesky
    factor of ``H^-1``. Ranges are found first, from the weight as it was given, so that an order of
    columns moves no group. No row comes out worse than by rounding to nearest: one that would is
    rounded to nearest.

    Refinements go on from there. Each fits the scales to the codes by least squares, then gives
    each weight in turn the grid point that is best beside all others.

    Layers are rounded in the order in which they run, and each sees its inputs as the layers before
    it, quantized, make them.

    Source: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative
    Pre-trained Transformers", https://arxiv.org/abs/2210.17323. Refinements: coordinate descent as
    in Behdin et al. 2023, "QuantEase", https://arxiv.org/abs/2309.01885.

    Attributes:
        damping: share of the mean of H's diagonal that is added to it, against singular H.
        activation_order: columns with the largest inputs first.
        block: how many columns pass their errors on at once; changes time alone.
        refinements: how many.
    """

    kind: ClassVar[str] = "gptq"
    sequential: ClassVar[bool] = True
    damping: float = attrs.field(default=0.01)
    activation_order: bool = True
    block: int = attrs.field(default=128)
    refinements: int = attrs.field(default=0)

    @damping.validator
    def _check_damping(self, _: object, value: float) -> None:
        if not 0 < value < 1:
            raise ConfigurationError(f"damping is a share between 0 and 1, not {value!r}")

    @block.validator
    def _check_block(self, _: object, value: int) -> None:
        if not is_count(value, 1):
            raise ConfigurationError(f"block is a whole number of columns, not {value!r}")

    @refinements.validator
    def _check_refinements(self, _: object, value: int) -> None:
        if not is_count(value, 0):
            raise ConfigurationError(f"refinements is a whole number, 0 or more, not {value!r}")

    def describe(self) -> str:
        """Return its name and what it takes."""
        more = f", refined {self.refinements} times" if self.refinements else ""
        return f"GPTQ, block after block, in about three runs of the model over the data{more}"

    def work_bytes(self, shape: Shape) -> int:
        """Return the bytes of second moments, of their factor, and of what float64 takes for it."""
        matrices, _, length = shape
        return matrices * length * length * (4 + 4 + 3 * 8)

    @property
    def needs(self) -> tuple[AnyStatistic, ...]:
        """The second moments of the inputs."""
        return (_HESSIAN,)

    def round(self, weight: Tensor, grid: Grid, statistics: Statistics) -> QTensor:
        """Return `weight`, a float32 stack ``[G, out, in]``, on the grid.

        Raises:
            InputError: the second moments are not finite, or do not fit the weight.
        """
        scheme, state = grid.scheme, statistics.state(_HESSIAN)
        length = weight.shape[2]
        if not weight.numel() or not state.count:
            return scheme.quantize(weight, grid.qparams(weight))
        if state.gram.shape != (weight.shape[0], length, length):
            raise InputError(
                f"its inputs have second moments {tuple(state.gram.shape)}, where "
                f"{(weight.shape[0], length, length)} were expected"
            )
        try:
            factor = state.factor(self.damping, self.activation_order)
        except ValueError as reason:
            raise InputError(str(reason)) from reason
        qparams = grid.qparams(weight)
        plain = to_nearest(weight, scheme, qparams)
        codes = _compensated(weight, scheme, qparams, factor, self.block)
        found = QTensor(codes, qparams, weight.dtype)
        if self.refinements:
            found = self._refined(weight, scheme, state, found)
        return _better(weight, scheme, state, found, plain)

    def _refined(
        self, weight: Tensor, scheme: Scheme, state: HessianState, found: QTensor
    ) -> QTensor:
        damped = state.damped(self.damping)
        for _ in range(self.refinements):
            fitted = fit_scales(weight, scheme, found, damped)
            settled = _settled(weight, scheme, fitted or found, damped, self.block)
            found = _better(weight, scheme, state, settled, found)
        return found


def output_error(weight: Tensor, rounded: Tensor, state: HessianState) -> Tensor:
    """Return the mean squared error of each row's product, ``float32 [G, out]``."""
    missed = rounded - weight
    return (missed @ state.mean).mul_(missed).sum(2)


def _better(
    weight: Tensor, scheme: Scheme, state: HessianState, one: QTensor, other: QTensor
) -> QTensor:
    """Return the rows of `one`, or those of `other` where they are better."""
    errors = [output_error(weight, scheme.dequantize(q), state) for q in (one, other)]
    return rows_where((errors[0] > errors[1]).unsqueeze(2), other, one)


def _compensated(
    weight: Tensor, scheme: Scheme, qparams: QParams, factor: Factor, block: int
) -> Tensor:
    """Return codes ``[G, out, in]``, of columns that make up for those before them."""
    order = factor.order
    left = weight.gather(2, order.unsqueeze(1).expand_as(weight))  # [G, out, in], in order
    columns = columns_of(qparams, order)
    found: list[Tensor] = []
    length = weight.shape[2]
    for start in range(0, length, block):
        end = min(start + block, length)
        upper = factor.upper[:, start:end]  # [G, block, in]
        now = left[:, :, start:end].mT.contiguous()  # [G, block, out]
        missed = torch.empty_like(now)
        for k in range(end - start):
            place = start + k
            q = scheme.quantize(now[:, k].unsqueeze(2), columns[place])
            error = now[:, k] - scheme.dequantize(q).squeeze(2)
            error /= upper[:, k, place].unsqueeze(1)
            missed[:, k] = error
            later = upper[:, k, place + 1 : end].unsqueeze(2)
            now[:, k + 1 :].baddbmm_(later, error.unsqueeze(1), alpha=-1)
            found.append(q.codes)
        left[:, :, end:].baddbmm_(missed.mT, upper[:, :, end:], alpha=-1)
    return _in_place(torch.cat(found, dim=2), order)


def _in_place(codes: Tensor, order: Tensor) -> Tensor:
    """Return columns ``[G, out, in]`` that were taken in an order, each where it belongs."""
    return codes.gather(2, order.argsort(dim=1).unsqueeze(1).expand_as(codes))


def _settled(weight: Tensor, scheme: Scheme, q: QTensor, moments: Tensor, block: int) -> QTensor:
    """Return `q` after each weight in turn took the grid point that is best beside all others."""
    values = scheme.dequantize(q)
    slope = (values - weight) @ moments  # half of the gradient, [G, out, in]
    order = torch.arange(weight.shape[2], device=weight.device).expand(weight.shape[0], -1)
    columns = columns_of(q.qparams, order)
    curve = moments.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(torch.float32).tiny)
    found: list[Tensor] = []
    for start in range(0, weight.shape[2], block):
        end = min(start + block, weight.shape[2])
        near = slope[:, :, start:end].mT.contiguous()  # [G, block, out]
        moved = torch.empty_like(near)
        for k in range(end - start):
            place = start + k
            old = values[:, :, place]
            best = old - near[:, k] / curve[:, place].unsqueeze(1)
            new = scheme.quantize(best.unsqueeze(2), columns[place])
            moved[:, k] = scheme.dequantize(new).squeeze(2) - old
            later = moments[:, place, start:end].unsqueeze(2)
            near.baddbmm_(later, moved[:, k].unsqueeze(1))
            found.append(new.codes)
        slope.baddbmm_(moved.mT, moments[:, start:end])
    return QTensor(torch.cat(found, dim=2), q.qparams, q.dtype)
