"""Evenly spaced grids: integers times a scale, from a zero point on."""

import ctypes
import math
from dataclasses import replace
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from mono_quant.base import Scheme
from mono_quant.configurable import as_dtype, dtype_name, is_count, register
from mono_quant.errors import ConfigurationError, InputError
from mono_quant.numerics.blocks import AT_ONCE, block_counts, block_range, meet, met, row_parts
from mono_quant.numerics.columns import ByColumn, per_column
from mono_quant.numerics.extremes import all_finite
from mono_quant.numerics.granularity import Granularity, PerChannel, Shape
from mono_quant.numerics.packing import packed_length
from mono_quant.numerics.scales import stored_scale
from mono_quant.numerics.values import QParams, QTensor

_TINY = torch.finfo(torch.float32).tiny
_SMALLEST = 1e-30  # of a range whose scale, and the halves that it is made of, are no subnormals
_SATURATED = 0.25
_SPREAD = 13  # codes between those that are looked at first; groups are not in step with it
_WIDER = torch.int16
"""By way of which floats become unsigned bytes in half the time; below 128 signed bytes serve."""

_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def float32(value: float) -> float:
    """Return a number rounded to float32."""
    return ctypes.c_float(value).value


def _decoded(codes: Tensor, scale: Tensor, *zero_point: Tensor) -> Tensor:
    """Return the values of codes that are floats, in their place."""
    for zero in zero_point:
        codes.sub_(zero)
    return codes.mul_(scale)


def _size(block_size: Shape) -> int:
    return torch.Size(block_size).numel()


def _check_bits(_: object, __: object, bits: object) -> None:
    if not is_count(bits, 2) or bits > 8:
        raise ConfigurationError(f"Affine has 2 to 8 bits, not {bits!r}; for 16 use FloatCast()")


