"""Biases that make up for what rounding did to the mean of a layer's output."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from mono_quant.base import Change, Correction, Edit, InnerOutputs, QuantizedModule
from mono_quant.configurable import register
from mono_quant.transforms.edits import BIAS
from mono_quant.transforms.rescaling import kind_of


@register
@attrs.frozen
class BiasCorrection(Correction):
    """Moves the bias of each quantized layer so that its mean output is that of the float layer.

    Rounding a weight shifts the mean of what it computes by ``(W' - W) E[x]``, most of all in a
    depthwise convolution, whose rows are short. Layer after layer, in the order in which they run:
    each is measured with all before it quantized and corrected, so that a correction also takes
    back what is left of the errors before it. That takes one run of the data for each layer, up to
    that layer.

    Layers that do not run exactly once for each batch, that share their bias or that are neither a
    Linear nor a convolution are left alone. A layer without bias is given one.

    Source: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias
    Correction", section 4.2 and appendix D, https://arxiv.org/abs/1906.04721.
    """

    kind: ClassVar[str] = "bias_correction"

    def apply(
        self, model: nn.Module, floats: nn.Module, outputs: InnerOutputs
    ) -> tuple[Change, ...]:
        """Correct what can be corrected; return a change for each quantized layer that ran."""
        paths = [path for path, one in model.named_modules() if isinstance(one, QuantizedModule)]
        batches, calls, means = _means(floats, paths, outputs)
        shared = Counter(
            id(bias) for one in model.modules() if (bias := one._parameters.get("bias")) is not None
        )
        changes: list[Change] = []
        for path in calls:
            layer = model.get_submodule(path)
            bias = layer._parameters.get("bias")
            reason = None
            if kind_of(layer) is None:
                reason = "it is neither a Linear nor a convolution"
            elif calls[path] > batches:
                reason = "it runs more than once"
            elif calls[path] < batches:
                reason = "it does not run for each batch"
            elif bias is not None and shared[id(bias)] > 1:
                reason = "it shares its bias"
            if reason is not None:
                changes.append(
                    Change(path, f"the bias of {path!r} is not corrected: {reason}", False)
                )
                continue
            found = _Mean()
            for tensors in outputs(model, layer):
                found.add(layer, tensors[0])
            changes.append(_correct(path, layer, means[path].value - found.value))
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
