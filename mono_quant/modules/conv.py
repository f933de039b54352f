"""Quantized convolutions."""

from typing import cast

from torch import Tensor, nn
from torch.nn import functional

from mono_quant.modules.layer import QuantizedLayer
from mono_quant.operations import Convolution, IntTuple, TransposedConvolution

_STANDS_IN = "_stands_in"  # marks a decoded weight that may be exchanged for the quantized one


def _per_dim(value: IntTuple | int, dims: int) -> IntTuple:
    """Return an attribute that torch takes as one number, a list or a tuple, as one per dim."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


class _QuantizedConv(QuantizedLayer, nn.modules.conv._ConvNd):
    """What convolutions of all dimensions share."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of `input`."""
        own = type(self)._conv_forward is not _QuantizedConv._conv_forward
        given = self._stand_in(self.float_weight()) if own else None
        return self._conv_forward(input, given, self.bias)

    def _stand_in(self, weight: Tensor) -> Tensor:
        """Return the decoded weight, known again when a subclass hands it on to `_conv_forward`.

        What it hands on unchanged is the quantized weight of this layer, or one that is tied to it;
        what it computed, and another layer's weight, is taken as it is.
        """
        setattr(weight, _STANDS_IN, self._mark())
        return weight

    def _mark(self) -> Tensor:
        """Return what is one object for each quantized weight, which compilers need not know."""
        return self._holder("weight").get_buffer("_like")

    def _conv_forward(  # no weight means the quantized one
        self, input: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        if weight is not None and getattr(weight, _STANDS_IN, None) is not self._mark():
            return super()._conv_forward(input, weight, bias)
        dims = len(self.kernel_size)
        padding: IntTuple | int | str = self.padding
        if self.padding_mode != "zeros":
            around = self._reversed_padding_repeated_twice
            input = functional.pad(input, around, mode=self.padding_mode)
            padding = 0
        zeros = padding if isinstance(padding, str) else _per_dim(padding, dims)
        stride, dilation = _per_dim(self.stride, dims), _per_dim(self.dilation, dims)
        operation = Convolution(stride, zeros, dilation, self.groups)
        return self.run(operation, input, bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # a parameter there, computed here
        """A float copy of the weight."""
        return self._stand_in(self.float_weight())


class QuantizedConv1d(_QuantizedConv, nn.Conv1d):
    """`torch.nn.Conv1d` with a quantized weight."""

    float_class = nn.Conv1d


class QuantizedConv2d(_QuantizedConv, nn.Conv2d):
    """`torch.nn.Conv2d` with a quantized weight."""

    float_class = nn.Conv2d


class QuantizedConv3d(_QuantizedConv, nn.Conv3d):
    """`torch.nn.Conv3d` with a quantized weight."""

    float_class = nn.Conv3d


class _QuantizedConvTranspose(QuantizedLayer, nn.modules.conv._ConvTransposeNd):
    """What transposed convolutions of all dimensions share."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return the transposed convolution of `input`, of `output_size` where that is given."""
        output_padding = self._output_padding(
            input,
            output_size,
            list(self.stride),
            list(cast("IntTuple", self.padding)),  # a transposed convolution has no named padding
            list(self.kernel_size),
            len(self.kernel_size),
            list(self.dilation),
        )
        operation = TransposedConvolution(
            self.stride,
            cast("IntTuple", self.padding),
            tuple(output_padding),
            self.groups,
            self.dilation,
        )
        return self.run(operation, input, self.bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # a parameter there, computed here
        """A float copy of the weight."""
        return self.float_weight()


class QuantizedConvTranspose1d(_QuantizedConvTranspose, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` with a quantized weight."""

    float_class = nn.ConvTranspose1d


class QuantizedConvTranspose2d(_QuantizedConvTranspose, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` with a quantized weight."""

    float_class = nn.ConvTranspose2d


class QuantizedConvTranspose3d(_QuantizedConvTranspose, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` with a quantized weight."""

    float_class = nn.ConvTranspose3d
