"""Measures of the damage."""

import math
from collections.abc import Callable, Iterable, Mapping

import attrs
import torch
from torch import Tensor

from mono_quant.errors import InputError

_PART = 1 << 16
"""Values that are compared at a time: with their copies in float64, what a core's cache holds."""


@attrs.frozen
class SquaredError:
    """Sums of squares of a reference and of the error against it: a fold, to be streamed.

    Attributes:
        signal: sum of the squared reference values.
        noise: sum of the squared differences.
        count: how many values were compared.
    """

    signal: float = 0.0
    noise: float = 0.0
    count: int = 0

    @classmethod
    def between(cls, reference: Tensor, other: Tensor) -> "SquaredError":
        """Return the sums over all elements of two tensors of one shape.

        Squared and added up in float64: float32 has no squares of values near 1e-22 or 1e20. A part
        at a time, so that no copy of the tensors is made.

        Raises:
            InputError: the shapes differ.
        """
        if reference.shape != other.shape:
            raise InputError(
                f"{tuple(other.shape)} cannot be compared with {tuple(reference.shape)}"
            )
        signal = noise = torch.zeros((), dtype=torch.float64, device=reference.device)
        flat = reference.detach().reshape(-1), other.detach().reshape(-1)
        for part, against in zip(*(torch.split(tensor, _PART) for tensor in flat), strict=True):
            exact = part.to(torch.float64)
            error = exact - against.to(torch.float64)
            signal, noise = signal + exact.dot(exact), noise + error.dot(error)
        return cls(float(signal), float(noise), reference.numel())

    def __add__(self, other: "SquaredError") -> "SquaredError":
        """Return the sums over both."""
        return SquaredError(
            self.signal + other.signal, self.noise + other.noise, self.count + other.count
        )

    @classmethod
    def total(cls, parts: Iterable["SquaredError"]) -> "SquaredError":
        """Return the sums over all parts."""
        return sum(parts, cls())

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise ratio in dB: ``10 log10(signal / noise)``.

        Infinite where there is no noise; nan where something was not finite.
        """
        if math.isnan(self.noise) or math.isnan(self.signal):
            return math.nan
        if self.noise == 0:
            return math.inf
        if self.signal == 0 or math.isinf(self.noise):
            return -math.inf
        return 10 * math.log10(self.signal / self.noise)


def sqnr_db(reference: Tensor, other: Tensor) -> float:
    """Return the signal to quantization noise ratio of `other` against `reference`, in dB.

    ``10 log10(sum(reference ** 2) / sum((reference - other) ** 2))``; infinite for equal tensors.
    """
    return SquaredError.between(reference, other).sqnr_db


def memory_of(tensor: Tensor) -> tuple[object, ...]:
    """Return what tied tensors have in common: their memory and how they read it."""
    if tensor.layout != torch.strided or not tensor.numel():
        return (id(tensor),)
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


_BY_ROWS = (Tensor.values, Tensor.crow_indices, Tensor.col_indices)
_BY_COLUMNS = (Tensor.values, Tensor.ccol_indices, Tensor.row_indices)
_PARTS: Mapping[torch.layout, tuple[Callable[[Tensor], Tensor], ...]] = {
    torch.sparse_coo: (Tensor._values, Tensor._indices),
    torch.sparse_csr: _BY_ROWS,
    torch.sparse_bsr: _BY_ROWS,
    torch.sparse_csc: _BY_COLUMNS,
    torch.sparse_bsc: _BY_COLUMNS,
}


def tensor_bytes(tensor: Tensor) -> int:
    """Return the bytes of the elements of `tensor`, whatever its storage holds beside.

    Of a sparse one, those of its values and of the indices that place them.
    """
    parts = _PARTS.get(tensor.layout)
    if parts is not None:
        return sum(tensor_bytes(part(tensor)) for part in parts)
    return tensor.numel() * tensor.element_size()


def times_written(tensor: Tensor) -> int:
    """Return how often a tensor was written to; 0 where torch does not count it."""
    return 0 if tensor.is_inference() else tensor._version
