"""What layers compute with their weights, as frozen values that kernels can read."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mono_quant.base import Operation, PackedTensor

IntTuple = tuple[int, ...]

_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}


@dataclass(frozen=True)
class MatrixProduct(Operation):
    """``x @ weight.T + bias`` for ``x [..., in]``."""

    transposed: bool = False
    """Whether the native weight is ``[in, out]``."""

    def __call__(self, x: Tensor, weight: PackedTensor, bias: Tensor | None) -> Tensor:
        """Return ``[..., out]`` in the dtype of `x`."""
        matrix = weight.dequantize(x.dtype)
        return functional.linear(x, matrix.t() if self.transposed else matrix, bias)


@dataclass(frozen=True)
class Convolution(Operation):
    """A convolution of 1 to 3 dimensions, zero-padded; `stride` has an entry for each."""

    stride: IntTuple
    padding: IntTuple | str
    dilation: IntTuple
    groups: int

    def __call__(self, x: Tensor, weight: PackedTensor, bias: Tensor | None) -> Tensor:
        """Return the convolution in the dtype of `x`."""
        convolve = _CONVOLUTIONS[len(self.stride)]
        native = weight.dequantize(x.dtype)
        return convolve(x, native, bias, self.stride, self.padding, self.dilation, self.groups)


@dataclass(frozen=True)
class TransposedConvolution(Operation):
    """A transposed convolution of 1 to 3 dimensions."""

    stride: IntTuple
    padding: IntTuple
    output_padding: IntTuple
    groups: int
    dilation: IntTuple

    def __call__(self, x: Tensor, weight: PackedTensor, bias: Tensor | None) -> Tensor:
        """Return the transposed convolution in the dtype of `x`."""
        convolve = _TRANSPOSED[len(self.stride)]
        native = weight.dequantize(x.dtype)
        return convolve(
            x,
            native,
            bias,
            self.stride,
            self.padding,
            self.output_padding,
            self.groups,
            self.dilation,
        )


@dataclass(frozen=True)
class Lookup(Operation):
    """Rows of the weight by index: only the rows that are asked for are dequantized."""

    def __call__(self, x: Tensor, weight: PackedTensor, bias: Tensor | None) -> Tensor:
        """Return ``[*x.shape, in]`` for integer indices `x`, in the dtype of the layer."""
        if x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"indices are int32 or int64, not {x.dtype}")
        return weight.rows(x)