def _check_boolean(_: object, field: "attrs.Attribute[bool]", value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigurationError(f"{field.name} is True or False, not {value!r}")


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

    A zero point may also be a float, in the dtype of the scale: the grid then meets both ends of
    the range as closely as that dtype can say, and zero lies on it by chance only. It takes more
    bits (``b + 32 / n`` for a group of n, where a code takes ``b + (16 + b) / n``) and products in
    floats. `HQQ` is made for it.

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
        float_zero_point: whether zero points are floats in the dtype of the scales.
    """

    kind: ClassVar[str] = "affine"
    bits: int = attrs.field(default=8, validator=_check_bits)
    symmetric: bool = attrs.field(default=True, validator=_check_boolean)
    granularity: Granularity = attrs.field(factory=PerChannel, validator=_check_granularity)
    scale_dtype: torch.dtype = attrs.field(default=torch.float16, converter=as_dtype)
    float_zero_point: bool = attrs.field(default=False, validator=_check_boolean)

    def __attrs_post_init__(self) -> None:
        """Refuse dtypes that hold no scales, and a kind of zero points where there are none."""
        if self.scale_dtype not in _SCALE_DTYPES:
            raise ConfigurationError(
                f"scale_dtype is one of {_SCALE_DTYPES}, not {self.scale_dtype}"
            )
        if self.symmetric and self.float_zero_point:
            raise ConfigurationError(
                "a symmetric grid has no zero point that could be a float; say symmetric=False"
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

    @property
    def has_zero_point(self) -> bool:
        """Whether it is asymmetric."""
        return not self.symmetric

    def hold_zero_point(self, zero_point: Tensor, scale: Tensor) -> Tensor:
        """Return floats in the dtype of `scale`, or the nearest codes, clamped."""
        if self.float_zero_point:
            return super().hold_zero_point(zero_point, scale)
        return zero_point.round().clamp_(self.quant_min, self.quant_max).to(torch.uint8)

    def nbytes(self, shape: Shape) -> int:
        """Return the bytes of codes, scales and zero points of a packed stack of `shape`."""
        *rows, length = shape
        blocks = torch.Size(block_counts(shape, self.granularity.block_size(shape))).numel()
        codes = torch.Size(rows).numel() * packed_length(length, self.bits)
        scales = blocks * self.scale_dtype.itemsize
        if self.symmetric:
            return codes + scales
        return (
            codes + scales + (scales if self.float_zero_point else packed_length(blocks, self.bits))
        )

    def calculate_qparams(self, min_val: Tensor, max_val: Tensor, *, block_size: Shape) -> QParams:
        """Return scale and zero point for ``[min_val, max_val]``, each one value per block.

        A block of nothing but zeros has scale 1.

        Raises:
            InputError: a bound is NaN or infinite, or so large that a grid over it is.
        """
        low, high = min_val.to(torch.float32), max_val.to(torch.float32)
        if not (all_finite(low) and all_finite(high)):
            raise InputError("a range is not finite: the tensor holds NaN or infinity")
        qparams = self._cover(low, high, block_size)
        if not all_finite(self._largest(qparams)):
            largest = float(torch.maximum(high, -low).max())
            raise InputError(
                f"values up to {largest:.3g} are too large: the ends of a {self.bits}-bit grid "
                "over them pass the largest float32"
            )
        return qparams

    def _largest(self, qparams: QParams) -> Tensor:
        """Return the magnitude of the larger end of the grid of each block."""
        scale, *zero_point = self._parts(qparams)
        if not zero_point:
            return scale * self.quant_max
        below = zero_point[0] - self.quant_min
        return scale * torch.maximum(below, self.quant_max - zero_point[0])

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
        scale = scale.clamp_(min=_TINY).masked_fill_(empty, 1.0)
        scale = stored_scale(scale, self.scale_dtype, self._eighth)
        if self.symmetric:
            return QParams(scale, None, block_size)
        zero_point = low.div_(scale).neg_().add_(self.quant_min)
        return QParams(scale, self.hold_zero_point(zero_point, scale), block_size)

    def scales(self, qparams: QParams) -> Tensor | None:
        """Return the scales in float32."""
        return qparams.scale.to(torch.float32) if qparams.scale is not None else None

    def rescaled(self, qparams: QParams, scales: Tensor) -> QParams:
        """Return the parameters with other scales, as this grid stores them."""
        return replace(qparams, scale=stored_scale(scales, self.scale_dtype, self._eighth))

    @property
    def _eighth(self) -> float:
        """An eighth of a step, as a share of the whole range."""
        return 1 / (8 * (self.quant_max - self.quant_min))

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
        most = self.quant_max  # a property, as the least one is, which is 0 here
        scale = float32(float32(high * 0.5 - low * 0.5) / (most / 2))
        return scale, min(max(-round(float32(low / scale)), 0), most)

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
        found = met(self._rounded(values, scale.reciprocal(), *zero_point), x.shape)
        return QTensor(self._coded(found), qparams, x.dtype)

    def quantize_rows(self, stack: Tensor, qparams: QParams) -> QTensor:
        """Return what `quantize` does of many rows, computed in the same memory."""
        scale, *zero_point = self._parts(qparams)
        grid = (scale.reciprocal(), *zero_point)
        dtype = torch.int8 if self.symmetric else torch.uint8
        codes = torch.empty(stack.shape, dtype=dtype, device=stack.device)
        signed = codes.view(torch.int8)
        room: Tensor | None = None
        for part in row_parts((stack.shape[0], stack.shape[1], stack.shape[2])):
            rows = stack[:, part]
            parts = meet(rows, qparams.block_size, *(each[:, part] for each in grid))
            if room is None or room.shape != parts[0].shape:
                room = torch.empty(parts[0].shape, dtype=torch.float32, device=stack.device)
            found = met(self._rounded(*parts, out=room), tuple(rows.shape))
            if self.symmetric or self.bits < 8:
                signed[:, part] = found
            else:
                codes[:, part] = found.to(_WIDER)
        return QTensor(codes, qparams, stack.dtype)

    def _rounded(
        self,
        values: Tensor,
        reciprocal: Tensor,
        *zero_point: Tensor,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return the codes of values as floats, where `out` is given, there."""
        values = torch.mul(values, reciprocal, out=out)
        for zero in zero_point:
            values += zero
        return values.round_().clamp_(self.quant_min, self.quant_max)

    def _coded(self, codes: Tensor) -> Tensor:
        """Return codes that are floats as the integers that they are."""
        if self.symmetric:
            return codes.to(torch.int8)
        if torch.compiler.is_compiling():
            return codes.to(torch.uint8)
        if self.bits < 8:
            return codes.to(torch.int8).view(torch.uint8)
        return codes.to(_WIDER).to(torch.uint8)

    def dequantize(self, q: QTensor) -> Tensor:
        """Return ``(code - zero_point) * scale`` in float32."""
        scale, *zero_point = self._parts(q.qparams)
        codes = q.codes.to(torch.float32)
        values, scale, *zero_point = meet(codes, q.qparams.block_size, scale, *zero_point)
        return met(_decoded(values, scale, *zero_point), q.codes.shape)

    def by_column(self, qparams: QParams, order: Tensor) -> ByColumn:
        """Return what quantizes single columns, with reciprocals that are found once."""
        scale, *zero_point = self._parts(qparams)
        reciprocals, scales, *zero_points = (
            per_column(part, qparams.block_size, order)
            for part in (scale.reciprocal(), scale, *zero_point)
        )

        def nearest(x: Tensor, place: int) -> tuple[Tensor, Tensor]:
            zero = [each[place] for each in zero_points]
            found = self._rounded(x.to(torch.float32), reciprocals[place], *zero)
            codes = self._coded(found)
            return codes, _decoded(found, scales[place], *zero)

        return nearest

    def describe(self) -> str:
        """Return width, symmetry and granularity, and where zero points are floats, that."""
        grid = "symmetric" if self.symmetric else "asymmetric"
        zeros = ", float zero points" if self.float_zero_point else ""
        return f"{self.bits}-bit {grid} {self.granularity.describe()}{zeros}"

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
            share = self._at_ends(q.codes)
            if share > _SATURATED:
                remarks.append(f"{share:.0%} of its codes lie on the ends of the grid")
        return "; ".join(remarks) or None

    def _at_ends(self, codes: Tensor) -> float:
        """Return the share of the codes that are the smallest or the largest, 0 to 1.

        Of some evenly spread ones, where those are far from saturated.
        """
        flat = codes.flatten()
        some = flat[::_SPREAD] if flat.numel() > AT_ONCE else flat
        share = self._count_ends(some) / max(1, some.numel())
        if share < _SATURATED / 2 or some is flat:
            return share
        return self._count_ends(flat) / flat.numel()

    def _count_ends(self, codes: Tensor) -> int:
        """Return how many codes are the smallest or the largest.

        By what clamping one step further in changes: comparing bytes takes ten times as long.
        """
        counts = [
            codes_at_once.clamp(self.quant_min + 1, self.quant_max - 1)
            .bitwise_xor_(codes_at_once)
            .count_nonzero()
            for codes_at_once in torch.split(codes, AT_ONCE)
        ]
        return int(torch.stack(counts).sum())

    def _parts(self, qparams: QParams) -> tuple[Tensor, ...]:
        """Return scale and, where there is one, zero point, in float32."""
        if qparams.scale is None:
            raise InputError("Affine needs a scale, but these qparams have none")
        parts = [qparams.scale, qparams.zero_point]
        return tuple(part.to(torch.float32) for part in parts if part is not None)
