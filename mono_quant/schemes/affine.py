"""Evenly spaced grids: integers times a scale, from a zero point on."""

import ctypes
import math
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from mono_quant.base import Scheme
from mono_quant.configurable import as_dtype, dtype_name, register
from mono_quant.errors import ConfigurationError, InputError
from mono_quant.numerics.blocks import AT_ONCE, block_counts, block_range, meet
from mono_quant.numerics.granularity import Granularity, PerChannel, Shape
from mono_quant.numerics.packing import packed_length
from mono_quant.numerics.values import QParams, QTensor

_TINY = torch.finfo(torch.float32).tiny
_SMALLEST = 1e-30  # of a range whose scale, and the halves that it is made of, are no subnormals
_SATURATED = 0.25
_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def float32(value: float) -> float:
    """Return a number rounded to float32."""
    return ctypes.c_float(value).value


def _size(block_size: Shape) -> int:
    return torch.Size(block_size).numel()


def _check_bits(_: object, __: object, bits: object) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ConfigurationError(f"Affine has 2 to 8 bits, not {bits!r}; for 16 use FloatCast()")


def _check_symmetric(_: object, __: object, symmetric: object) -> None:
    if not isinstance(symmetric, bool):
        raise ConfigurationError(f"symmetric is True or False, not {symmetric!r}")


def _check_granularity(_: object, __: object, granularity: object) -> None:
    if not isinstance(granularity, Granularity):
        raise ConfigurationError(f"granularity is a Granularity, not {granularity!r}")


