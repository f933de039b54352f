"""4-bit weights on CUDA devices, in the order that torch's own product there reads.

The operators are tried in a process of its own on each device before they are used: sizes, the
order of nibbles and the results.
"""

from functools import cache
from typing import ClassVar, final

import attrs
import torch
from torch import Tensor
from torch.nn import functional

from mono_quant.base import Arranged, ArrangingKernel, KernelSpec, PackedTensor
from mono_quant.kernels.codes import flat, refuse, scales_and_zeros, shaped
from mono_quant.kernels.cuda import trial
from mono_quant.kernels.int4 import group_of, refuse_four_bits
from mono_quant.kernels.ops import unfollowed, untraced
from mono_quant.numerics.packing import pack_bits

_ROWS = 8  # of a tile
_INNER = 8  # how many times 16 columns a tile has
_COLUMNS = 16 * _INNER
_CENTRE = 8  # the code that the product takes for zero


@final
@attrs.frozen(eq=False)
class Tiles(Arranged):
    """A 4-bit weight as the product on CUDA reads it.

    Attributes:
        codes: ``int32 [out / 8, in / 128, 32, 4]``.
        pairs: scale and offset of each group, ``bfloat16 [groups, out, 2]``: the value is
            ``(code - 8) * scale + offset``.
        shape: of the weight, ``[out, in]``.
    """

    traceable: ClassVar[bool] = False

    codes: Tensor
    pairs: Tensor
    shape: tuple[int, int]

    @property
    def beside(self) -> int:
        """Bytes of what the canonical weight does not have."""
        return self.pairs.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of the codes."""
        return self.codes.nbytes

    def canonical(self) -> Tensor:
        """Return the codes as `PackedTensor` has them, ``uint8 [1, out, in / 2]``."""
        return unfollowed(lambda: pack_bits(self.unpacked(), 4)[None])

    def unpacked(self) -> Tensor:
        """Return the codes, ``uint8 [out, in]``."""
        rows, length = self.shape
        places = _places(self.codes.device)
        found = _nibbles(self.codes).view(-1, _ROWS * _COLUMNS).index_select(1, places)
        found = found.view(rows // _ROWS, length // _COLUMNS, _ROWS, _COLUMNS)
        return found.transpose(1, 2).reshape(rows, length)


def _nibbles(codes: Tensor) -> Tensor:
    """Return the codes of tiles in the order of their bits."""
    packed = codes.view(torch.uint8)
    return torch.stack((packed & 15, packed >> 4), -1)


@untraced
def _places(device: torch.device) -> Tensor:
    """Return where in a tile each of its codes is, by row and column."""
    return _found_places(device)


@cache
def _found_places(device: torch.device) -> Tensor:
    """Return what the operator shows of the order of a tile.

    It is given the number of each place, four bits at a time.
    """
    numbers = torch.arange(_ROWS * _COLUMNS, device=device).view(_ROWS, _COLUMNS)
    found = torch.zeros(_ROWS * _COLUMNS, dtype=torch.int64, device=device)
    for shift in range(0, 12, 4):
        digits = (numbers >> shift & 15).to(torch.uint8)
        found += _nibbles(_tiled(digits)).flatten().to(torch.int64) << shift
    return found.argsort()


def _tiled(codes: Tensor) -> Tensor:
    """Return ``uint8 [out, in]`` in tiles; the operator wants even columns high."""
    pairs = codes[:, 0::2] << 4 | codes[:, 1::2]
    found: Tensor = torch.ops.aten._convert_weight_to_int4pack(pairs, _INNER)
    return found


class _CudaTiles(ArrangingKernel[Tiles]):
    """What computes from tiles."""

    @property
    def arrangement(self) -> type[Tiles]:
        """Tiles of 4-bit codes."""
        return Tiles

    def supports(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it cannot: 4-bit affine weights in whole tiles, float inputs, CUDA."""
        reason = refuse(spec, device, dtype, "cuda") or refuse_four_bits(spec)
        if reason is None and spec.activation is not None:
            reason = f"inputs are {spec.activation.describe()}"
        _, rows, length = spec.layout.stack
        if reason is None and (rows % _ROWS or length % _COLUMNS):
            reason = f"{rows} x {length} values are no multiples of {_ROWS} x {_COLUMNS}"
        return reason or trial("the 4-bit product", _TRIAL, device)

    def arrange(self, spec: KernelSpec, weight: PackedTensor) -> Tiles:
        """Return the weight in tiles."""
        scale, zeros = scales_and_zeros(weight)
        _, rows, length = weight.layout.stack
        group = group_of(weight.block_size[2])
        pairs = torch.stack([scale, (_CENTRE - zeros) * scale], -1).to(torch.bfloat16)
        pairs = pairs.transpose(0, 1)
        repeats = length // group // pairs.shape[0]
        pairs = pairs.repeat_interleave(repeats, 0).expand(-1, rows, -1).contiguous()
        stored = weight.tensors["codes"][0]  # even columns low
        turned = (stored << 4) | (stored >> 4)
        codes = torch.ops.aten._convert_weight_to_int4pack(turned, _INNER)
        return Tiles(codes, pairs, (rows, length))


