"""Scales in half precision, where that is close enough."""

import torch
from torch import Tensor


def stored_scale(scale: Tensor, dtype: torch.dtype, step: float) -> Tensor:
    """Return float32 scales in `dtype`, or as they are where that cannot hold them.

    Held closely enough are those whose error is within the precision of `dtype` or within `step`.

    Args:
        scale: one per block.
        dtype: float16, bfloat16 or float32.
        step: an eighth of a step of the grid, as a share of its largest value.
    """
    if dtype == scale.dtype:
        return scale
    stored = scale.to(dtype)
    error = stored.to(torch.float32).sub_(scale).abs_()
    beyond = error.sub_(scale.abs(), alpha=max(torch.finfo(dtype).eps, step))
    return stored if not beyond.numel() or bool(beyond.amax() <= 0) else scale


def divisor_of(scale: Tensor) -> Tensor:
    """Return what values are divided by, ones in place of scales that are zero."""
    return scale.masked_fill(scale == 0, 1.0)
