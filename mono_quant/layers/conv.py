"""Convolutions, plain and transposed, of 1 to 3 dimensions."""

from typing import ClassVar, cast

import attrs
import torch
from torch import nn

from mono_quant.configurable import register
from mono_quant.layers.reaching import gives_weight, meets_weight
from mono_quant.layers.single import ProductQuantizer, weight_shape
from mono_quant.modules import (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvTranspose1d,
    QuantizedConvTranspose2d,
    QuantizedConvTranspose3d,
)
from mono_quant.numerics.values import Layout

_CODES = "graph() passes codes on, where inputs are static"


class _ConvolvingQuantizer(ProductQuantizer):
    """A layer whose input is ``[N, in, *positions]``."""

    def channel_dim(self, layer: nn.Module, name: str) -> int:
        """Return the one before the positions."""
        conv = cast("nn.modules.conv._ConvNd", layer)  # `matches` has seen to it
        return -1 - len(conv.kernel_size)


@register
@attrs.frozen
class ConvQuantizer(_ConvolvingQuantizer):
    """`torch.nn.Conv1d`, `Conv2d`, `Conv3d`, grouped and depthwise too.

    A row is what one output channel sees: ``in_channels / groups * kernel`` values. Subclasses keep
    their own forward, as those that pad and then call ``super().forward``.
    """

    kind: ClassVar[str] = "conv"
    slowed: ClassVar[str | None] = (
        "its product runs in integers where a measurement finds that faster, and elsewhere in "
        f"float and slower than before; {_CODES}"
    )
    float_classes: ClassVar = {
        nn.Conv1d: QuantizedConv1d,
        nn.Conv2d: QuantizedConv2d,
        nn.Conv3d: QuantizedConv3d,
    }

    def layout(self, layer: nn.Module) -> Layout:
        """Return ``[groups, out / groups, in / groups * kernel]``."""
        conv = cast("nn.modules.conv._ConvNd", layer)  # `matches` has seen to it
        shape = (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)
        return Layout.grouped(weight_shape(layer, shape), conv.groups)

    def refuse_activation(self, layer: nn.Module, name: str, mode: str) -> str | None:
        """Return also that a subclass makes another weight of its own, which it tries once."""
        if reason := _ConvolvingQuantizer.refuse_activation(self, layer, name, mode):
            return reason
        known, cls = self._classes(layer)[0], type(layer).__name__
        if not self._keeps_own_forward(layer) or not gives_weight(layer, known):
            return None
        conv = cast("nn.modules.conv._ConvNd", layer)  # `matches` has seen to it
        like = next(layer.parameters())
        weight = torch.ones(self.layout(layer).native, dtype=like.dtype, device=like.device)
        try:
            met = meets_weight(layer, known, weight.new_zeros(_least_input(conv)), weight)
        except Exception as error:  # of anybody's code
            return f"what reaches the weight is not known: {cls} failed on a blank input: {error}"
        return None if met else f"{cls} convolves with a weight that it computes itself"


@register
@attrs.frozen
class ConvTransposeQuantizer(_ConvolvingQuantizer):
    """`torch.nn.ConvTranspose1d`, `ConvTranspose2d`, `ConvTranspose3d`, grouped too.

    A row holds every value that reaches one output channel.
    """

    kind: ClassVar[str] = "conv_transpose"
    slowed: ClassVar[str | None] = f"its product is computed in float, slower than before; {_CODES}"
    float_classes: ClassVar = {
        nn.ConvTranspose1d: QuantizedConvTranspose1d,
        nn.ConvTranspose2d: QuantizedConvTranspose2d,
        nn.ConvTranspose3d: QuantizedConvTranspose3d,
    }

    def layout(self, layer: nn.Module) -> Layout:
        """Return ``[groups, out / groups, in / groups * kernel]``."""
        conv = cast("nn.modules.conv._ConvNd", layer)  # `matches` has seen to it
        shape = (conv.in_channels, conv.out_channels // conv.groups, *conv.kernel_size)
        return Layout.transposed(weight_shape(layer, shape), conv.groups)


def _least_input(conv: nn.modules.conv._ConvNd) -> tuple[int, ...]:
    """Return the shape of one sample that any padding mode can pad, for one position or more."""
    around = max(conv._reversed_padding_repeated_twice)
    reach = zip(conv.dilation, conv.kernel_size, strict=True)
    return (1, conv.in_channels, *(step * (size - 1) + 1 + around for step, size in reach))
