"""Floats of 8 bits, times a scale."""

from collections.abc import Callable, Mapping
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from mono_quant.configurable import as_dtype, dtype_name, register
from mono_quant.errors import ConfigurationError
from mono_quant.numerics.blocks import block_range
from mono_quant.numerics.granularity import Granularity, PerChannel
from mono_quant.numerics.minifloat import FORMATS, MiniFloat
from mono_quant.numerics.values import QParams
from mono_quant.schemes.scaled import (
    Scaled,
    check_granularity,
    check_scale_dtype,
    words_of_scales,
)

_TINY = torch.finfo(torch.float32).tiny
_FORMATS = {found.dtype: found for found in FORMATS.values() if found.dtype is not None}


@register
@attrs.frozen
class Float8(Scaled):
    """``value = float * scale``: an 8-bit float for each value, ``scale = max|x| / largest``.

    ``float8_e4m3fn`` has 4 significant bits and ends at 448, ``float8_e5m2`` has 3 and ends at
    57344. Values are rounded to the nearest float, halves to the even mantissa, as torch's own cast
    does. A code is the float's bits as a signed byte: ``codes.view(torch.float8_e4m3fn)`` reads it.

    Source: Open Compute Project, "OCP 8-bit Floating Point Specification (OFP8)", revision 1.0.

    Attributes:
        dtype: float8_e4m3fn or float8_e5m2.
        granularity: which values share one scale.
        scale_dtype: float32, bfloat16 or float16, which is soon too coarse: scales are small where
            the largest float is large.
    """

    kind: ClassVar[str] = "float8"
    dtype: torch.dtype = attrs.field(default=torch.float8_e4m3fn, converter=as_dtype)
    granularity: Granularity = attrs.field(factory=PerChannel, validator=check_granularity)
    scale_dtype: torch.dtype = attrs.field(default=torch.float32, converter=as_dtype)

    def __attrs_post_init__(self) -> None:
        """Refuse other dtypes."""
        if self.dtype not in _FORMATS:
            known = " or ".join(map(dtype_name, _FORMATS))
            raise ConfigurationError(f"Float8 is to {known}, not {dtype_name(self.dtype)}")
        check_scale_dtype(self.scale_dtype)

    @property
    def code_bits(self) -> int:
        """A byte."""
        return 8

    @property
    def code_min(self) -> int:
        """The smallest signed byte: the bits of minus zero."""
        return -128

    @property
    def unit(self) -> float:
        """The largest float."""
        return self._format.largest

    def table(self, extra: Mapping[str, Tensor], device: torch.device) -> Tensor:
        """Return the float of each pattern of bits."""
        return torch.tensor(self._format.values, dtype=torch.float32, device=device)

    def encoder(
        self, extra: Mapping[str, Tensor], device: torch.device
    ) -> Callable[[Tensor], Tensor]:
        """Return what finds the bits of the nearest float of each value, as signed bytes."""
        encode = self._format.encode
        return lambda values: encode(values).view(torch.int8)

    def decoded(self, codes: Tensor, extra: Mapping[str, Tensor]) -> Tensor:
        """Return the float of each code, as torch casts it."""
        return codes.view(self.dtype).to(torch.float32)

    def dynamic_qparams(self, x: Tensor) -> QParams:
        """Return `calculate_qparams` of the smallest and largest values, whatever they are."""
        block_size = self.granularity.block_size(tuple(x.shape))
        low, high = block_range(x, block_size)
        magnitude = torch.maximum(high, -low).to(torch.float32)
        return QParams(self.stored((magnitude / self.unit).clamp_(min=_TINY)), None, block_size)

    def describe(self) -> str:
        """Return the dtype and the granularity."""
        scales = words_of_scales(self.scale_dtype, torch.float32)
        return f"{dtype_name(self.dtype)} {self.granularity.describe()}{scales}"

    @property
    def _format(self) -> MiniFloat:
        return _FORMATS[self.dtype]
