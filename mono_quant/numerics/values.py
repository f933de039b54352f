"""Frozen values that pass between strategies: quantization parameters and quantized tensors.

Values that are made while a layer runs are dataclasses, where the rest of the package uses attrs:
`torch.compile` traces the making of a frozen dataclass, and not that of a frozen attrs class.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import attrs
import torch
from torch import Tensor

from mono_quant.numerics.granularity import Shape


def _no_extra() -> Mapping[str, Tensor]:
    return {}


@dataclass(frozen=True, eq=False, slots=True)
class QParams:
    """What turns codes into values.

    Attributes:
        scale: one per block, ``[n0, n1, ...]`` for a tensor cut into n0 x n1 x ... blocks; None
            where a scheme has no scale (a cast).
        zero_point: the code that means zero (an integer tensor shaped like `scale`), or a float in
            the scale's dtype, or None for a symmetric grid.
        block_size: the block of values that shares one scale, a size per dimension.
        extra: what else a scheme needs, by name: of the whole tensor where it is a vector or a
            single value (a codebook, a global scale).
    """

    scale: Tensor | None
    zero_point: Tensor | None
    block_size: Shape
    extra: Mapping[str, Tensor] = field(default_factory=_no_extra)

    @property
    def by_rows(self) -> bool:
        """Whether no two rows of a stack ``[G, out, in]`` share a scale.

        What `extra` has beside vectors, of the whole tensor, might be of rows in a way of its own.
        """
        vectors = all(tensor.dim() < 2 for tensor in self.extra.values())
        return vectors and (self.scale is None or self.block_size[:2] == (1, 1))

    def rows(self, part: slice) -> "QParams":
        """Return the parameters of some rows of a stack, where they are `by_rows`."""
        scale = self.scale[:, part] if self.scale is not None else None
        zero_point = self.zero_point[:, part] if self.zero_point is not None else None
        return QParams(scale, zero_point, self.block_size, self.extra)


@dataclass(frozen=True, eq=False, slots=True)
class QTensor:
    """A quantized tensor: unpacked codes and what turns them into values.

    Attributes:
        codes: integers (or low-precision floats for a cast), of the tensor's shape.
        qparams: what turns codes into values.
        dtype: the floating dtype of the tensor that was quantized, and of what `dequantize`
            returns.
    """

    codes: Tensor
    qparams: QParams
    dtype: torch.dtype

    @property
    def shape(self) -> Shape:
        """The shape of the tensor."""
        return tuple(self.codes.shape)

    def rows(self, part: slice) -> "QTensor":
        """Return some rows of a stack whose parameters are `by_rows`."""
        return QTensor(self.codes[:, part], self.qparams.rows(part), self.dtype)


@attrs.frozen
class Layout:
    """How a native weight is read as a stack of matrices ``[G, out, in]``, and put back.

    The native tensor is reshaped to `split`, its dimensions are put in `order`, and the result is
    reshaped to `stack`.

    Attributes:
        native: shape of the weight as its layer holds it.
        split: shape with the dimensions to be moved apart.
        order: permutation of the dimensions of `split`.
        stack: ``(G, out, in)``.
    """

    native: Shape
    split: Shape
    order: Shape
    stack: Shape

    @classmethod
    def grouped(cls, native: Shape, groups: int = 1) -> "Layout":
        """Return the layout of a weight ``[out, in / G, *kernel]``: a Linear or convolution."""
        rows, columns = native[0] // groups, _product(native[1:])
        stack = (groups, rows, columns)
        return cls(native, stack, (0, 1, 2), stack)

    @classmethod
    def transposed(cls, native: Shape, groups: int = 1) -> "Layout":
        """Return the layout of a weight ``[in, out / G, *kernel]``: a transposed convolution."""
        inputs, outputs, kernel = native[0] // groups, native[1], _product(native[2:])
        split = (groups, inputs, outputs, kernel)
        return cls(native, split, (0, 2, 1, 3), (groups, outputs, inputs * kernel))

    def to_stack(self, weight: Tensor) -> Tensor:
        """Return the native `weight` as ``[G, out, in]``."""
        return weight.reshape(self.split).permute(self.order).reshape(self.stack)

    def to_native(self, stack: Tensor) -> Tensor:
        """Return a stack ``[G, out, in]`` in the native shape, contiguous."""
        moved = stack.reshape([self.split[place] for place in self.order])
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return moved.permute(back).reshape(self.native).contiguous()


@dataclass(frozen=True, eq=False, slots=True)
class WeightView:
    """A layer's weight and how to read it as a stack of matrices ``[G, out, in]``.

    G is the number of groups of a grouped convolution, of experts or gates; 1 otherwise.
    Granularity, rounding, statistics and files see only the stack.

    Attributes:
        native: the weight as its layer holds it.
        layout: the reshape to the stack and back.
    """

    native: Tensor
    layout: Layout

    def stack(self) -> Tensor:
        """Return the weight as ``[G, out, in]`` in float32: a view where it can be one."""
        return self.layout.to_stack(self.native.detach()).to(torch.float32)


def _product(sizes: Shape) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
