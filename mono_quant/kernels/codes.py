"""What fast kernels read off a weight: which ones they know, and exact sums of its codes."""

import math
from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mono_quant.base import KernelSpec, PackedTensor
from mono_quant.numerics.packing import unpack_bits
from mono_quant.operations import MatrixProduct

_SUMS: MutableMapping[Tensor, tuple[int, Tensor]] = WeakIdKeyDictionary()
"""By tensor of codes: how often it was written to, and its sums, a thousandth of its size."""

SMALLEST = 1 << 16
"""Weights of fewer values are left to the reference: the calls cost more than the arithmetic."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of inputs that fast kernels take."""


_PLACES = {"cpu": "a CPU", "cuda": "a CUDA device"}


def refuse(
    spec: KernelSpec, device: torch.device, dtype: torch.dtype, place: str = "cpu"
) -> str | None:
    """Return why no fast kernel for a place can do `spec` for inputs of `dtype` on `device`."""
    if device.type != place:
        return f"inputs are on {device.type}, not on {_PLACES[place]}"
    if dtype not in DTYPES:
        return f"inputs are {dtype}"
    return _refuse_size(spec)


def _refuse_size(spec: KernelSpec) -> str | None:
    """Return why no fast kernel does `spec` wherever it is: no product with a matrix, too small."""
    if type(spec.operation) is not MatrixProduct:
        return f"it is a {type(spec.operation).__name__}, not a matrix product"
    groups, rows, length = spec.layout.stack
    if groups != 1:
        return f"the weight is a stack of {groups} matrices"
    if rows * length < SMALLEST:
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


def row_sums(codes: Tensor) -> Tensor:
    """Return the sum of each row of ``int8 [1, out, in]`` codes as ``int32 [1, out]``.

    Remembered for as long as the tensor lives and is not written to, since finding the sums costs
    as much as a product. Writing through ``.data`` hides from that, here as in torch's autograd.
    """
    if codes.is_inference():  # it does not count how often it is written to
        return codes.sum(-1, dtype=torch.int32)
    known = _SUMS.get(codes)
    if known is None or known[0] != codes._version:
        known = (codes._version, codes.sum(-1, dtype=torch.int32))
        _SUMS[codes] = known
    return known[1]


def remembered_bytes(codes: Tensor) -> int:
    """Return the bytes of the sums that are kept for this tensor of codes."""
    known = _SUMS.get(codes)
    return known[1].nbytes if known is not None else 0
