"""Ranges of channels evened out between two layers: cross-layer equalization."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from mono_quant.base import WITHOUT_DATA, Change, Transform, TransformContext
from mono_quant.configurable import register
from mono_quant.errors import ConfigurationError
from mono_quant.transforms.activation import Nonlinearity
from mono_quant.transforms.graph import Graph
from mono_quant.transforms.rescaling import (
    Rescaling,
    Undo,
    dimensions,
    kind_of,
    matrices,
    refuse,
    widths,
)
from mono_quant.transforms.tracing import trace
from mono_quant.transforms.watching import agree, outputs_of

_STILL = 1e-3
"""A sweep that moves no channel's scale by more than this share is the last one."""


@register
@attrs.frozen
class EqualizeLayers(Transform):
    """Scales the channels between two layers so that both have them in the same range.

    Where the output of a Linear or convolution goes only to another one, directly or through a
    ReLU or LeakyReLU, channel i may be divided by any ``s > 0`` in the first and multiplied with it
    in the second, for ``f(s * x) = s * f(x)``. With the ranges ``r1 = max|W1[i]|`` and
    ``r2 = max|W2[:, i]|``, ``s = sqrt(r1 / r2)`` makes both ``sqrt(r1 * r2)``. All pairs are gone
    through in turn until none moves; a channel that is zero on either side stays. Computed in
    float64 and rounded once. Apply `FoldBatchNorm` first: a batch normalization ends a pair.

    Ranges of activations change as well, which may cost accuracy where those are quantized. Pairs
    are found by symbolic tracing alone; with data, the model's outputs are compared as well.

    Source: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias
    Correction", section 4.1, https://arxiv.org/abs/1906.04721.

    Attributes:
        sweeps: how often all pairs are gone through at most.
    """

    kind: ClassVar[str] = "equalize_layers"
    sweeps: int = attrs.field(default=40)

    @sweeps.validator
    def _check_sweeps(self, attribute: object, value: int) -> None:
        if value < 1:
            raise ConfigurationError(f"sweeps is 1 or more, not {value}")

    def apply(
        self, model: nn.Module, context: TransformContext = WITHOUT_DATA
    ) -> tuple[Change, ...]:
        """Equalize what can be, in place; return a change for each pair, done or refused."""
        graph = trace(model)
        if graph.reason is not None:
            return (Change("", f"no layer is equalized: {graph.reason}", done=False),)
        before = outputs_of(model, context, 1)
        pairs = [pair for path, _ in model.named_modules() if (pair := _pair(model, path, graph))]
        refused = {
            pair: reason for pair in pairs if (reason := _unfit(model, graph, pair)) is not None
        }
        while todo := [pair for pair in pairs if pair not in refused]:
            scales = self._balance(model, todo)
            undos, failed = _rescale(model, scales)
            if not failed:
                if not before or agree(before, outputs_of(model, context, 1)):
                    changes = {pair: _done(pair, scale) for pair, scale in scales.items()}
                    return tuple(
                        changes.get(pair) or _refused(pair, refused[pair]) for pair in pairs
                    )
                failed = {pair.first: "it changes the model's outputs on the data" for pair in todo}
            for undo in undos:
                undo()
            for pair in todo:
                if reasons := [failed[path] for path in pair.paths if path in failed]:
                    refused[pair] = reasons[0]
        return tuple(_refused(pair, refused[pair]) for pair in pairs)

    def _balance(self, model: nn.Module, pairs: Sequence["_Pair"]) -> Mapping["_Pair", Tensor]:
        """Return what to divide each channel between two layers by, ``[channels]`` in float64."""
        layers = {path: model.get_submodule(path) for pair in pairs for path in pair.paths}
        peaks = {path: _peaks(layer) for path, layer in layers.items()}
        scales = {
            pair: torch.ones(widths(layers[pair.first])[1], dtype=torch.float64) for pair in pairs
        }
        for _ in range(self.sweeps):
            moved = 0.0
            for pair in pairs:
                first, second = peaks[pair.first], peaks[pair.second]
                out_range, in_range = first.amax(2), second.amax(1)  # [groups, out or in / groups]
                low, high = in_range.flatten(), out_range.flatten()
                scale = torch.where((low > 0) & (high > 0), (high / low).sqrt(), 1.0)
                peaks[pair.first] = first / scale.reshape(out_range.shape).unsqueeze(2)
                peaks[pair.second] = second * scale.reshape(in_range.shape).unsqueeze(1)
                scales[pair] = scales[pair] * scale
                moved = max(moved, float(scale.log().abs().max()))
            if moved <= _STILL:
                break
        return scales


@attrs.frozen
class _Pair:
    """Two layers with channels between them, and what else is between them."""

    first: str
    second: str
    activation: Nonlinearity | None

    @property
    def paths(self) -> tuple[str, str]:
        """Both dotted names."""
        return self.first, self.second


def _pair(model: nn.Module, path: str, graph: Graph) -> _Pair | None:
    if kind_of(model.get_submodule(path)) is None:
        return None
    chain = graph.chain(path)
    if chain.then is None or kind_of(model.get_submodule(chain.then)) is None:
        return None
    return _Pair(path, chain.then, chain.activation)


def _unfit(model: nn.Module, graph: Graph, pair: _Pair) -> str | None:
    """Return why a pair cannot be equalized, or None."""
    if pair.activation is not None and not pair.activation.homogeneous:
        return f"between them is {pair.activation}, which does not pass a scale on"
    if (reason := graph.uncertain(pair.second)) is not None:
        return f"of {pair.second!r}: {reason}"
    for path, partner in (pair.paths, pair.paths[::-1]):
        if (reason := refuse(model, path, partner)) is not None:
            return reason
    first, second = (model.get_submodule(path) for path in pair.paths)
    if dimensions(first) != dimensions(second) or widths(first)[1] != widths(second)[0]:
        return "the channels of one are not those of the other"
    if not all(bool(torch.isfinite(_peaks(layer)).all()) for layer in (first, second)):
        return "a weight holds NaN or infinity"
    return None


def _peaks(layer: nn.Module) -> Tensor:
    """Return the largest magnitude in each kernel, ``[groups, out / groups, in / groups]``."""
    return matrices(layer, layer.get_parameter("weight").detach()).abs().amax(3).to("cpu").double()


def _rescale(
    model: nn.Module, scales: Mapping[_Pair, Tensor]
) -> tuple[list[Undo], Mapping[str, str]]:
    """Give all layers their new parameters; return what takes them back, and what failed."""
    outputs = {pair.first: 1 / scale for pair, scale in scales.items()}
    inputs = {pair.second: scale for pair, scale in scales.items()}
    undos: list[Undo] = []
    failed: dict[str, str] = {}
    for path in {**outputs, **inputs}:
        rescaling = Rescaling(outputs.get(path), inputs.get(path))
        undo = rescaling.apply(model.get_submodule(path))
        if isinstance(undo, str):
            failed[path] = f"of {path!r}: {undo}"
        else:
            undos.append(undo)
    return undos, failed


def _done(pair: _Pair, scale: Tensor) -> Change:
    low, high = (float(end) for end in scale.aminmax())
    text = f"{pair.first} and {pair.second} are equalized, by {low:.3g} to {high:.3g} a channel"
    return Change(pair.first, text)


def _refused(pair: _Pair, reason: str) -> Change:
    text = f"{pair.first} and {pair.second} are not equalized: {reason}"
    return Change(pair.first, text, done=False)
