"""Parameters of single columns of a stack of matrices."""

from collections.abc import Callable

import torch
from torch import Tensor

from mono_quant.numerics.granularity import Shape
from mono_quant.numerics.values import QParams

ByColumn = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""Takes values ``[G, out]`` and the place of their columns; returns codes and float32 values."""


def per_column(parts: Tensor, block_size: Shape, order: Tensor) -> list[Tensor]:
    """Return what each column of a stack ``[G, out, in]`` has of values per block, in an order.

    Views where one matrix is all there is, so that nothing is spread over the values of a block.

    Args:
        parts: a value per block, ``[n0, n1, n2]``.
        block_size: of the stack.
        order: the columns of each matrix, ``int64 [G, in]``.

    Returns:
        tensors ``[G, out]``, or of ones in place of what shares values.
    """
    matrices, _, length = block_size
    count, columns = order.shape
    if parts.shape[2] == 1:
        return [parts.squeeze(2)] * columns
    blocks = as_bytes(parts).permute(2, 0, 1).contiguous()
    places = torch.div(order, length, rounding_mode="floor").mT
    if count == 1:
        found = blocks.view(parts.dtype).unbind()
        return [found[place] for place in places.flatten().tolist()]
    blocks = blocks.repeat_interleave(matrices, dim=1)
    each = blocks.gather(0, places.unsqueeze(2).expand(-1, -1, blocks.shape[2]))
    return list(each.view(parts.dtype).unbind())


def columns_of(qparams: QParams, order: Tensor) -> list[QParams]:
    """Return the parameters of each column ``[G, out, 1]`` of a stack, in an order.

    Args:
        qparams: of a stack ``[G, out, in]``.
        order: the columns of each matrix, ``int64 [G, in]``.
    """
    matrices, rows, _ = qparams.block_size

    def taken(parts: Tensor | None) -> list[Tensor | None]:
        if parts is None:
            return [None] * order.shape[1]
        return [one.unsqueeze(2) for one in per_column(parts, qparams.block_size, order)]

    scales, zero_points = taken(qparams.scale), taken(qparams.zero_point)
    if qparams.scale is not None and qparams.scale.shape[2] > 1:
        matrices = 1
    block = (matrices, rows, 1)
    pairs = zip(scales, zero_points, strict=True)
    return [QParams(one, zero, block, qparams.extra) for one, zero in pairs]


def as_bytes(parts: Tensor) -> Tensor:
    """Return floats of 8 bits as bytes, which torch can move about, and all else as it is."""
    return parts.view(torch.uint8) if parts.element_size() == 1 else parts
