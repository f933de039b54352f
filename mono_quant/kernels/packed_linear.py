"""Products of codes with 8-bit weights that oneDNN has packed, floats out."""

import math
from dataclasses import replace
from typing import ClassVar, final

import attrs
import torch
from torch import Tensor

from mono_quant.base import Arranged, ArrangingKernel, KernelSpec, PackedTensor
from mono_quant.kernels import onednn
from mono_quant.kernels.blocks import BLOCKS
from mono_quant.kernels.codes import flat, refuse, shaped
from mono_quant.kernels.digits import (
    AT_ONCE,
    Digits,
    OneGrid,
    are_finite,
    digits_of_codes,
    digits_of_few,
    digits_of_floats,
    is_usual,
    on_one_grid,
    parts,
    rows_of,
)
from mono_quant.kernels.integer import refuse_inputs, refuse_weight
from mono_quant.kernels.ops import unfollowed

_MIDDLE = 128  # what is taken off codes of inputs whose rows have zero points of their own
_TOP = 255


@final
@attrs.frozen(eq=False)
class PackedRows(Arranged):
    """A matrix as oneDNN packs it.

    Attributes:
        pack: of signed codes; opaque, so it can be neither copied nor pickled.
        scale: ``float32 [out]``.
        sums: of each row of codes, times its scale, ``float32 [out]``.
        zeros: codes that mean zero, times their scales, ``float32 [out]``; None where all are 0.
        weight: scale and zero point as the weight stores them; shared, its codes left out.
    """

    traceable: ClassVar[bool] = False

    pack: Tensor
    scale: Tensor
    sums: Tensor
    zeros: Tensor | None
    weight: PackedTensor

    @property
    def beside(self) -> int:
        """Bytes of scales in float32, of the sums, and of what zero points need."""
        zeros = self.zeros.nbytes if self.zeros is not None else 0
        return self.scale.nbytes + self.sums.nbytes + zeros

    @property
    def nbytes(self) -> int:
        """Bytes of the codes; oneDNN does not tell what it adds to fill its blocks."""
        return math.prod(self.weight.layout.stack)

    def canonical(self) -> Tensor:
        """Return the codes as `PackedTensor` has them, ``int8 [1, out, in]``."""
        return unfollowed(lambda: self.pack.to_dense().t().contiguous()[None])

    def unpacked(self) -> PackedTensor:
        """Return the weight, its codes copied."""
        tensors = {**self.weight.tensors, "codes": self.canonical()}
        return replace(self.weight, tensors=tensors)


@final
class PackedLinear(ArrangingKernel[PackedRows]):
    """Multiplies as `Integer` does, by a weight that is packed once instead of at each call.

    oneDNN sums bytes in 32 bits and gives floats. One zero point for all inputs is taken off
    before, in integers; where each row has its own, 128 is, and the rest is a float product that
    is added, as are zero points of weights.

    Inputs that are not finite are left to `Blocks`.
    """

    name = "onednn"

    @property
    def arrangement(self) -> type[PackedRows]:
        """What oneDNN packs."""
        return PackedRows

    def supports(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it cannot: 8-bit weights, per channel or per tensor, on a CPU are what it can.

        Inputs may be float, or on an affine grid, dynamic or static, of at most 8 bits.
        """
        reason = refuse(spec, device, dtype)
        if reason is None:
            reason = refuse_weight(spec) or refuse_inputs(spec.activation)
        return reason if reason is not None else onednn.refuse_linear()

    def arrange(self, spec: KernelSpec, weight: PackedTensor) -> PackedRows:
        """Return the weight packed."""
        codes = weight.tensors["codes"][0]
        count = codes.shape[0]
        scale = weight.tensors["scale"].to(torch.float32).reshape(-1).expand(count).contiguous()
        sums = codes.sum(1, dtype=torch.int32).to(torch.float32).mul_(scale)
        zero_point = weight.tensors.get("zero_point")
        zeros = zero_point.to(torch.float32) * scale if zero_point is not None else None
        rest = {name: part for name, part in weight.tensors.items() if name != "codes"}
        kept = PackedTensor(rest, weight.scheme, weight.layout, weight.dtype)
        return PackedRows(onednn.pack_linear(codes), scale, sums, zeros, kept)

    def product(
        self, spec: KernelSpec, x: Tensor, weight: PackedRows, bias: Tensor | None
    ) -> Tensor:
        """Return ``x @ weight.T + bias``, ``[..., out]`` in the dtype of `x`."""
        activation, rows = spec.activation, flat(x, spec.layout.stack[2])
        added = bias.to(torch.float32) if bias is not None else None
        alike = on_one_grid(rows, activation) if activation is not None else None
        if alike is not None:
            return shaped(of_one_grid(alike, weight, bias), None, x)
        few = digits_of_few(rows, activation) if activation is not None else None
        if few is not None:
            return shaped(_product(few, weight, added), None, x)
        qparams = activation.qparams(rows) if activation is not None else None
        if not are_finite(rows, activation, qparams):
            return BLOCKS(spec, x, weight.unpacked(), bias)
        out: Tensor | None = None
        for place in parts(len(rows), AT_ONCE * torch.get_num_threads()):
            if activation is None or qparams is None:
                digits = digits_of_floats(rows_of(rows, place))
            else:
                digits = digits_of_codes(rows, activation.scheme, qparams, place)
            found = _product(digits, weight, added)
            if place is None:
                return shaped(found, None, x)
            out = rows.new_empty(len(rows), found.shape[1]) if out is None else out
            out[place].copy_(found)
        assert out is not None  # a part that is not all is followed by others
        return shaped(out, None, x)


def of_one_grid(inputs: OneGrid, weight: PackedRows, bias: Tensor | None) -> Tensor:
    """Return the product with inputs on one grid, which the operator is told of, and the bias.

    Args:
        inputs: rows on their grid.
        weight: packed.
        bias: ``[out]``, or None.
    """
    codes, zero, unit = inputs
    if not is_usual(unit):
        found = Digits(codes, torch.full((1, 1), zero, dtype=torch.int32), torch.full((1, 1), unit))
        return _product(found, weight, bias.to(torch.float32) if bias is not None else None)
    added = bias.to(torch.float32) if bias is not None else None
    out = onednn.linear(codes, (unit, zero, _TOP), weight.pack, weight.scale, added, None)
    if weight.zeros is None:
        return out
    sums = codes.sum(1, keepdim=True, dtype=torch.int32).sub_(zero * codes.shape[1])
    return out.addcmul_(sums.to(torch.float32), weight.zeros, value=-unit)


def _product(x: Digits, weight: PackedRows, bias: Tensor | None) -> Tensor:
    """Return the product with some rows of inputs, ``float32 [M, out]``."""
    zero = int(x.zero.item()) if x.zero.numel() == 1 else _MIDDLE
    out = onednn.linear(x.digits, (1.0, zero, _TOP), weight.pack, weight.scale, None, None)
    if x.zero.numel() > 1:
        out.addcmul_((zero - x.zero).to(torch.float32), weight.sums)
    if weight.zeros is not None:
        sums = x.digits.sum(1, keepdim=True, dtype=torch.int32) - x.zero * x.digits.shape[1]
        out.addcmul_(sums.to(torch.float32), weight.zeros, value=-1)
    if x.places > 1:
        *lower, out = out.view(x.places, -1, out.shape[1]).unbind()
        for digit in reversed(lower):
            out.mul_(256.0).add_(digit)
    return out.mul_(x.unit) if bias is None else torch.addcmul(bias, out, x.unit, out=out)


PACKED_LINEAR = PackedLinear()
