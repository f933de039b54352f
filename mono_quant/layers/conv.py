"""Convolutions, plain and transposed, of 1 to 3 dimensions."""

import math
from abc import abstractmethod
from typing import ClassVar, cast

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional

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

    @abstractmethod
    def rows(self, layer: nn.Module, name: str, x: Tensor) -> Tensor:
        """Return what each output position sees, ``[groups, n, in / groups * kernel]``."""

    def sharing_range(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return ``[N, in * positions]``: a row for each sample."""
        conv = cast("nn.modules.conv._ConvNd", layer)  # `matches` has seen to it
        return _batched(conv, x).flatten(1)

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

    def rows(self, layer: nn.Module, name: str, x: Tensor) -> Tensor:
        """Return what each output position sees, ``[groups, n, in / groups * kernel]``."""
        conv = cast("nn.modules.conv._ConvNd", layer)  # `matches` has seen to it
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        padded = functional.pad(_batched(conv, x), conv._reversed_padding_repeated_twice, mode)
        return _unfolded(padded, conv.kernel_size, conv.stride, conv.dilation, conv.groups)

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

    def rows(self, layer: nn.Module, name: str, x: Tensor) -> Tensor:
        """Return what each output position sees, ``[groups, n, in / groups * kernel]``.

        A transposed convolution is one with the kernel turned round, over the input with zeros
        between its positions.
        """
        conv = cast("nn.modules.conv._ConvTransposeNd", layer)  # `matches` has seen to it
        batch = _batched(conv, x)
        sizes = [
            (size - 1) * step + 1 for size, step in zip(batch.shape[2:], conv.stride, strict=True)
        ]
        spread = batch.new_zeros(*batch.shape[:2], *sizes)
        every = tuple(slice(None, None, step) for step in conv.stride)
        spread[(slice(None), slice(None), *every)] = batch
        around: list[int] = []
        for place in reversed(range(len(sizes))):
            padding = cast("tuple[int, ...]", conv.padding)[place]
            reach = conv.dilation[place] * (conv.kernel_size[place] - 1) - padding
            around += [reach, reach + conv.output_padding[place]]
        padded = functional.pad(spread, around)  # cut off where it is negative
        ones = (1,) * len(sizes)
        return _unfolded(padded, conv.kernel_size, ones, conv.dilation, conv.groups, turned=True)


def _least_input(conv: nn.modules.conv._ConvNd) -> tuple[int, ...]:
    """Return the shape of one sample that any padding mode can pad, for one position or more."""
    around = max(conv._reversed_padding_repeated_twice)
    reach = zip(conv.dilation, conv.kernel_size, strict=True)
    return (1, conv.in_channels, *(step * (size - 1) + 1 + around for step, size in reach))


def _batched(conv: nn.modules.conv._ConvNd, x: Tensor) -> Tensor:
    """Return an input as ``[N, in, *positions]``, with N where a single sample had none."""
    return x if x.dim() == len(conv.kernel_size) + 2 else x.unsqueeze(0)


def _unfolded(
    padded: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    *,
    turned: bool = False,
) -> Tensor:
    """Return what a kernel meets at each position, ``[groups, n, in / groups * kernel]``."""
    windows = padded
    for place, (size, step, apart) in enumerate(zip(kernel, stride, dilation, strict=True)):
        windows = windows.unfold(2 + place, apart * (size - 1) + 1, step)
        windows = windows[..., ::apart]
    if turned:
        windows = windows.flip(tuple(range(-len(kernel), 0)))
    samples, channels = windows.shape[:2]
    grouped = windows.reshape(samples, groups, channels // groups, *windows.shape[2:])
    count = len(kernel)
    order = (1, 0, *range(3, 3 + count), 2, *range(3 + count, 3 + 2 * count))
    return grouped.permute(order).reshape(groups, -1, channels // groups * math.prod(kernel))
