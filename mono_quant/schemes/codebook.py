"""Lookup tables: published ones, and ones that are fitted to each weight."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar, Self

import attrs
import torch
from torch import Tensor

from mono_quant.base import RangeEstimator
from mono_quant.configurable import as_dtype, is_count, register
from mono_quant.errors import ConfigurationError
from mono_quant.numerics.blocks import block_range, meet, to_blocks
from mono_quant.numerics.granularity import Granularity, PerGroup, Shape
from mono_quant.numerics.tables import Levels, fitted, spread_levels
from mono_quant.numerics.values import QParams
from mono_quant.schemes.scaled import (
    Scaled,
    check_granularity,
    check_scale_dtype,
    words_of_scales,
)

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""NormalFloat4: quantiles of the normal distribution, of both signs, with an exact zero.

Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314,
appendix E.
"""

TABLES: Mapping[str, tuple[float, ...]] = {"nf4": NF4}
"""Tables by their name."""

_LEVELS = "levels"
_GROUPS = PerGroup(64)
_SAMPLED = 1 << 15  # values that a table is fitted to
_FITS = 3
_STEPS = 30


def _as_table(levels: str | Iterable[float]) -> str | tuple[float, ...]:
    return levels if isinstance(levels, str) else tuple(map(float, levels))


class _Tables(Scaled):
    """Grids whose table is of ascending levels, and codes their places."""

    __slots__ = ()

    def encoder(
        self, extra: Mapping[str, Tensor], device: torch.device
    ) -> Callable[[Tensor], Tensor]:
        """Return what finds the place of the nearest level of each value."""
        return Levels(self.table(extra, device)).nearest

    def approximate(self, x: Tensor, qparams: QParams) -> Tensor:
        """Return a level near each value times its scale; about halfway it may be either."""
        levels = Levels(self.table(qparams.extra, x.device))
        values, scale = meet(x.to(torch.float32), qparams.block_size, self.scales(qparams))
        return levels.on_grid(values, scale).reshape(x.shape)


@register
@attrs.frozen
class Codebook(_Tables):
    """``value = table[code] * scale``, ``scale = max|x|``: the nearest of 4 to 256 levels.

    Halfway between two levels, a value goes to the lower one, as in bitsandbytes.

    Attributes:
        levels: the name of a table ("nf4"), or ``2 ** bits`` numbers within -1 and 1, ascending.
        granularity: which values share one scale.
        scale_dtype: float16, bfloat16, float32, or float8_e4m3fn times one float32 for the tensor.
    """

    kind: ClassVar[str] = "codebook"
    levels: str | tuple[float, ...] = attrs.field(default="nf4", converter=_as_table)
    granularity: Granularity = attrs.field(factory=PerGroup, validator=check_granularity)
    scale_dtype: torch.dtype = attrs.field(default=torch.float16, converter=as_dtype)

    def __attrs_post_init__(self) -> None:
        """Refuse tables that are none."""
        check_scale_dtype(self.scale_dtype, torch.float8_e4m3fn)
        if isinstance(self.levels, str):
            if self.levels not in TABLES:
                known = ", ".join(map(repr, TABLES))
                raise ConfigurationError(
                    f"there is no table {self.levels!r}, only {known}; levels=(...) gives your own"
                )
            return
        bits = math.log2(len(self.levels)) if self.levels else 0
        if bits not in range(2, 9):
            raise ConfigurationError(
                f"a table has 4, 8, 16, 32, 64, 128 or 256 levels, not {len(self.levels)}"
            )
        low, high = self.levels[0], self.levels[-1]
        ascending = all(
            one < other for one, other in zip(self.levels, self.levels[1:], strict=False)
        )
        if not ascending or not -1 <= low < high <= 1:
            raise ConfigurationError(
                "levels ascend within -1 and 1 (divide them by the largest): "
                f"they are {self.levels!r}"
            )

    @classmethod
    def nf4(
        cls,
        granularity: Granularity = _GROUPS,
        scale_dtype: torch.dtype = torch.float16,
    ) -> Self:
        """Return NormalFloat4: 4.25 bits a value in groups of 64, with half-precision scales."""
        return cls("nf4", granularity, scale_dtype)

    @property
    def code_bits(self) -> int:
        """Bits that count the levels."""
        return (len(self._numbers) - 1).bit_length()

    @property
    def _numbers(self) -> tuple[float, ...]:
        return TABLES[self.levels] if isinstance(self.levels, str) else self.levels

    def table(self, extra: Mapping[str, Tensor], device: torch.device) -> Tensor:
        """Return the table."""
        return torch.tensor(self._numbers, dtype=torch.float32, device=device)

    def describe(self) -> str:
        """Return the table, the granularity and uncommon scales."""
        bits = self.code_bits
        name = self.levels.upper() if isinstance(self.levels, str) else f"{bits}-bit codebook"
        return f"{name} {self.granularity.describe()}{words_of_scales(self.scale_dtype)}"


