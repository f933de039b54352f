"""Products of quantized inputs with 8-bit weights that FBGEMM has packed."""

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, final

import attrs
import torch
from torch import Tensor

from mono_quant.base import Activation, Arranged, ArrangingKernel, KernelSpec, PackedTensor
from mono_quant.kernels import fbgemm
from mono_quant.kernels.blocks import BLOCKS
from mono_quant.kernels.codes import flat, refuse, shaped
from mono_quant.kernels.digits import are_finite, grids_of_few, is_usual, one_grid
from mono_quant.kernels.integer import refuse_inputs, refuse_weight
from mono_quant.kernels.ops import unfollowed
from mono_quant.schemes import Affine

_PIECE = 1 << 26  # codes that are packed at once, copied on the way: 64 MB
_PANEL = 48  # rows of a piece are a multiple of it, so that only the last one is filled up
_PADDING = 0.15  # of the weight's bytes, the most that filling up may take
_ALONE = 0.35  # the most where no other kernel packs weights of 8 bits: rows of 384 are filled up


@final
@attrs.frozen(eq=False)
class FbgemmRows(Arranged):
    """A matrix as FBGEMM packs it, or as it was where it could not be packed.

    Attributes:
        pieces: packed rows that follow each other; opaque. None where the weight is not packed.
        sums: of each row of codes less their zero points, times its scale, ``float32 [out]``.
        weight: the weight as it is stored; shared, its codes left out where they are packed.
    """

    traceable: ClassVar[bool] = False

    pieces: tuple[torch.ScriptObject, ...]
    sums: Tensor
    weight: PackedTensor

    @property
    def nbytes(self) -> int:
        """Bytes of the codes."""
        _, rows, length = self.weight.layout.stack
        return rows * length

    @property
    def beside(self) -> int:
        """Bytes of the sums, of scales, zero points and sums of FBGEMM's own, and of padding."""
        if not self.pieces:
            return self.sums.nbytes
        _, rows, length = self.weight.layout.stack
        return 4 * self.sums.nbytes + fbgemm.packed_bytes(rows, length) - rows * length

    def canonical(self) -> Tensor:
        """Return the codes as `PackedTensor` has them, ``int8 [1, out, in]``."""
        if not self.pieces:
            return self.weight.tensors["codes"]
        return unfollowed(lambda: torch.cat([fbgemm.unpack(piece) for piece in self.pieces])[None])

    def unpacked(self) -> PackedTensor:
        """Return the weight, its codes copied where they are packed."""
        tensors = {**self.weight.tensors, "codes": self.canonical()}
        return replace(self.weight, tensors=tensors)

    def times(self, rows: Tensor, scale: float, zero: int, top: int) -> Tensor:
        """Return ``rows @ weight.T``, ``float32 [..., out]``; see `fbgemm.linear` for the rest."""
        if len(self.pieces) == 1:
            return fbgemm.linear(rows, scale, zero, self.pieces[0], top)
        return torch.cat(
            [fbgemm.linear(rows, scale, zero, piece, top) for piece in self.pieces], -1
        )


