"""Float products with a weight that is decoded a few rows at a time."""

import attrs
import torch
from torch import Tensor

from mono_quant.base import KernelSpec, PackedTensor
from mono_quant.kernels.codes import flat, refuse, shaped
from mono_quant.numerics.granularity import PerChannel, PerGroup, PerTensor
from mono_quant.numerics.packing import unpack_bits
from mono_quant.schemes import Affine, FloatCast

_BLOCK = 1 << 18  # float32 values of a block: 1 MB, which stays in a core's cache
_BATCH = 32  # from as many rows of input on, larger blocks serve the product better
_LARGE_BLOCK = 1 << 20


@attrs.frozen
class Blocks:
    """Decodes some rows of a weight into a buffer, multiplies, and goes on with the next ones.

    There is never a float copy of the whole weight. Values are those of the reference; only the
    order in which a product is summed, and a scale being applied behind the sum, differ.
    """

    name: str = attrs.field(default="blocks", init=False)

    def supports(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it cannot: affine grids and casts on a CPU are what it can."""
        if reason := refuse(spec, device, dtype):
            return reason
        scheme = spec.scheme
        if type(scheme) is FloatCast:
            return None
        if type(scheme) is not Affine:
            return f"the weight is {scheme.describe()}"
        if type(scheme.granularity) not in (PerTensor, PerChannel, PerGroup):
            return f"the weight's scales are {scheme.granularity.describe()}"
        return None

    def __call__(
        self, spec: KernelSpec, x: Tensor, weight: PackedTensor, bias: Tensor | None
    ) -> Tensor:
        """Return ``x @ weight.T + bias``, ``[..., out]`` in the dtype of `x`."""
        _, count, length = spec.layout.stack
        rows = flat(x, length)
        if spec.activation is not None:
            rows = spec.activation.fake_quantize(rows)
        decoder = _Decoder.of(weight, count, length)
        rows = decoder.ordered(rows)
        size = _BLOCK if rows.shape[0] < _BATCH else _LARGE_BLOCK
        buffer = rows.new_empty(min(count, max(1, size // length)), length)
        out = rows.new_empty(rows.shape[0], count)
        for start in range(0, count, len(buffer)):
            stop = min(start + len(buffer), count)
            block = buffer[: stop - start]
            decoder.fill(block, start, stop)
            torch.mm(rows, block.t(), out=out[:, start:stop])
        return shaped(decoder.scaled(out), bias, x)


@attrs.frozen(eq=False)
class _Decoder:
    """Reads rows of one weight.

    Attributes:
        codes: as stored, ``[out, bytes]``.
        scheme: the grid.
        length: values of a row.
        scale: ``float32 [out or 1, groups]``; None for a cast.
        zeros: stored codes that mean zero, shaped so.
    """

    codes: Tensor
    scheme: Affine | FloatCast
    length: int
    scale: Tensor | None
    zeros: Tensor | None

    @classmethod
    def of(cls, weight: PackedTensor, count: int, length: int) -> "_Decoder":
        scheme, tensors = weight.scheme, weight.tensors
        assert isinstance(scheme, Affine | FloatCast)  # `Blocks.supports` saw to it
        if "scale" not in tensors:
            return cls(tensors["codes"][0], scheme, length, None, None)
        scale = tensors["scale"][0].to(torch.float32)
        zeros = torch.tensor(float(-scheme.code_min))
        if "zero_point" in tensors and isinstance(scheme, Affine):
            unpacked = unpack_bits(tensors["zero_point"], scheme.bits, scale.numel())
            zeros = unpacked.to(torch.float32)
        return cls(
            tensors["codes"][0],
            scheme,
            length,
            scale,
            zeros.expand(scale.numel()).reshape(scale.shape),
        )

    @property
    def split(self) -> bool:
        """Whether a decoded row has its even columns first, then the odd ones.

        Nibbles of 4 bits come out of their bytes so. Each group must hold as many of both.
        """
        if self.scale is None or self.scheme.code_bits != 4:
            return False
        return (self.length // self.scale.shape[1]) % 2 == 0

    def ordered(self, rows: Tensor) -> Tensor:
        """Return ``rows [M, in]`` with their columns in the order of decoded ones."""
        if not self.split:
            return rows
        return rows.reshape(-1, self.length // 2, 2).transpose(1, 2).reshape(-1, self.length)

    def fill(self, block: Tensor, start: int, stop: int) -> None:
        """Write rows from `start` to `stop` into ``block [n, in]``; see `scaled`."""
        stored = self.codes[start:stop]
        if self.scale is None or self.zeros is None:
            block.copy_(stored)
            return
        groups = self.scale.shape[1]
        halves = 1
        if self.split:
            halves = 2
            half = self.length // 2
            block[:, :half].copy_(stored & 15)
            block[:, half:].copy_(stored >> 4)
        else:
            block.copy_(unpack_bits(stored, self.scheme.code_bits or 8, self.length))
        parts = block.view(len(block), halves, groups, -1)
        place = slice(None) if len(self.scale) == 1 else slice(start, stop)
        parts.sub_(self.zeros[place, None, :, None])
        if groups > 1:
            parts.mul_(self.scale[place, None, :, None])

    def scaled(self, product: Tensor) -> Tensor:
        """Return ``product [M, out]`` times the scales that `fill` left out: one for a row."""
        if self.scale is None or self.scale.shape[1] > 1:
            return product
        return product.mul_(self.scale.reshape(-1))


BLOCKS = Blocks()
