"""What layers compute with their weights, as frozen values that kernels can read."""

import math
from dataclasses import dataclass
from typing import ClassVar

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


def wide(x: Tensor) -> Tensor:
    """Return a floating tensor; of half precision on a CPU in float32, where arithmetic is faster.

    Products of bfloat16 are several times slower than those of float32 on processors without the
    instructions, and torch 2.13 dies of an illegal one on some.

    Raises:
        TypeError: it holds no floats.
    """
    if not x.is_floating_point():
        raise TypeError(f"the input is {x.dtype}, where a floating dtype was expected")
    half = x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16)
    return x.float() if half else x


def widened(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return an input that is wide enough to compute with, and the bias in its dtype."""
    x = wide(x)
    return x, bias.to(x.dtype) if bias is not None else None


def _samples(x: Tensor, spatial: int) -> Tensor:
    """Return ``[N, C, *spatial]`` as ``[N, -1]``, and an unbatched ``[C, *spatial]`` as one row."""
    return x.flatten(1) if x.dim() == spatial + 2 else x.reshape(1, -1)


@dataclass(frozen=True)
class MatrixProduct(Operation):
    """``x @ weight.T + bias`` for ``x [..., in]``."""

    transposed: bool = False
    """Whether the native weight is ``[in, out]``."""

    def __call__(self, x: Tensor, weight: PackedTensor, bias: Tensor | None) -> Tensor:
        """Return ``[..., out]`` in the dtype of `x`."""
        wide, bias = widened(x, bias)
        matrix = weight.dequantize(wide.dtype)
        product = functional.linear(wide, matrix.t() if self.transposed else matrix, bias)
        return product.to(x.dtype)


@dataclass(frozen=True)
class PartialProduct(Operation):
    """``x @ weight[start:stop].T + bias``: only those rows of the weight are dequantized."""

    reads_rows: ClassVar[bool] = True

    start: int
    stop: int

    def __call__(self, x: Tensor, weight: PackedTensor, bias: Tensor | None) -> Tensor:
        """Return ``[..., stop - start]`` in the dtype of `x`."""
        wide, bias = widened(x, bias)
        places = torch.arange(self.start, self.stop, device=x.device)
        return functional.linear(wide, weight.rows(places, wide.dtype), bias).to(x.dtype)


@dataclass(frozen=True, eq=False, slots=True)
class BilinearProduct(Operation):
    """``x @ A @ other`` for each matrix A of a weight ``[out, in1, in2]``."""

    other: Tensor
    """The second input, ``[..., in2]``, of the dtype and leading dimensions of the first."""

    def __call__(self, x: Tensor, weight: PackedTensor, bias: Tensor | None) -> Tensor:
        """Return ``[..., out]`` for ``x [..., in1]``, in its dtype."""
        other = wide(self.other)
        first, bias = widened(x, bias)
        matrices = weight.dequantize(first.dtype)
        return functional.bilinear(first, other, matrices, bias).to(x.dtype)


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
        wide, bias = widened(x, bias)
        native = weight.dequantize(wide.dtype)
        result = convolve(wide, native, bias, self.stride, self.padding, self.dilation, self.groups)
        return result.to(x.dtype)

    def rows(self, x: Tensor) -> Tensor:
        """Return ``[N, C * positions]``: a row for each sample."""
        return _samples(x, len(self.stride))

    def count(self, x: Tensor) -> int:
        """Return the positions of the output, but for what padding adds and the kernel takes."""
        spatial = len(self.stride)
        if x.dim() < spatial:
            return 1
        sizes = zip(x.shape[-spatial:], self.stride, strict=True)
        positions = math.prod([-(-size // stride) for size, stride in sizes])
        return positions * (x.shape[0] if x.dim() == spatial + 2 else 1)


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
        wide, bias = widened(x, bias)
        result = convolve(
            wide,
            weight.dequantize(wide.dtype),
            bias,
            self.stride,
            self.padding,
            self.output_padding,
            self.groups,
            self.dilation,
        )
        return result.to(x.dtype)

    def rows(self, x: Tensor) -> Tensor:
        """Return ``[N, C * positions]``: a row for each sample."""
        return _samples(x, len(self.stride))


@dataclass(frozen=True)
class Lookup(Operation):
    """Rows of the weight by index: only the rows that are asked for are dequantized."""

    reads_rows: ClassVar[bool] = True

    def __call__(self, x: Tensor, weight: PackedTensor, bias: Tensor | None) -> Tensor:
        """Return ``[*x.shape, in]`` for integer indices `x`, in the dtype of the layer."""
        if x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"indices are int32 or int64, not {x.dtype}")
        return weight.rows(x)