@final
class CudaInt4(_CudaTiles):
    """Multiplies float inputs by 4-bit weights in bfloat16, as `Int4` does on a CPU."""

    name = "cuda-int4"

    def product(self, spec: KernelSpec, x: Tensor, weight: Tiles, bias: Tensor | None) -> Tensor:
        """Return ``x @ weight.T + bias``, ``[..., out]`` in the dtype of `x`."""
        length = spec.layout.stack[2]
        rows = flat(x, length, torch.bfloat16)
        group = length // weight.pairs.shape[0]
        found = torch.ops.aten._weight_int4pack_mm(rows, weight.codes, group, weight.pairs)
        if x.dtype != torch.bfloat16:
            found = found.to(torch.float32)
        return shaped(found, bias, x)


@final
class CudaTilesDecoded(_CudaTiles):
    """Decodes tiles in the dtype of the inputs, then multiplies floats: for many rows of them."""

    name = "cuda-int4-decoded"

    def product(self, spec: KernelSpec, x: Tensor, weight: Tiles, bias: Tensor | None) -> Tensor:
        """Return ``x @ weight.T + bias``, ``[..., out]`` in the dtype of `x`."""
        rows = flat(x, spec.layout.stack[2], x.dtype)
        scale, offset = weight.pairs.to(torch.float32).transpose(0, 1).unsqueeze(-2).unbind(-1)
        codes = weight.unpacked().sub_(_CENTRE).view(torch.int8)  # below zero they wrap around
        values = torch.mul(codes.view(*scale.shape[:2], -1), scale)
        decoded = torch.add(values, offset, out=rows.new_empty(values.shape)).view(weight.shape)
        bias = bias.to(x.dtype) if bias is not None else None
        return shaped(functional.linear(rows, decoded, bias), None, x)


_TRIAL = """
import torch
aten = torch.ops.aten
count, length, group = 64, 512, 64
codes = torch.randint(0, 16, (count, length), dtype=torch.uint8)
high, low = codes[:, 0::2], codes[:, 1::2]
packed = aten._convert_weight_to_int4pack((high << 4 | low).to(device), 8)
assert packed.numel() * packed.element_size() == count * length // 2, "another size"
pairs = torch.randint(-8, 9, (length // group, count, 2)).to(torch.bfloat16)
scale, offset = (part.t().double().repeat_interleave(group, 1) for part in pairs.unbind(-1))
weight = (codes.double() - 8) * scale + offset
for rows in (1, 8, 17, 64):
    x = torch.zeros(rows, length, dtype=torch.bfloat16)
    x[torch.arange(rows), torch.randint(0, length, (rows,))] = 1
    found = aten._weight_int4pack_mm(x.to(device), packed, group, pairs.to(device)).cpu()
    assert torch.equal(found, (x.double() @ weight.t()).to(torch.bfloat16)), "another order"
"""

CUDA_INT4 = CudaInt4()
CUDA_TILES_DECODED = CudaTilesDecoded()