def _check_bits(_: object, __: object, bits: object) -> None:
    if not is_count(bits, 2) or bits > 8:
        raise ConfigurationError(f"a codebook has 2 to 8 bits, not {bits!r}")


@register
@attrs.frozen
class FittedCodebook(_Tables):
    """``value = table[code] * scale``, with a table of ``2 ** bits`` levels fitted to each weight.

    A scale is ``max|x|`` with the sign of that value, which thus lies at 1 whatever its sign; the
    table then needs no levels near -1. It is k-means of the scaled values, weighted by the squares
    of their scales, so that it is the squared error of the weight that shrinks; one level is zero,
    so that zeros stay zeros. Where the observer searches ranges, both are found by turns. The table
    is ``levels`` in `QParams.extra`, ``float16 [2 ** bits]``.

    Sources: Lloyd, "Least Squares Quantization in PCM", IEEE Transactions on Information Theory 28
    (1982); for the sign, Blumenberg et al., "Improving Block-Wise LLM Quantization by 4-bit
    Block-Wise Optimal Float (BOF4)", arXiv 2505.06653.

    Attributes:
        bits: 2 to 8.
        granularity: which values share one scale; the table is of the whole weight.
        scale_dtype: float16, bfloat16, float32, or float8_e4m3fn times one float32 for the tensor.
    """

    kind: ClassVar[str] = "fitted_codebook"
    bits: int = attrs.field(default=4, validator=_check_bits)
    granularity: Granularity = attrs.field(factory=PerGroup, validator=check_granularity)
    scale_dtype: torch.dtype = attrs.field(default=torch.float16, converter=as_dtype)

    def __attrs_post_init__(self) -> None:
        """Refuse dtypes that hold no scales."""
        check_scale_dtype(self.scale_dtype, torch.float8_e4m3fn)

    @property
    def code_bits(self) -> int:
        """The width of a code."""
        return self.bits

    @property
    def takes_sign(self) -> bool:
        """Yes."""
        return True

    @property
    def extras(self) -> Mapping[str, tuple[Shape, torch.dtype]]:
        """The table, and of 8-bit scales the global one."""
        # compilers cannot trace the super() of a property
        return {_LEVELS: ((1 << self.bits,), torch.float16), **self._of_scales}

    def table(self, extra: Mapping[str, Tensor], device: torch.device) -> Tensor:
        """Return the fitted table."""
        return extra[_LEVELS].to(torch.float32)

    def shared(self, x: Tensor, observer: RangeEstimator, block_size: Shape) -> dict[str, Tensor]:
        """Return the table, fitted to some blocks of `x`, and of 8-bit scales the global one."""
        extra = super().shared(x, observer, block_size)
        if not x.numel():
            return extra
        sample = _sample(x, block_size)
        block = (1, 1, sample.shape[2])
        ends = block_range(sample, block)
        for turn in range(_FITS):
            held = self.holding(extra)
            if turn:
                before, ends = ends, observer.range_of(sample, held, block)
                if all(map(torch.equal, before, ends)):
                    break
            scale = self.scales(held.calculate_qparams(*ends, block_size=block))
            some = (scale != 0).expand_as(sample)
            if not bool(some.any()):
                break
            values = (sample / scale)[some]
            weights = (scale / scale.abs().amax()).square().expand_as(sample)[some]
            levels = extra[_LEVELS].to(torch.float32)
            if not turn:
                levels = spread_levels(values, 1 << self.bits)
            levels = fitted(values, weights, levels, int(levels.abs().argmin()), _STEPS)
            extra[_LEVELS] = levels.clamp(-1, 1).to(torch.float16)
        return extra

    def _shared_by(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        """Return what ranges alone tell: even levels."""
        half = 1 << self.bits - 1
        even = torch.arange(1 - half, half + 1, dtype=torch.float32, device=low.device) / half
        return {_LEVELS: even.to(torch.float16), **super()._shared_by(low, high)}

    def describe(self) -> str:
        """Return the width, the granularity and uncommon scales."""
        granularity = self.granularity.describe()
        return f"{self.bits}-bit fitted codebook {granularity}{words_of_scales(self.scale_dtype)}"


def _sample(x: Tensor, block_size: Shape) -> Tensor:
    """Return blocks of a tensor as rows ``[1, n, values]``, evenly spread over it.

    No more of them than are needed to fit a table; of very large ones some values and both ends.
    """
    blocks = to_blocks(x, block_size)  # [n0, b0, n1, b1, ...]
    order = [*range(0, blocks.dim(), 2), *range(1, blocks.dim(), 2)]
    rows = blocks.permute(order).reshape(torch.Size(blocks.shape[::2]).numel(), -1)
    rows = rows[:: max(1, rows.numel() // _SAMPLED)]
    apart_by = rows.shape[1] // _SAMPLED
    if apart_by > 1:
        ends = (rows.amin(1, keepdim=True), rows.amax(1, keepdim=True))
        rows = torch.cat([rows[:, ::apart_by], *ends], dim=1)
    return rows.unsqueeze(0)
