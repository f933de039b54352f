"""Float products with a weight that is decoded a few rows at a time."""

import attrs
import torch
from torch import Tensor

from mono_quant.base import KernelSpec, PackedTensor
from mono_quant.kernels.codes import flat, refuse, scales_and_zeros, shaped
from mono_quant.numerics.granularity import PerChannel, PerGroup, PerTensor
from mono_quant.numerics.packing import unpack_bits
from mono_quant.schemes import Affine, FloatCast

_BLOCK = 1 << 18  # float32 values of a block: 1 MB, which stays in a core's cache
_BATCH = 32  # from as many rows of input on, larger blocks serve the product better
_LARGE_BLOCK = 1 << 20


class Blocks:
    """Decodes some rows of a weight into a buffer, multiplies, and goes on with the next ones.

    There is never a float copy of the whole weight. Values are those of the reference; only the
    order in which a product is summed, and a scale being applied behind the sum, differ.
    """

    name = "blocks"

    def supports(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it cannot: what decodes rows by themselves, on a CPU, is what it can."""
        if reason := refuse(spec, device, dtype):
            return reason
        scheme = spec.scheme
        if type(scheme) is FloatCast:
            return None
        if type(scheme) is not Affine and not scheme.decodes_rows:
            return f"the weight is {scheme.describe()}, which is decoded whole"
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
        size = _BLOCK if rows.shape[0] < _BATCH else _LARGE_BLOCK
        at_once = min(count, max(1, size // length))
        out = rows.new_empty(rows.shape[0], count)
        if isinstance(weight.scheme, Affine | FloatCast):
            self._decoded(rows, weight, at_once, out)
        else:
            for start in range(0, count, at_once):
                part = slice(start, start + at_once)
                block = weight.scheme.dequantize(weight.part(part))[0]
                torch.mm(rows, block.t(), out=out[:, part])
        return shaped(out, bias, x)

    def _decoded(self, rows: Tensor, weight: PackedTensor, at_once: int, out: Tensor) -> None:
        """Write the product of ``rows [M, in]`` with an affine grid or a cast, ``[M, out]``."""
        length, count = rows.shape[1], out.shape[1]
        decoder = _Decoder.of(weight, length)
        rows = decoder.ordered(rows)
        sums = rows.view(len(rows), decoder.runs, length // decoder.runs).sum(-1)
        buffer = rows.new_empty(at_once, length)
        for start in range(0, count, at_once):
            stop = min(start + at_once, count)
            decoder.product(rows, sums, buffer[: stop - start], start, out[:, start:stop])


@attrs.frozen(eq=False)
class _Decoder:
    """Reads rows of one weight as runs of columns, each with a scale and a zero point.

    A run is a group, or half of one: nibbles come out of their bytes the even columns first, then
    the odd ones, the latter 16 times as large, which their scales make good.

    Attributes:
        codes: as stored, ``[out, bytes]``.
        scheme: the grid.
        length: values of a row.
        split: whether a decoded row has its even columns first.
        scale: ``float32 [out or 1, runs]``; None for a cast.
        zeros: decoded codes that mean zero, shaped so.
    """

    codes: Tensor
    scheme: Affine | FloatCast
    length: int
    split: bool = False
    scale: Tensor | None = None
    zeros: Tensor | None = None

    @classmethod
    def of(cls, weight: PackedTensor, length: int) -> "_Decoder":
        scheme, codes = weight.scheme, weight.tensors["codes"][0]
        if isinstance(scheme, FloatCast):
            return cls(codes, scheme, length)
        assert isinstance(scheme, Affine)  # `Blocks.supports` saw to it
        scale, zeros = scales_and_zeros(weight)
        split = scheme.bits == 4 and length // scale.shape[1] % 2 == 0
        if split:
            scale, zeros = torch.cat([scale, scale / 16], 1), torch.cat([zeros, zeros * 16], 1)
        return cls(codes, scheme, length, split, scale, zeros)

    @property
    def runs(self) -> int:
        """How many runs a row has."""
        return 1 if self.scale is None else self.scale.shape[1]

    def ordered(self, rows: Tensor) -> Tensor:
        """Return ``rows [M, in]`` with their columns in the order of decoded ones."""
        if not self.split:
            return rows
        return rows.reshape(-1, self.length // 2, 2).transpose(1, 2).reshape(-1, self.length)

    def product(self, rows: Tensor, sums: Tensor, block: Tensor, start: int, out: Tensor) -> None:
        """Write the product with some rows of the weight.

        Args:
            rows: `ordered` inputs, ``[M, in]``.
            sums: of each run of theirs, ``[M, runs]``.
            block: room for those rows decoded, ``[n, in]``.
            start: the first of them.
            out: ``[M, n]``.
        """
        self._fill(block, start)
        if self.scale is None or self.zeros is None:
            torch.mm(rows, block.t(), out=out)
            return
        place = slice(None) if len(self.scale) == 1 else slice(start, start + len(block))
        scale, zeros = self.scale[place], self.zeros[place]
        if self.runs == 1:
            torch.mm(rows, block.sub_(zeros).t(), out=out)
            out.mul_(scale.t())
            return
        block.view(len(block), self.runs, -1).mul_(scale[..., None])
        torch.mm(rows, block.t(), out=out)
        out.addmm_(sums, (scale * zeros).t(), alpha=-1)  # a pass less than to subtract zeros first

    def _fill(self, block: Tensor, start: int) -> None:
        stored = self.codes[start : start + len(block)]
        if self.split:
            half = self.length // 2
            block[:, :half].copy_(stored & 0x0F)
            block[:, half:].copy_(stored & 0xF0)  # a shift of bytes is slow, and scales do it
        elif isinstance(self.scheme, Affine):
            block.copy_(unpack_bits(stored, self.scheme.bits, self.length))
        else:
            block.copy_(stored)


BLOCKS = Blocks()
