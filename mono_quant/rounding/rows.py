"""Rows of two forms of one weight."""

from dataclasses import replace

import torch
from torch import Tensor

from mono_quant.numerics.columns import as_bytes
from mono_quant.numerics.values import QTensor


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