@final
class FbgemmLinear(ArrangingKernel[FbgemmRows]):
    """Multiplies 8-bit weights and codes of inputs, which one call of FBGEMM rounds itself.

    Sums are exact. Inputs that lie half-way between two codes, as closely as float32 tells, may
    become the other code than those of `Activation.fake_quantize`: the zero point is added and the
    value rounded in one step here, as ``torch.quantize_per_tensor`` does. Without VNNI rows of 8
    bits are multiplied as halves of their codes, which takes twice as long and is as exact.

    Where each row has a grid of its own, rows are divided by their scales before, which puts all on
    one grid, and what their zero points add is a float product.

    Inputs that are not finite are left to `Blocks`, and so are weights where the engine of
    `torch.backends.quantized` was changed since the kernel was chosen.
    """

    name = "fbgemm"

    @property
    def arrangement(self) -> type[FbgemmRows]:
        """What FBGEMM packs."""
        return FbgemmRows

    def supports(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it cannot: 8-bit weights, per channel or tensor, and inputs on a grid."""
        reason = refuse(spec, device, dtype)
        if reason is None:
            reason = refuse_weight(spec) or _refuse_activation(spec.activation)
        if reason is not None:
            return reason
        _, rows, length = spec.layout.stack
        padded = fbgemm.packed_bytes(rows, length) / (rows * length) - 1
        if reason := fbgemm.refuse():
            return reason
        if padded > (_ALONE if fbgemm.saturates() else _PADDING):
            return f"{rows} x {length} values would be filled up by {padded:.0%}"
        return None

    def arrange(self, spec: KernelSpec, weight: PackedTensor) -> FbgemmRows:
        """Return the weight packed."""
        codes, zero_point = weight.tensors["codes"][0], weight.tensors.get("zero_point")
        count, length = codes.shape
        scale = weight.tensors["scale"].to(torch.float32).reshape(-1).expand(count).contiguous()
        sums = codes.sum(1, dtype=torch.int32)
        if zero_point is not None:
            zero_point = zero_point.reshape(-1).expand(count)
            sums.sub_(zero_point.int(), alpha=length)
        weighed = sums.to(torch.float32).mul_(scale)
        if fbgemm.refuse() is not None:
            return FbgemmRows((), weighed, weight)
        pieces = []
        for place in _places(count, length):
            zeros = zero_point[place] if zero_point is not None else None
            pieces.append(fbgemm.pack(codes[place], scale[place], zeros))
        rest = {name: part for name, part in weight.tensors.items() if name != "codes"}
        kept = PackedTensor(rest, weight.scheme, weight.layout, weight.dtype)
        return FbgemmRows(tuple(pieces), weighed, kept)

    def product(
        self, spec: KernelSpec, x: Tensor, weight: FbgemmRows, bias: Tensor | None
    ) -> Tensor:
        """Return ``x @ weight.T + bias``, ``[..., out]`` in the dtype of `x`."""
        activation, rows = spec.activation, flat(x, spec.layout.stack[2])
        assert activation is not None  # `supports` saw to it
        if not weight.pieces:
            return BLOCKS(spec, x, weight.unpacked(), bias)
        alike = of_alike(rows, activation, weight, bias)
        if alike is not None:
            return shaped(alike, None, x)
        grids = _own_grids(rows, activation)
        if grids is None:
            return BLOCKS(spec, x, weight.unpacked(), bias)
        return shaped(_of_own(rows, grids, activation, weight, bias), None, x)


def of_alike(
    rows: Tensor, activation: Activation, weight: FbgemmRows, bias: Tensor | None
) -> Tensor | None:
    """Return the product with rows that share a grid and the bias, ``float32 [..., out]``.

    Args:
        rows: ``float32 [M, in]``, or one row of any more dimensions; contiguous.
        activation: how they are quantized.
        weight: packed.
        bias: ``[out]``, or None.

    Returns:
        None where rows have grids of their own or are not finite, and where the grid is so fine or
        so coarse that its scale cannot be multiplied by the weight's.
    """
    grid = one_grid(rows, activation)
    if grid is None or not is_usual(grid[0]):
        return None
    middle, top = _middle_and_top(activation)
    out = weight.times(rows, grid[0], middle if _is_symmetric(activation) else grid[1], top)
    return out if bias is None else out.add_(bias)


@attrs.frozen(eq=False)
class _Grids:
    """A grid of each row, or one of all.

    Attributes:
        unit: scales, ``float32 [M or 1, 1]``.
        inverse: their reciprocals.
        offset: the codes that mean zero, less the middle one, ``float32 [M or 1, 1]``; None where
            all do.
    """

    unit: Tensor
    inverse: Tensor
    offset: Tensor | None


def _own_grids(rows: Tensor, activation: Activation) -> _Grids | None:
    """Return the grids of ``rows [M, in]``; None where there is no row or one is not finite."""
    few, symmetric = grids_of_few(rows, activation), _is_symmetric(activation)
    middle, _ = _middle_and_top(activation)
    if few is not None:
        unit, inverse, zero = few.unbind()
        return _Grids(unit, inverse, None if symmetric else zero.sub_(middle))
    qparams = activation.qparams(rows)
    if not are_finite(rows, activation, qparams):
        return None
    scale, codes = qparams.scale, qparams.zero_point
    assert scale is not None  # an Affine has one
    offset = codes.to(torch.float32).sub_(middle) if codes is not None else None
    return _Grids(scale, scale.reciprocal(), offset)


def _of_own(
    rows: Tensor, grids: _Grids, activation: Activation, weight: FbgemmRows, bias: Tensor | None
) -> Tensor:
    """Return the product with ``float32 [M, in]`` rows, and the bias, ``float32 [M, out]``."""
    steps = rows * grids.inverse
    if grids.offset is not None:
        steps.add_(grids.offset)
    out = weight.times(steps, 1.0, *_middle_and_top(activation))
    if grids.offset is not None:
        out.addcmul_(grids.offset, weight.sums, value=-1)
    if bias is None:
        return out.mul_(grids.unit)
    return torch.addcmul(bias.to(torch.float32), out, grids.unit, out=out)


def _middle_and_top(activation: Activation) -> tuple[int, int]:
    """Return the code that means zero on a symmetric grid, from 0 on, and the largest one."""
    middle = 1 << (activation.scheme.code_bits or 8) - 1
    return middle, 2 * middle - 1


def _is_symmetric(activation: Activation) -> bool:
    return isinstance(activation.scheme, Affine) and activation.scheme.symmetric


def _refuse_activation(activation: Activation | None) -> str | None:
    """Return why inputs cannot be put on a grid by FBGEMM, or None: affine ones can."""
    return "inputs are float" if activation is None else refuse_inputs(activation)


def _places(rows: int, length: int) -> Iterator[slice]:
    """Yield which rows are packed together."""
    step = max(_PANEL, _PIECE // length // _PANEL * _PANEL)
    yield from (slice(start, min(start + step, rows)) for start in range(0, rows, step))


FBGEMM_LINEAR = FbgemmLinear()
