"""Scales that fit given codes best."""

import torch
from torch import Tensor

from mono_quant.base import Scheme
from mono_quant.learning import levels_of
from mono_quant.numerics.values import QTensor

_AT_ONCE = 1 << 22
"""Elements of normal equations that are solved at once."""

_PULL = 1e-3
"""How strongly a scale is held where it is, against what would move it: its own curvature is 1."""

_REACH = 2.0
"""By what factor a scale moves at most."""


def fit_scales(met: Tensor, scheme: Scheme, q: QTensor, moments: Tensor) -> QTensor | None:
    """Return `q` with the scales that leave the least error of the layer's output for its codes.

    Of each row, all scales at once, by least squares. None where values are not levels times
    scales, or where rows share them.

    Args:
        met: the weight times `moments`, ``float32 [G, out, in]``.
        scheme: its grid.
        q: the weight on it.
        moments: second moments of inputs, ``[G, in, in]``.
    """
    before = scheme.scales(q.qparams)
    if before is None or q.qparams.block_size[:2] != (1, 1):
        return None
    levels = levels_of(scheme, q, before)
    wanted = torch.empty_like(before)
    at_once = max(1, _AT_ONCE // before.shape[2] ** 2)
    for place in range(met.shape[0]):
        for start in range(0, met.shape[1], at_once):
            rows = slice(start, start + at_once)
            wanted[place, rows] = _solved(
                met[place, rows], levels[place, rows], before[place, rows], moments[place]
            )
    grown = wanted / before  # NaN where a scale is zero
    fits = (grown > 1 / _REACH) & (grown < _REACH)
    found = scheme.rescaled(q.qparams, torch.where(fits, wanted, before))
    return QTensor(q.codes, found, q.dtype)


def _solved(met: Tensor, levels: Tensor, before: Tensor, moments: Tensor) -> Tensor:
    """Return the scales ``[rows, n]`` of rows of levels ``[rows, in]`` that are nearest to weights.

    With C the levels of one group and zero elsewhere, the normal equations have ``C_k H C_l`` for
    their matrix, which is symmetric, and ``C_k H w`` for their right side.
    """
    count, groups = before.shape
    length = levels.shape[1] // groups
    matrix = levels.new_empty(count, groups, groups)
    for k in range(groups):
        start, end = k * length, (k + 1) * length
        onward = (levels[:, start:end] @ moments[start:end, start:]).mul_(levels[:, start:])
        matrix[:, k, k:] = onward.view(count, groups - k, length).sum(2)
        matrix[:, k + 1 :, k] = matrix[:, k, k + 1 :]
    right = (met * levels).view(count, groups, length).sum(2)
    diagonal = matrix.diagonal(dim1=1, dim2=2)  # a view
    pull = diagonal * _PULL + torch.finfo(torch.float32).tiny
    right += pull * before
    diagonal += pull
    solution: Tensor = torch.linalg.solve(matrix.double(), right.double())
    return solution.to(torch.float32)
