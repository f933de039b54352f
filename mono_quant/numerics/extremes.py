"""The extremes of a tensor, as numbers that can be used."""

import math

import torch
from torch import Tensor

from mono_quant.errors import InputError


def finite_ends(low: Tensor, high: Tensor) -> tuple[float, float]:
    """Return a tensor's smallest and largest value as numbers.

    Raises:
        InputError: one is NaN or infinite, since the tensor holds such a value.
    """
    ends = torch.stack([low, high]).tolist()
    for holds, what in ((math.isnan, "NaN"), (math.isinf, "infinity")):
        if any(map(holds, ends)):
            raise InputError(f"the tensor holds {what}, so that no range covers it")
    return ends[0], ends[1]


def check_ends(low: Tensor, high: Tensor) -> None:
    """Refuse ends of a range that are not finite, or the wrong way round.

    Raises:
        InputError: they are.
    """
    least, most = finite_ends(low, high)
    if least > most:
        raise InputError(f"the smallest value is {least:g}, above the largest, {most:g}")


def all_finite(x: Tensor) -> bool:
    """Return whether there is neither NaN nor infinity in `x`."""
    # NaN and infinity are contagious, and `torch.isfinite` makes copies. A sum is read at the speed
    # of memory; that of finite values may overflow, so then the extremes tell.
    if not x.numel() or bool(torch.isfinite(x.detach().sum())):
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(x.detach()))).all())
