"""A fixed orthogonal matrix that spreads each channel of a block evenly over all of them."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

SIZES = (128, 64, 32, 16)
"""Channels of a block, the largest first. Smaller blocks spread too little."""


def block_of(channels: int) -> int | None:
    """Return the largest block that divides so many channels; None without any."""
    return next((size for size in SIZES if channels and channels % size == 0), None)


def rotated(x: Tensor) -> Tensor:
    """Return ``x [..., channels]`` with every block of channels turned by the matrix.

    Computed in float32, of float64 in float64; in the dtype of `x`. A product stays what it was if
    both factors are turned.

    The matrix is ``diag(s) @ H / sqrt(n)``: H is Sylvester's Hadamard matrix, of entries 1 and -1,
    and s the Rudin-Shapiro sequence of signs, whose spectrum is flat: what all channels have in
    common is spread as evenly as what one has alone. Sources: Ashkboos et al. 2024, "QuaRot",
    https://arxiv.org/abs/2404.00456; Rudin 1959, "Some Theorems on Fourier Coefficients",
    https://doi.org/10.2307/2033608.

    Args:
        x: whose last dimension `block_of` knows.
    """
    size = block_of(x.shape[-1])
    assert size is not None  # the caller has asked
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    blocks = x.to(dtype).reshape(*x.shape[:-1], x.shape[-1] // size, size)
    return torch.matmul(blocks, _matrix(size, dtype, x.device)).reshape(x.shape).to(x.dtype)


def matrix_of(size: int) -> Tensor:
    """Return the matrix for blocks of `size` channels, a power of two, ``float64 [size, size]``."""
    place = torch.arange(size, device="cpu")
    signs = _parity(place & place >> 1)
    hadamard = _parity(place[:, None] & place)
    return (signs[:, None] * hadamard).to(torch.float64) / math.sqrt(size)


def _matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `matrix_of` where it is needed; copied to another device once."""
    here = _MATRICES[size, dtype]
    if device.type == "cpu":
        return here
    key = (size, dtype, device)
    found = _ELSEWHERE.get(key)
    if found is None:
        with torch.inference_mode(False):
            found = here.to(device)
        if type(found) is Tensor and not torch.compiler.is_compiling():  # no trace's
            _ELSEWHERE[key] = found
    return found


def _parity(numbers: Tensor) -> Tensor:
    """Return 1 where a number below 256 has an even count of bits, else -1."""
    for half in (4, 2, 1):
        numbers = numbers ^ numbers >> half
    return 1 - 2 * (numbers & 1)


with torch.inference_mode(False):
    _MATRICES: Mapping[tuple[int, torch.dtype], Tensor] = {
        (size, dtype): matrix.to(dtype)
        for size, matrix in ((size, matrix_of(size)) for size in SIZES)
        for dtype in (torch.float32, torch.float64)
    }

_ELSEWHERE: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
