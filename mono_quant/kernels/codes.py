"""What fast kernels read off a weight: which ones they know, and exact sums of its codes."""

import math
import weakref
from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mono_quant.base import KernelSpec, PackedTensor
from mono_quant.numerics.packing import unpack_bits
from mono_quant.operations import MatrixProduct

_Known = tuple[tuple[int, int], "weakref.ref[Tensor]", "Constants"]

_KNOWN: MutableMapping[Tensor, _Known] = WeakIdKeyDictionary()
"""By tensor of codes: how often it and its scales were written to, these, and what was found.

A thousandth of the size of the codes.
"""

SUMS = "sums"
"""Among the tensors of a weight in a compiled trace, where they are known: sums of rows of codes,
``int32 [1, out]``.
"""

SMALLEST = 1 << 16
"""Weights of fewer values are left to the reference, where a kernel takes no fewer calls."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of inputs that fast kernels take."""


_PLACES = {"cpu": "a CPU", "cuda": "a CUDA device"}


def refuse(
    spec: KernelSpec,
    device: torch.device,
    dtype: torch.dtype,
    place: str = "cpu",
    fewest: int = SMALLEST,
) -> str | None:
    """Return why no fast kernel for a place can do `spec` for inputs of `dtype` on `device`.

    Args:
        spec: what is to be done.
        device: of the inputs.
        dtype: of the inputs.
        place: that the kernel is for: ``cpu`` or ``cuda``.
        fewest: values of a weight that it gains from.
    """
    if device.type != place:
        return f"inputs are on {device.type}, not on {_PLACES[place]}"
    if dtype not in DTYPES:
        return f"inputs are {dtype}"
    return _refuse_size(spec, fewest)


def _refuse_size(spec: KernelSpec, fewest: int) -> str | None:
    """Return why no fast kernel does `spec` wherever it is: no product with a matrix, too small."""
    if type(spec.operation) is not MatrixProduct:
        return f"it is a {type(spec.operation).__name__}, not a matrix product"
    groups, rows, length = spec.layout.stack
    if groups != 1:
        return f"the weight is a stack of {groups} matrices"
    if rows * length < fewest:
        return f"{rows} x {length} values are too few to gain from it"
    return None


def flat(x: Tensor, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return ``x [..., length]`` as contiguous rows ``[M, length]`` in `dtype`.

    Raises:
        RuntimeError: the last dimension is not `length`, as in `torch.nn.functional.linear`.
    """
    if x.dim() == 0 or x.shape[-1] != length:
        raise RuntimeError(
            f"an input {list(x.shape)} does not meet a weight whose rows are {length}"
        )
    if x.dtype == dtype and x.is_contiguous():  # calls that do nothing take time as well
        return x if x.dim() == 2 else x.view(-1, length)
    return x.reshape(-1, length).to(dtype).contiguous()


def has_finite_sum(x: Tensor) -> bool:
    """Return whether there are values, and their sum is finite: then each of them is."""
    return bool(x.numel()) and math.isfinite(x.sum(dtype=torch.float32).item())


def shaped(rows: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Return ``rows [M, out]`` with the bias added, in the leading shape and dtype of `x`."""
    if bias is not None:
        rows = rows.add_(bias.to(rows.dtype))
    if x.dim() != 2:
        rows = rows.view(*x.shape[:-1], rows.shape[-1])
    return rows if rows.dtype == x.dtype else rows.to(x.dtype)


def scales_and_zeros(weight: PackedTensor) -> tuple[Tensor, Tensor]:
    """Return the scales of an `Affine` matrix and what of its stored codes means zero.

    Returns:
        two of ``float32 [out or 1, runs]``.
    """
    scale = weight.tensors["scale"][0].to(torch.float32)
    stored = weight.tensors.get("zero_point")
    if stored is None:
        return scale, torch.full_like(scale, -weight.scheme.code_offset)
    if stored.is_floating_point():
        return scale, stored[0].to(torch.float32) - weight.scheme.code_offset
    bits = weight.scheme.code_bits or 8
    unpacked = unpack_bits(stored, bits, scale.numel())
    return scale, unpacked.to(torch.float32).reshape(scale.shape)


@dataclass(frozen=True, eq=False, slots=True)
class Constants:
    """What products of 8-bit codes need beside the codes.

    Attributes:
        sums: of each row of codes, ``int32 [1, out]``.
        scale: ``float32 [out or 1]``.
    """

    sums: Tensor
    scale: Tensor


def constants(weight: PackedTensor) -> Constants:
    """Return sums and scales of a matrix of 8-bit codes, ``int8 [1, out, in]``.

    Remembered for as long as the codes live and neither they nor the scales are written to, since
    finding the sums costs as much as a product. Writing through ``.data`` hides from that, here as
    in torch's autograd.
    """
    codes, scale = weight.tensors["codes"], weight.tensors["scale"]
    if codes.is_inference() or scale.is_inference():  # these do not count how often
        return _constants(codes, scale)
    state, known = (codes._version, scale._version), _KNOWN.get(codes)
    if known is None or known[0] != state or known[1]() is not scale:
        known = (state, weakref.ref(scale), _constants(codes, scale))
        _KNOWN[codes] = known
    return known[2]


def _constants(codes: Tensor, scale: Tensor) -> Constants:
    return Constants(sums_of(codes), scale.to(torch.float32, copy=True).flatten())


def sums_of(codes: Tensor) -> Tensor:
    """Return the sum of each row of ``int8 [1, out, in]`` codes, ``int32 [1, out]``."""
    return codes.sum(-1, dtype=torch.int32)


def remembered_bytes(codes: Tensor) -> int:
    """Return the bytes of the constants that are kept for this tensor of codes."""
    known = _KNOWN.get(codes)
    return known[2].sums.nbytes + known[2].scale.nbytes if known is not None else 0
