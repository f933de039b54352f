"""What is kept to be drawn: how values are spread, of the few layers that return least."""

from collections.abc import Iterable, Mapping, Sequence

import attrs
import torch
from torch import Tensor, nn

from mono_quant.base import QuantizedModule, Scheme
from mono_quant.calibration import evaluating
from mono_quant.evidence import Distribution, LayerReport
from mono_quant.numerics.histogram import HistogramState, observe
from mono_quant.numerics.values import QParams
from mono_quant.plan.request import WeightPlan

SHOWN = 6
"""Weights whose histograms are kept, and those of their inputs."""

BINS = 64

_BEYOND = 8.0
"""Times the largest value: no range reaches there, so the nearest grid point is the last."""


@attrs.define(eq=False)
class Worst:
    """The least figures that came by, so that little is drawn in vain: no more than are shown."""

    _least: list[float] = attrs.field(factory=list, init=False)

    def admits(self, decibels: float) -> bool:
        """Return whether a figure is among the least so far."""
        self._least = sorted([*self._least, decibels])[:SHOWN]
        return decibels in self._least


def weight_histogram(stack: Tensor, scheme: Scheme, qparams: QParams) -> Distribution | None:
    """Return how the values of a stack ``[G, out, in]`` are spread, and what its grid covers.

    None for an empty one. Columns that a scheme keeps apart are left out.
    """
    if not stack.numel():
        return None
    if qparams.scale is not None:
        stack, scheme, qparams = scheme.ranged(stack, qparams)
    found = distribution(observe(stack, BINS))
    reach = _BEYOND * (max(-found.low, found.high) or 1.0)
    ends = _ends(scheme, qparams, min(reach, torch.finfo(torch.float32).max))
    if ends is None:
        return found
    low, high = ends
    typical = (float(low.median()), float(high.median())) if low.numel() > 1 else None
    return attrs.evolve(found, covered=(float(low.min()), float(high.max())), typical=typical)


def distribution(state: HistogramState, covered: tuple[float, float] | None = None) -> Distribution:
    """Return a histogram as plain data, with the range that one grid for all values covers."""
    low, width = float(state.low), 2.0 ** int(state.exponent)
    return Distribution(
        start=min(low, 0.0) // width * width,
        width=width,
        counts=tuple(state.counts.tolist()),
        zeros=int(state.zeros),
        low=low,
        high=float(state.high),
        covered=covered,
    )


def with_histograms(
    rows: Mapping[str, LayerReport],
    todo: Iterable[WeightPlan],
    model: nn.Module,
    floats: nn.Module | None,
) -> Mapping[str, LayerReport]:
    """Return the rows, those that return least with their histograms and all others without.

    Args:
        rows: by the weights' names.
        todo: those weights.
        model: the quantized one.
        floats: the model with the float weights; None where they are gone, and were looked at when
            they were rounded.
    """
    worst = set(sorted(rows, key=lambda name: rows[name].harm_db)[:SHOWN])
    plans = {weight.key: weight for weight in todo if weight.key in worst}

    def drawn(name: str, row: LayerReport) -> LayerReport:
        if name not in worst:
            inputs = tuple(attrs.evolve(one, histogram=None) for one in row.inputs)
            return attrs.evolve(row, histogram=None, inputs=inputs)
        if row.histogram is not None or floats is None:
            return row
        return attrs.evolve(row, histogram=_of(plans[name], model, floats))

    return {name: drawn(name, row) for name, row in rows.items()}


def _of(weight: WeightPlan, model: nn.Module, floats: nn.Module) -> Distribution | None:
    layer, quantized = floats.get_submodule(weight.path), model.get_submodule(weight.path)
    assert isinstance(quantized, QuantizedModule)  # its weight has a row
    packed = quantized.packed_weights()[weight.name]
    with evaluating(layer):  # in train mode, reading a spectral_norm weight changes it
        stack = weight.maker.weights(layer)[weight.name].stack()
    return weight_histogram(stack, packed.scheme, packed.qparams)


def _ends(scheme: Scheme, qparams: QParams, reach: float) -> Sequence[Tensor] | None:
    """Return the first and the last grid point of every block; None where there are no blocks.

    Nor is there a way to tell where a scheme keeps something for each value or row.
    """
    if qparams.scale is None or any(extra.dim() > 1 for extra in qparams.extra.values()):
        return None
    scale = qparams.scale
    one = QParams(scale, qparams.zero_point, (1,) * scale.dim(), qparams.extra)  # a value a block
    ends = (torch.full(scale.shape, sign * reach, device=scale.device) for sign in (-1, 1))
    return [scheme.fake_quantize(end, one) for end in ends]
