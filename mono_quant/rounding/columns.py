"""Parameters of single columns of a stack of matrices, and rows of two forms of one."""

from dataclasses import replace

import torch
from torch import Tensor

from mono_quant.numerics.values import QParams, QTensor


def columns_of(qparams: QParams, order: Tensor) -> list[QParams]:
    """Return the parameters of each column ``[G, out, 1]`` of a stack, in an order.

    Args:
        qparams: of a stack ``[G, out, in]``.
        order: the columns of each matrix, ``int64 [G, in]``.
    """
    matrices, rows, length = qparams.block_size
    count = order.shape[1]

    def taken(parts: Tensor | None) -> list[Tensor | None]:
        if parts is None:
            return [None] * count
        if parts.shape[2] == 1:
            return [parts] * count
        each = as_bytes(parts).repeat_interleave(matrices, dim=0)
        places = torch.div(order, length, rounding_mode="floor").unsqueeze(1)
        found = each.gather(2, places.expand(-1, each.shape[1], -1))
        return list(found.permute(2, 0, 1).contiguous().unsqueeze(3).view(parts.dtype).unbind())

    scales, zero_points = taken(qparams.scale), taken(qparams.zero_point)
    if qparams.scale is not None and qparams.scale.shape[2] > 1:
        matrices = 1
    block = (matrices, rows, 1)
    pairs = zip(scales, zero_points, strict=True)
    return [QParams(scale, zero_point, block, qparams.extra) for scale, zero_point in pairs]


def as_bytes(parts: Tensor) -> Tensor:
    """Return floats of 8 bits as bytes, which torch can move about, and all else as it is."""
    return parts.view(torch.uint8) if parts.element_size() == 1 else parts


def rows_where(where: Tensor, one: QTensor, other: QTensor) -> QTensor:
    """Return rows of one form of a weight where so, and of another elsewhere.

    Args:
        where: bool, ``[G, out, 1]``.
        one: on a grid whose zero points are those of `other`, and where rows share scales, these.
        other: another form.
    """
    codes = _chosen(where, one.codes, other.codes)
    left, right = one.qparams.scale, other.qparams.scale
    if left is right or left is None or right is None:
        return QTensor(codes, other.qparams, other.dtype)
    qparams = replace(other.qparams, scale=_chosen(where, left, right))
    return QTensor(codes, qparams, other.dtype)


def _chosen(where: Tensor, one: Tensor, other: Tensor) -> Tensor:
    wide = one.dtype if one.dtype == other.dtype else torch.promote_types(one.dtype, other.dtype)
    found = torch.where(where, as_bytes(one.to(wide)), as_bytes(other.to(wide)))
    return found.view(wide)
