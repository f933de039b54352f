"""Biases that make up for what rounding did to the mean of a layer's output."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import ClassVar, cast

import attrs
import torch
from torch import Tensor, nn

from mono_quant.base import (
    Change,
    Correction,
    CorrectionContext,
    Edit,
    InnerOutputs,
    QuantizedModule,
)
from mono_quant.configurable import register
from mono_quant.numerics.metrics import SquaredError
from mono_quant.transforms.edits import BIAS
from mono_quant.transforms.expected import expected_inputs
from mono_quant.transforms.rescaling import kind_of, matrices

_WORSE = 2.0
"""How often the error of the outputs may have grown.

It may grow, for what a rounding has learned from the data is nearer there than it is elsewhere.
"""


@register
@attrs.frozen
class BiasCorrection(Correction):
    """Moves the bias of each quantized layer so that its mean output is that of the float layer.

    Rounding a weight shifts the mean of what it computes by ``(W' - W) E[x]``, most of all in a
    depthwise convolution, whose rows are short. Layer after layer, in the order in which they run:
    each is measured with all before it quantized and corrected, so that a correction also takes
    back what is left of the errors before it. Each block is run once for each layer in it; where it
    cannot be run by itself, the model up to that layer is.

    Layers that do not run exactly once for each batch, that share their bias or that are neither a
    Linear nor a convolution are left alone. A layer without bias is given one. If all corrections
    together more than double the squared error of the model's outputs on the data, they are taken
    back: as they may where a rounding to few bits had layers make up for each other's errors.

    Without data, ``E[x]`` is known where a batch normalization alone feeds the layer, directly or
    through a clamp such as ReLU or ReLU6: its outputs are taken to be normal, with its bias for the
    mean and its weight for the standard deviation. See `expected_inputs`. Other layers are then
    left alone, and so are transposed convolutions.

    Source: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias
    Correction", section 4.2 and appendices C and D, https://arxiv.org/abs/1906.04721.
    """

    kind: ClassVar[str] = "bias_correction"
    needs_data: ClassVar[bool] = False

    def apply(self, model: nn.Module, context: CorrectionContext) -> tuple[Change, ...]:
        """Correct what can be corrected; return a change for each quantized layer that ran.

        Without data, for each quantized layer.
        """
        paths = [path for path, one in model.named_modules() if isinstance(one, QuantizedModule)]
        shared = Counter(
            id(bias) for one in model.modules() if (bias := one._parameters.get("bias")) is not None
        )
        unfit = {path: _unfit(model.get_submodule(path), shared) for path in paths}
        if context.outputs is None:
            return _without_data(model, context, unfit)
        outputs = context.outputs
        before = _error(context.floats, model, outputs)
        batches, calls, means = _means(context.floats, paths, outputs)
        given = {path: model.get_submodule(path)._parameters.get("bias") for path in calls}
        changes: list[Change] = []
        for path in calls:
            layer = model.get_submodule(path)
            reason = unfit[path]
            if kind_of(layer) is not None and calls[path] != batches:
                often = calls[path] > batches
                reason = "it runs more than once" if often else "it does not run for each batch"
            if reason is not None:
                changes.append(_left_alone(path, reason))
                continue
            found = _Mean()
            for tensors in outputs(model, layer):
                found.add(layer, tensors[0])
            changes.append(_correct(path, layer, means[path].value - found.value))
        if _error(context.floats, model, outputs) > _WORSE * before:
            return tuple(_taken_back(model, one, given) for one in changes)
        return tuple(changes)


def _error(floats: nn.Module, model: nn.Module, outputs: InnerOutputs) -> float:
    """Return the squared error of a model's outputs over all batches."""
    both = zip(outputs(floats, floats), outputs(model, model), strict=True)
    errors = (
        SquaredError.between(exact, found)
        for batch in both
        for exact, found in zip(*batch, strict=True)
        if exact.is_floating_point()
    )
    return SquaredError.total(errors).noise


def _taken_back(
    model: nn.Module, change: Change, given: Mapping[str, nn.Parameter | None]
) -> Change:
    """Give a layer the bias that it had, if that was changed."""
    if not change.done:
        return change
    layer, bias = model.get_submodule(change.path), given[change.path]
    if bias is None:
        del layer._parameters["bias"]
        layer.register_parameter("bias", None)
    else:
        layer.register_parameter("bias", bias)
    return _left_alone(change.path, "with all corrections, the model's outputs are further off")


def _unfit(layer: nn.Module, shared: Mapping[int, int]) -> str | None:
    """Return why the bias of a layer cannot be moved, however it runs, or None."""
    if kind_of(layer) is None:
        return "it is neither a Linear nor a convolution"
    if isinstance(layer, QuantizedModule) and layer.stand_in is not None:
        return "it computes the activation behind it, too"
    bias = layer._parameters.get("bias")
    return "it shares its bias" if bias is not None and shared[id(bias)] > 1 else None


def _left_alone(path: str, reason: str) -> Change:
    return Change(path, f"the bias of {path!r} is not corrected: {reason}", done=False)


def _without_data(
    model: nn.Module, context: CorrectionContext, unfit: Mapping[str, str | None]
) -> tuple[Change, ...]:
    """Correct each layer for what rounding its weight does to the input that is expected."""
    means = expected_inputs(context.original, context.floats, list(unfit))
    changes: list[Change] = []
    for path, reason in unfit.items():
        mean = means[path]
        if reason is not None or isinstance(mean, str):
            changes.append(_left_alone(path, reason or str(mean)))
            continue
        layer = model.get_submodule(path)
        packed = cast("QuantizedModule", layer).packed_weights()["weight"]  # `unfit` has looked
        twin = context.floats.get_submodule(path)
        rounded, exact = packed.dequantize(torch.float32), twin.get_parameter("weight").detach()
        missed = matrices(twin, rounded.double() - exact.double()).sum(3)  # [G, out / G, in / G]
        inputs = mean.to(missed.device).reshape(missed.shape[0], -1, 1)
        changes.append(_correct(path, layer, -(missed @ inputs).flatten()))
    return tuple(changes)


class _Mean:
    """The mean of each channel of a layer's output, added up over batches in float64."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, layer: nn.Module, output: Tensor) -> None:
        """Add an output ``[..., out]`` of a Linear or ``[N, out, *positions]`` of a convolution."""
        channel = output.dim() - 1 - _positions(layer)
        others = [place for place in range(output.dim()) if place != channel]
        total = output.detach().to(torch.float64).sum(others) if others else output.double()
        self._sum = total if self._sum is None else self._sum + total
        self._count += output.numel() // max(1, output.shape[channel])

    @property
    def value(self) -> Tensor:
        """The mean, ``float64 [out]``; zeros where nothing was seen."""
        if self._sum is None:
            return torch.zeros(())
        return self._sum / max(1, self._count)


def _means(
    floats: nn.Module, paths: Sequence[str], outputs: InnerOutputs
) -> tuple[int, Mapping[str, int], Mapping[str, _Mean]]:
    """Return the number of batches, how often each layer runs, first come first, and its mean."""
    calls: dict[str, int] = {}
    means: dict[str, _Mean] = {path: _Mean() for path in paths}

    def see(path: str, layer: nn.Module, _: tuple[object, ...], output: object) -> None:
        calls[path] = calls.get(path, 0) + 1
        if isinstance(output, Tensor) and kind_of(layer) is not None:
            means[path].add(layer, output)

    with ExitStack() as hooks:
        for path in paths:
            handle = floats.get_submodule(path).register_forward_hook(partial(see, path))
            hooks.callback(handle.remove)
        batches = sum(1 for _ in outputs(floats, floats))
    return batches, calls, means


def _positions(layer: nn.Module) -> int:
    """Return how many dimensions of an output come after its channels."""
    return len(layer.kernel_size) if isinstance(layer, nn.modules.conv._ConvNd) else 0


def _correct(path: str, layer: nn.Module, shift: Tensor) -> Change:
    bias = layer._parameters.get("bias")
    if bias is None:
        like = next((one for one in layer.buffers() if one.is_floating_point()), shift)
        fresh = shift.to(like.device, torch.float32)
        layer.register_parameter("bias", nn.Parameter(fresh))
        return Change(path, f"the bias of {path!r} is corrected", edits=(Edit(BIAS, path),))
    corrected = (bias.detach().double() + shift).to(bias.dtype)
    layer.register_parameter("bias", nn.Parameter(corrected, requires_grad=bias.requires_grad))
    return Change(path, f"the bias of {path!r} is corrected")