@register
@attrs.frozen
class Affine(Scheme):
    """``value = (code - zero_point) * scale``: the uniform grid of 2 to 8 bits.

    Symmetric: codes ``-2^(b-1) .. 2^(b-1) - 1``, no zero point, ``scale = max|x| / quant_max``.
    Asymmetric: codes ``0 .. 2^b - 1``, a range that includes zero,
    ``scale = (max - min) / (quant_max - quant_min)`` and
    ``zero_point = quant_min - round(min / scale)``, so that zero is on the grid. Rounding is half
    to even. The zero point is chosen for the scale as it is stored.

    A scale that `scale_dtype` cannot hold (under- and overflow: its error would pass both the
    precision of that dtype and an eighth of a step at the end of the grid) makes that tensor's
    scales float32; the report says so.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", arXiv 1712.05877.

    Attributes:
        bits: 2 to 8.
        symmetric: no zero point.
        granularity: which values share one scale.
        scale_dtype: float16, bfloat16 or float32.
    """

    kind: ClassVar[str] = "affine"
    bits: int = attrs.field(default=8, validator=_check_bits)
    symmetric: bool = attrs.field(default=True, validator=_check_symmetric)
    granularity: Granularity = attrs.field(factory=PerChannel, validator=_check_granularity)
    scale_dtype: torch.dtype = attrs.field(default=torch.float16, converter=as_dtype)

    def __attrs_post_init__(self) -> None:
        """Refuse dtypes that hold no scales."""
        if self.scale_dtype not in _SCALE_DTYPES:
            raise ConfigurationError(
                f"scale_dtype is one of {_SCALE_DTYPES}, not {self.scale_dtype}"
            )

    @property
    def quant_min(self) -> int:
        """The smallest code."""
        return -(1 << self.bits - 1) if self.symmetric else 0

    @property
    def quant_max(self) -> int:
        """The largest code."""
        return self.quant_min + (1 << self.bits) - 1

    @property
    def code_bits(self) -> int:
        """The width of a code."""
        return self.bits

    @property
    def code_min(self) -> int:
        """The smallest code."""
        return self.quant_min

    def nbytes(self, shape: Shape) -> int:
        """Return the bytes of codes, scales and zero points of a packed stack of `shape`."""
        *rows, length = shape
        blocks = torch.Size(block_counts(shape, self.granularity.block_size(shape))).numel()
        codes = torch.Size(rows).numel() * packed_length(length, self.bits)
        zero_points = 0 if self.symmetric else packed_length(blocks, self.bits)
        return codes + blocks * self.scale_dtype.itemsize + zero_points

    def calculate_qparams(self, min_val: Tensor, max_val: Tensor, *, block_size: Shape) -> QParams:
        """Return scale and zero point for ``[min_val, max_val]``, each one value per block.

        A block of nothing but zeros has scale 1.

        Raises:
            InputError: a bound is NaN or infinite.
        """
        low, high = min_val.to(torch.float32), max_val.to(torch.float32)
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            raise InputError("a range is not finite: the tensor holds NaN or infinity")
        return self._cover(low, high, block_size)

    def dynamic_qparams(self, x: Tensor) -> QParams:
        """Return `calculate_qparams` of the smallest and largest values, whatever they are."""
        block_size = self.granularity.block_size(tuple(x.shape))
        return self._cover(*block_range(x.to(torch.float32), block_size), block_size)

    def _cover(self, low: Tensor, high: Tensor, block_size: Shape) -> QParams:
        if self.symmetric:
            scale = torch.maximum(high, -low).div_(self.quant_max)
        else:
            low, high = low.clamp(max=0), high.clamp(min=0)
            steps = self.quant_max - self.quant_min
            scale = (high * 0.5).sub_(low, alpha=0.5).div_(steps / 2)  # halves do not overflow
        empty = scale == 0
        scale = self._store(scale.clamp_(min=_TINY).masked_fill_(empty, 1.0))
        if self.symmetric:
            return QParams(scale, None, block_size)
        zero_point = low.div_(scale).round_().neg_().add_(self.quant_min)
        zero_point = zero_point.clamp_(self.quant_min, self.quant_max).to(torch.uint8)
        return QParams(scale, zero_point, block_size)

    def cover_one(self, low: float, high: float) -> tuple[float, int] | None:
        """Return scale and zero point (0 without one) of a single range, computed as for many.

        Python's floats, rounded to float32 after each step, take a twentieth of the time of a
        dozen operators on one value. Twice the digits make that the same rounding (Figueroa, "When
        is double rounding innocuous?", 1995).

        Args:
            low: the smallest value.
            high: the largest.

        Returns:
            None where operators are to do it: for scales that are not float32, a range near the
            smallest floats or of nothing but zeros, and one that is not finite.
        """
        if self.scale_dtype != torch.float32 or not _SMALLEST < max(-low, high) < math.inf:
            return None
        if self.symmetric:
            return float32(max(high, -low) / self.quant_max), 0
        low, high = min(low, 0.0), max(high, 0.0)
        steps = self.quant_max - self.quant_min
        scale = float32(float32(high * 0.5 - low * 0.5) / (steps / 2))
        zero_point = self.quant_min - round(float32(low / scale))
        return scale, min(max(zero_point, self.quant_min), self.quant_max)

    def quantize(self, x: Tensor, qparams: QParams) -> QTensor:
        """Return the nearest code of each value: ``clamp(round(x / scale + zero_point))``.

        Computed in float32 from the reciprocal of the scale, the zero point added before rounding,
        as ``torch.quantize_per_channel`` does it: codes agree with its bit for bit. Operators that
        add it afterwards (``torch.fake_quantize_per_channel_affine``) or in one fused step
        (``torch.quantize_per_tensor``) may differ by a code where a value lies on a half.

        Args:
            x: finite values; computed in float32.
            qparams: with a scale.

        Returns:
            int8 codes for a symmetric grid, uint8 otherwise.
        """
        scale, *zero_point = self._parts(qparams)
        values = x.to(torch.float32)
        values, scale, *zero_point = meet(values, qparams.block_size, scale, *zero_point)
        values = values * scale.reciprocal()
        for zero in zero_point:
            values += zero
        values = values.round_().clamp_(self.quant_min, self.quant_max).reshape(x.shape)
        # to unsigned bytes by way of words, which takes half the time
        codes = values.to(torch.int8 if self.symmetric else torch.int16)
        return QTensor(codes if self.symmetric else codes.to(torch.uint8), qparams, x.dtype)

    def dequantize(self, q: QTensor) -> Tensor:
        """Return ``(code - zero_point) * scale`` in float32."""
        scale, *zero_point = self._parts(q.qparams)
        codes = q.codes.to(torch.float32)
        values, scale, *zero_point = meet(codes, q.qparams.block_size, scale, *zero_point)
        for zero in zero_point:
            values.sub_(zero)
        return values.mul_(scale).reshape(q.codes.shape)

    def describe(self) -> str:
        """Return width, symmetry and granularity."""
        grid = "symmetric" if self.symmetric else "asymmetric"
        return f"{self.bits}-bit {grid} {self.granularity.describe()}"

    def remark(self, q: QTensor) -> str | None:
        """Return that scales had to be wider, or that much of the tensor is clipped."""
        remarks = []
        scale = q.qparams.scale
        if scale is not None and scale.dtype != self.scale_dtype:
            remarks.append(
                f"its scales are {dtype_name(scale.dtype)}, since {dtype_name(self.scale_dtype)} "
                "cannot hold them closely enough"
            )
        if self.bits > 3 and _size(q.qparams.block_size) > 15:
            share = self._at_ends(q.codes) / max(1, q.codes.numel())
            if share > _SATURATED:
                remarks.append(f"{share:.0%} of its codes lie on the ends of the grid")
        return "; ".join(remarks) or None

    def _at_ends(self, codes: Tensor) -> int:
        """Return how many codes are the smallest or the largest.

        By what clamping one step further in changes: comparing bytes takes ten times as long.
        """
        counts = [
            codes_at_once.clamp(self.quant_min + 1, self.quant_max - 1)
            .bitwise_xor_(codes_at_once)
            .count_nonzero()
            for codes_at_once in torch.split(codes.flatten(), AT_ONCE)
        ]
        return int(torch.stack(counts).sum())

    def _parts(self, qparams: QParams) -> tuple[Tensor, ...]:
        """Return scale and, where there is one, zero point, in float32."""
        if qparams.scale is None:
            raise InputError("Affine needs a scale, but these qparams have none")
        parts = [qparams.scale, qparams.zero_point]
        return tuple(part.to(torch.float32) for part in parts if part is not None)

    def _store(self, scale: Tensor) -> Tensor:
        if self.scale_dtype == scale.dtype:
            return scale
        stored = scale.to(self.scale_dtype)
        error = (stored.to(torch.float32) - scale).abs()
        steps = self.quant_max - self.quant_min
        allowed = max(torch.finfo(self.scale_dtype).eps, 1 / (8 * steps))
        return stored if bool((error <= scale * allowed).all()) else scale
