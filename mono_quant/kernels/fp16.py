"""Products of float32 inputs and float16 weights in the order of torch's own fp16 product."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar, final

import attrs
import torch
from torch import Tensor

from mono_quant.base import Arranged, ArrangingKernel, KernelSpec, PackedTensor
from mono_quant.kernels.blocks import BLOCKS
from mono_quant.kernels.codes import flat, refuse, shaped
from mono_quant.kernels.ops import (
    fp16_mm,
    fp16_pack,
    fp16_packed_bytes,
    fp16_refusal,
    fp16_unpack,
    unfollowed,
)
from mono_quant.schemes import FloatCast

_PIECE = 1 << 23  # values that are float32 at once while a weight is packed: 32 MB
_PANEL = 64  # rows of a piece are a multiple of it, so that only the last one is filled up
_PADDING = 0.4  # of the weight's bytes, the most that filling up may take


class HalfPrecision(Arranged):
    """A float16 weight in an order of torch's own, or as it was where it could not be packed.

    Attributes:
        shape: of the weight, ``[out, in]``.
        weight: the weight as it was; None where it is packed.
    """

    __slots__ = ()
    traceable: ClassVar[bool] = False

    shape: tuple[int, int]
    weight: PackedTensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of the codes."""
        rows, length = self.shape
        return 2 * rows * length

    @property
    def padding(self) -> int:
        """Bytes that fill up what is packed."""
        return fp16_packed_bytes(*self.shape) - self.nbytes if self.weight is None else 0

    def canonical(self) -> Tensor:
        """Return the codes as `PackedTensor` has them, ``float16 [1, out, in]``."""
        if self.weight is not None:
            return self.weight.tensors["codes"]
        return unfollowed(self.unpacked)

    @abstractmethod
    def unpacked(self) -> Tensor:
        """Return the codes of what is packed, ``float16 [1, out, in]``."""


@final
@attrs.frozen(eq=False)
class Halves(HalfPrecision):
    """A float16 weight as torch's product reads it.

    Attributes:
        pieces: packed rows that follow each other, as many in each but the last.
        shape: of the weight, ``[out, in]``.
        weight: the weight as it was, where it could not be packed; then there are no pieces.
    """

    pieces: tuple[torch.ScriptObject, ...]
    shape: tuple[int, int]
    weight: PackedTensor | None = None

    @property
    def beside(self) -> int:
        """Bytes that fill up the pieces: the last one, the others are whole panels of rows."""
        return self.padding

    def unpacked(self) -> Tensor:
        """Return the codes, piece by piece."""
        codes = torch.empty(self.shape, dtype=torch.float16, device="cpu")
        for place, piece in zip(_places(*self.shape), self.pieces, strict=True):
            codes[place].copy_(fp16_unpack(piece))
        return codes[None]


class Fp16(ArrangingKernel[Halves]):
    """Multiplies float32 inputs by float16 weights, which torch's product widens as it goes.

    Values are those of the reference, summed in float32 in another order. A weight that holds NaN
    or infinity, which the packing would change, is left as it is and decoded by `Blocks`; so is
    one where the engine of `torch.backends.quantized` was changed since the kernel was chosen.
    """

    name = "fp16"

    @property
    def arrangement(self) -> type[Halves]:
        """Packed pieces."""
        return Halves

    def supports(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it cannot: float16 weights and float inputs on a CPU are what it can."""
        if reason := refuse(spec, device, dtype):
            return reason
        scheme = spec.scheme
        if type(scheme) is not FloatCast or scheme.dtype is not torch.float16:
            return f"the weight is {scheme.describe()}"
        if spec.activation is not None:
            return f"inputs are {spec.activation.describe()}"
        _, rows, length = spec.layout.stack
        padded = fp16_packed_bytes(rows, length) / (2 * rows * length) - 1
        if padded > _PADDING:
            return f"{rows} x {length} values would be filled up by {padded:.0%}"
        return fp16_refusal()

    def arrange(self, spec: KernelSpec, weight: PackedTensor) -> Halves:
        """Return the weight packed."""
        codes = weight.tensors["codes"][0]
        shape = (codes.shape[0], codes.shape[1])
        if fp16_refusal() is not None:
            return Halves((), shape, weight)
        pieces = []
        for place in _places(*shape):
            values = codes[place].to(torch.float32)
            if not bool(values.isfinite().all()):
                return Halves((), shape, weight)
            pieces.append(fp16_pack(values))
        return Halves(tuple(pieces), shape)

    def product(self, spec: KernelSpec, x: Tensor, weight: Halves, bias: Tensor | None) -> Tensor:
        """Return ``x @ weight.T + bias``, ``[..., out]`` in the dtype of `x`."""
        if weight.weight is not None:
            return BLOCKS(spec, x, weight.weight, bias)
        rows = flat(x, spec.layout.stack[2])
        if len(weight.pieces) == 1:
            return shaped(fp16_mm(rows, weight.pieces[0]), bias, x)
        out = rows.new_empty(len(rows), weight.shape[0])
        for place, piece in zip(_places(*weight.shape), weight.pieces, strict=True):
            out[:, place].copy_(fp16_mm(rows, piece))
        return shaped(out, bias, x)


def _places(rows: int, length: int) -> Iterator[slice]:
    """Yield which rows are packed together."""
    step = max(_PANEL, _PIECE // length // _PANEL * _PANEL)
    yield from (slice(start, min(start + step, rows)) for start in range(0, rows, step))


FP16 = Fp16()
