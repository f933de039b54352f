"""Convolutions, plain and transposed, of 1 to 3 dimensions."""

from typing import ClassVar, cast

import attrs
from torch import nn

from mono_quant.configurable import register
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


@attrs.frozen
class _ConvolvingQuantizer(ProductQuantizer):
    """A layer whose input is ``[N, in, *positions]``."""

    slowed: ClassVar[str | None] = (
        "its product is computed in float while the model keeps its class, slower than before; "
        "graph() passes codes on, where inputs are static"
    )

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


@register
@attrs.frozen
class ConvTransposeQuantizer(_ConvolvingQuantizer):
    """`torch.nn.ConvTranspose1d`, `ConvTranspose2d`, `ConvTranspose3d`, grouped too.

    A row holds every value that reaches one output channel.
    """

    kind: ClassVar[str] = "conv_transpose"
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
