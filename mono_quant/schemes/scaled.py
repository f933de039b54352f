"""Tables of levels times a scale: what all grids that are not evenly spaced have in common."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from mono_quant.base import RangeEstimator, Scheme
from mono_quant.configurable import dtype_name
from mono_quant.errors import ConfigurationError, InputError
from mono_quant.numerics.blocks import block_counts, block_range, meet, met
from mono_quant.numerics.columns import ByColumn, per_column
from mono_quant.numerics.granularity import Granularity, Shape
from mono_quant.numerics.minifloat import FORMATS, POWERS, power_below
from mono_quant.numerics.packing import packed_length
from mono_quant.numerics.scales import divisor_of, stored_scale
from mono_quant.numerics.tables import look_up
from mono_quant.numerics.values import QParams, QTensor

_TINY = torch.finfo(torch.float32).tiny
_E4M3 = torch.float8_e4m3fn
_LARGEST_SCALE, _SMALLEST_SCALE = FORMATS["e4m3"].largest, 2.0**-9
_PLAIN = (torch.float16, torch.bfloat16, torch.float32)
_GLOBAL = "global_scale"


class Scaled(Scheme):
    """``value = level * scale``: a code is the place of a level in a table.

    A scale is ``max|x| / unit`` of its block, stored in `scale_dtype`:

    - ``float16``, ``bfloat16`` or ``float32``. Scales that the first two cannot hold are float32,
      as with `Affine`.
    - ``float8_e4m3fn``, times a `global_scale` for the whole tensor, ``float32 [1]``, which puts
      the largest of them on the largest number of that dtype:
      ``value = level * (scale * global_scale)``.
    - ``uint8``: the power of two at or below it, as an e8m0 byte.

    A block of nothing but zeros has scale 0 (as a byte, ``2 ** -127``).
    """

    __slots__ = ()
    decodes_rows: ClassVar[bool] = True

    @property
    @abstractmethod
    def scale_dtype(self) -> torch.dtype:
        """The dtype that scales are stored in."""

    @property
    @abstractmethod
    def code_bits(self) -> int:
        """Bits of one code."""

    @property
    def unit(self) -> float:
        """What a scale of one stands for: the magnitude of the largest level."""
        return 1.0

    @property
    def takes_sign(self) -> bool:
        """Whether a scale has the sign of its block's largest magnitude."""
        return False

    @property
    def extras(self) -> Mapping[str, tuple[Shape, torch.dtype]]:
        """Shape and dtype of what stands beside codes and scales, by name."""
        return self._of_scales

    @abstractmethod
    def table(self, extra: Mapping[str, Tensor], device: torch.device) -> Tensor:
        """Return the value of each code, its bits read as an unsigned number: float32 ``[2^b]``."""

    @abstractmethod
    def encoder(
        self, extra: Mapping[str, Tensor], device: torch.device
    ) -> Callable[[Tensor], Tensor]:
        """Return what finds the code of the level nearest to each of some scaled values."""

    def shared(self, x: Tensor, observer: RangeEstimator, block_size: Shape) -> dict[str, Tensor]:
        """Return what all blocks of `x` share: its `extra`."""
        return self._shared_by(*block_range(x, block_size))

    def nbytes(self, shape: Shape) -> int:
        """Return the bytes of codes, scales and what all blocks share, of a packed stack."""
        *rows, length = shape
        blocks = torch.Size(block_counts(shape, self.granularity.block_size(shape))).numel()
        codes = torch.Size(rows).numel() * packed_length(length, self.code_bits)
        extras = sum(
            torch.Size(size).numel() * dtype.itemsize for size, dtype in self.extras.values()
        )
        return codes + blocks * self.scale_dtype.itemsize + extras

    def calculate_qparams(self, min_val: Tensor, max_val: Tensor, *, block_size: Shape) -> QParams:
        """Return the scales for ``[min_val, max_val]``, each one value per block.

        Raises:
            InputError: a bound is NaN or infinite.
        """
        return self.cover(min_val, max_val, block_size, self._shared_by(min_val, max_val))

    def choose_qparams(self, x: Tensor, observer: RangeEstimator) -> QParams:
        """Return what all of `x` shares, and scales for the ranges that `observer` finds with it.

        Raises:
            InputError: `x` holds NaN or infinity.
        """
        block_size = self.granularity.block_size(tuple(x.shape))
        held = self.holding(self.shared(x, observer, block_size))
        low, high = observer.range_of(x, held, block_size)
        return held.calculate_qparams(low, high, block_size=block_size)

    def holding(self, extra: Mapping[str, Tensor]) -> Scheme:
        """Return this grid with what all blocks share given, for ranges of some of them."""
        return Held(self, extra) if extra else self

    def cover(
        self, low: Tensor, high: Tensor, block_size: Shape, extra: Mapping[str, Tensor]
    ) -> QParams:
        """Return the scales for ``[low, high]``, where what all blocks share is given."""
        low, high = low.to(torch.float32), high.to(torch.float32)
        magnitude = torch.maximum(high, -low)
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            raise InputError("a range is not finite: the tensor holds NaN or infinity")
        scale = (magnitude / self.unit).clamp_(min=_TINY)
        empty = magnitude == 0
        if self.scale_dtype is torch.uint8:
            return QParams(power_below(scale).masked_fill_(empty, 0), None, block_size, extra)
        if _GLOBAL in extra:
            scale = (scale / extra[_GLOBAL]).clamp_(_SMALLEST_SCALE, _LARGEST_SCALE)
        scale = scale.masked_fill_(empty, 0)
        if self.takes_sign:
            scale = torch.where(high < -low, -scale, scale)
        if _GLOBAL in extra:
            return QParams(scale.to(_E4M3), None, block_size, extra)
        return QParams(self.stored(scale), None, block_size, extra)

    def stored(self, scale: Tensor) -> Tensor:
        """Return float32 scales in `scale_dtype`, or as they are where that is too coarse."""
        return stored_scale(scale, self.scale_dtype, 1 / (8 << self.code_bits))

    def scales(self, qparams: QParams) -> Tensor:
        """Return what levels are multiplied by, a float32 value per block.

        Raises:
            InputError: the parameters are not of this scheme.
        """
        scale, extra = qparams.scale, qparams.extra
        if scale is None:
            raise InputError(f"{type(self).__name__} needs a scale, but these qparams have none")
        if missing := set(self.extras) - set(extra):
            raise InputError(f"{type(self).__name__} needs {', '.join(sorted(missing))}")
        if scale.dtype is torch.uint8:
            return look_up(scale, torch.tensor(POWERS, dtype=torch.float32, device=scale.device))
        wide = scale.to(torch.float32)
        return wide * extra[_GLOBAL] if _GLOBAL in self.extras else wide

    def rescaled(self, qparams: QParams, scales: Tensor) -> QParams:
        """Return the parameters with other scales, as this grid stores them.

        Bytes that are powers of two stay: the next one is twice as large.
        """
        if self.scale_dtype is torch.uint8:
            return qparams
        if _GLOBAL in qparams.extra:
            wanted = (scales / qparams.extra[_GLOBAL]).clamp(-_LARGEST_SCALE, _LARGEST_SCALE)
            return replace(qparams, scale=wanted.to(_E4M3))
        return replace(qparams, scale=self.stored(scales))

    @property
    def step(self) -> float:
        """The mean distance of neighbouring levels."""
        return 2 * self.unit / ((1 << self.code_bits) - 1)

    def quantize(self, x: Tensor, qparams: QParams) -> QTensor:
        """Return the code of the nearest level to each value over its scale, in float32."""
        values = x if x.dtype in _PLAIN else x.to(torch.float32)
        values, scale = meet(values, qparams.block_size, self.scales(qparams))
        values = met(values / divisor_of(scale), x.shape)  # in float32, as scales are
        return QTensor(self.encoder(qparams.extra, x.device)(values), qparams, x.dtype)

    def dequantize(self, q: QTensor) -> Tensor:
        """Return the level of each code times its scale, in float32."""
        values = self.decoded(q.codes, q.qparams.extra)
        values, scale = meet(values, q.qparams.block_size, self.scales(q.qparams))
        return met(values.mul_(scale), q.codes.shape)

    def by_column(self, qparams: QParams, order: Tensor) -> ByColumn:
        """Return what quantizes single columns, with a table and divisors that are found once."""
        scale = self.scales(qparams)
        scales, divisors = (
            per_column(part, qparams.block_size, order) for part in (scale, divisor_of(scale))
        )
        encode = self.encoder(qparams.extra, scale.device)
        table = self.table(qparams.extra, scale.device)

        def nearest(x: Tensor, place: int) -> tuple[Tensor, Tensor]:
            codes = encode(x / divisors[place])
            return codes, look_up(codes.view(torch.uint8), table).mul_(scales[place])

        return nearest

    def decoded(self, codes: Tensor, extra: Mapping[str, Tensor]) -> Tensor:
        """Return the level of each code in float32."""
        return look_up(codes.view(torch.uint8), self.table(extra, codes.device))

    def remark(self, q: QTensor) -> str | None:
        """Return that scales had to be wider than was asked for, or None."""
        scale = q.qparams.scale
        if scale is None or scale.dtype == self.scale_dtype:
            return None
        return (
            f"its scales are {dtype_name(scale.dtype)}, since {dtype_name(self.scale_dtype)} "
            "cannot hold them closely enough"
        )

    def refuse_parts(self, parts: Mapping[str, Tensor], shape: Shape) -> str | None:
        """Return why the tensors of a file are not those of this scheme, or None."""
        expected = {"codes", "scale", *self.extras}
        if set(parts) != expected:
            found = ", ".join(sorted(parts))
            return f"it has {found}, where {', '.join(sorted(expected))} was expected"
        may_be = {self.scale_dtype} | ({torch.float32} if self.scale_dtype in _PLAIN else set())
        if parts["scale"].dtype not in may_be:
            return f"scale is of {parts['scale'].dtype}"
        for name, (size, dtype) in self.extras.items():
            if tuple(parts[name].shape) != size or parts[name].dtype != dtype:
                return f"{name} is {tuple(parts[name].shape)} of {parts[name].dtype}"
            if not bool(torch.isfinite(parts[name]).all()):
                return f"{name} holds NaN or infinity"
        return None

    @property
    def _of_scales(self) -> Mapping[str, tuple[Shape, torch.dtype]]:
        return {_GLOBAL: ((1,), torch.float32)} if self.scale_dtype is _E4M3 else {}

    def _shared_by(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        """Return what all blocks share, by their ranges alone."""
        if self.scale_dtype is not _E4M3:
            return {}
        if not low.numel():
            return {_GLOBAL: torch.ones(1, device=low.device)}
        magnitude = torch.maximum(high.amax(), -low.amin()).to(torch.float32).reshape(1)
        scale = (magnitude / self.unit / _LARGEST_SCALE).clamp_(min=_TINY)
        return {_GLOBAL: scale.masked_fill_(magnitude == 0, 1.0)}


@attrs.frozen(eq=False)
class Held(Scheme):
    """A scheme with what all blocks of a tensor share given: what ranges are searched on."""

    kind: ClassVar[str] = "held"
    of: Scaled
    extra: Mapping[str, Tensor]

    @property
    def headroom(self) -> float:
        """That of the scheme."""
        return self.of.headroom

    @property
    def granularity(self) -> Granularity:
        """That of the scheme."""
        return self.of.granularity

    @property
    def code_bits(self) -> int:
        """That of the scheme."""
        return self.of.code_bits

    @property
    def code_min(self) -> int:
        """That of the scheme."""
        return self.of.code_min

    def nbytes(self, shape: Shape) -> int:
        """Return that of the scheme."""
        return self.of.nbytes(shape)

    def calculate_qparams(self, min_val: Tensor, max_val: Tensor, *, block_size: Shape) -> QParams:
        """Return the scales for ``[min_val, max_val]`` beside what is held."""
        return self.of.cover(min_val, max_val, block_size, self.extra)

    def quantize(self, x: Tensor, qparams: QParams) -> QTensor:
        """Return what the scheme does."""
        return self.of.quantize(x, qparams)

    def dequantize(self, q: QTensor) -> Tensor:
        """Return what the scheme does."""
        return self.of.dequantize(q)

    def approximate(self, x: Tensor, qparams: QParams) -> Tensor:
        """Return what the scheme does."""
        return self.of.approximate(x, qparams)


def check_scale_dtype(dtype: torch.dtype, *others: torch.dtype) -> None:
    """Refuse a dtype that holds no scales.

    Raises:
        ConfigurationError: it is none of float16, bfloat16, float32 and the `others`.
    """
    if dtype not in (*_PLAIN, *others):
        known = ", ".join(map(dtype_name, (*_PLAIN, *others)))
        raise ConfigurationError(f"scale_dtype is one of {known}, not {dtype_name(dtype)}")


def check_granularity(_: object, __: object, granularity: object) -> None:
    """Refuse what is no granularity."""
    if not isinstance(granularity, Granularity):
        raise ConfigurationError(f"granularity is a Granularity, not {granularity!r}")


def words_of_scales(dtype: torch.dtype, usual: torch.dtype = torch.float16) -> str:
    """Return what reports say of scales that are stored in another dtype than is usual."""
    return "" if dtype is usual else f", {dtype_name(dtype)} scales"
