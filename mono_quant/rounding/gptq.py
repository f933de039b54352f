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
from mono_quant.rounding.hessian import Factor, Hessian
from mono_quant.rounding.rows import rows_where
from mono_quant.rounding.scales import fit_scales

_HESSIAN = Hessian()


@register
@attrs.frozen
class GPTQ(Rounding):
    """Each column on the nearest grid point, its error taken over by the columns that come later.

    Minimizes the error of the layer's output on the inputs that calibration saw, greedily: with
    ``H = E[x x^T] = U D U^T``, what column k misses is spread over the later ones by row k of U,
    which is upper triangular with ones on its diagonal. Ranges are found first, from the weight as
    it was given, so that an order of columns moves no group. No row comes out worse than by
    rounding to nearest: one that would is rounded to nearest.

    Refinements go on from there. Each fits the scales to the codes by least squares, then gives
    each weight in turn the grid point that is best beside all others.

    Layers are rounded in the order in which they run, and each sees its inputs as the layers before
    it, quantized, make them.

    Source: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative
    Pre-trained Transformers", https://arxiv.org/abs/2210.17323, which writes the same with factors
    of ``H^-1``; that no inverse is needed, Chee et al. 2023, "QuIP",
    https://arxiv.org/abs/2307.13304. Refinements: coordinate descent as in Behdin et al. 2023,
    "QuantEase", https://arxiv.org/abs/2309.01885.

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
        """Return the bytes of second moments, of what float64 takes, and of their factor, twice."""
        matrices, _, length = shape
        return matrices * length * length * (4 + 8 + 2 * 4)

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
        plain = scheme.quantize_stack(weight, qparams)
        codes = _compensated(weight, scheme, qparams, factor, self.block)
        moments = state.mean

        def rated(q: QTensor) -> _Rated:
            return _Rated(q, output_error(weight, scheme.dequantize(q), moments))

        best = rated(QTensor(codes, qparams, weight.dtype))
        if self.refinements:
            damped = state.damped(self.damping)
            met = weight @ damped
            for _ in range(self.refinements):
                start = fit_scales(met, scheme, best.q, damped) or best.q
                best = rated(_settled(weight, scheme, start, damped, self.block)).or_better(best)
        return best.or_better(rated(plain)).q


@attrs.frozen(eq=False)
class _Rated:
    """A weight on its grid, and the error of each of its rows ``[G, out]``."""

    q: QTensor
    errors: Tensor

    def or_better(self, other: "_Rated") -> "_Rated":
        """Return its rows, or those of another form where they are better."""
        q = rows_where((self.errors > other.errors).unsqueeze(2), other.q, self.q)
        return _Rated(q, torch.minimum(self.errors, other.errors))


def output_error(weight: Tensor, rounded: Tensor, moments: Tensor) -> Tensor:
    """Return the mean squared error of each row's product, ``float32 [G, out]``."""
    missed = rounded - weight
    return (missed @ moments).mul_(missed).sum(2)


def _compensated(
    weight: Tensor, scheme: Scheme, qparams: QParams, factor: Factor, block: int
) -> Tensor:
    """Return codes ``[G, out, in]``, of columns that make up for those before them."""
    order = factor.order
    given = weight.gather(2, order.unsqueeze(1).expand_as(weight))  # [G, out, in], in order
    left, on_grid = given.clone(), scheme.by_column(qparams, order)
    found: list[Tensor] = []
    length = weight.shape[2]
    for start in range(0, length, block):
        end = min(start + block, length)
        upper = factor.upper[:, start:end]  # [G, block, in]
        now = left[:, :, start:end].mT.contiguous()  # [G, block, out]
        missed = given[:, :, start:end].mT.contiguous()
        for k in range(end - start):
            place = start + k
            codes, values = on_grid(now[:, k], place)
            error = missed[:, k].sub_(values)
            later = upper[:, k, place + 1 : end].unsqueeze(2)
            now[:, k + 1 :].baddbmm_(later, error.unsqueeze(1))
            found.append(codes)
        left[:, :, end:].baddbmm_(missed.mT, upper[:, :, end:])
    codes = torch.stack(found, dim=2)
    return codes.gather(2, order.argsort(dim=1).unsqueeze(1).expand_as(codes))


def _settled(weight: Tensor, scheme: Scheme, q: QTensor, moments: Tensor, block: int) -> QTensor:
    """Return `q` after each weight in turn took the grid point that is best beside all others."""
    values = scheme.dequantize(q)
    slope = (values - weight) @ moments  # half of the gradient, [G, out, in]
    length = weight.shape[2]
    order = torch.arange(length, device=weight.device).expand(weight.shape[0], -1)
    on_grid = scheme.by_column(q.qparams, order)
    curve = moments.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(torch.float32).tiny)
    found: list[Tensor] = []
    for start in range(0, length, block):
        end = min(start + block, length)
        near = slope[:, :, start:end].mT.contiguous()  # [G, block, out]
        before = values[:, :, start:end].mT.contiguous()
        moved = torch.empty_like(near)
        for k in range(end - start):
            place = start + k
            best = before[:, k] - near[:, k] / curve[:, place, None]
            codes, after = on_grid(best, place)
            step = torch.sub(after, before[:, k], out=moved[:, k])
            later = moments[:, place, place + 1 : end].unsqueeze(2)
            near[:, k + 1 :].baddbmm_(later, step.unsqueeze(1))
            found.append(codes)
        slope[:, :, end:].baddbmm_(moved.mT, moments[:, start:end, end:])
    return QTensor(torch.stack(found, dim=2), q.qparams, q.dtype)
