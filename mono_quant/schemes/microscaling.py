"""Block formats: floats of few bits whose scale is a float of 8."""

from collections.abc import Callable, Mapping
from typing import ClassVar, Self

import attrs
import torch
from torch import Tensor

from mono_quant.configurable import register
from mono_quant.errors import ConfigurationError
from mono_quant.numerics.granularity import PerGroup
from mono_quant.numerics.minifloat import FORMATS, MiniFloat
from mono_quant.schemes.scaled import Scaled

_SCALES = {"e8m0": torch.uint8, "e4m3": torch.float8_e4m3fn}


def _check_granularity(_: object, __: object, granularity: object) -> None:
    if not isinstance(granularity, PerGroup):
        raise ConfigurationError(f"Microscaling has a scale per group, not {granularity!r}")


@register
@attrs.frozen
class Microscaling(Scaled):
    """``value = element * scale`` in small blocks: MXFP4, MXFP6, MXFP8 and NVFP4.

    ========================  ===========================  ==================================
    constructor               element                      scale
    ========================  ===========================  ==================================
    ``mxfp4()``               e2m1, up to 6                e8m0, one for each 32
    ``mxfp6()``               e3m2, up to 28, or e2m3      e8m0, one for each 32
    ``mxfp8()``               e4m3, up to 448, or e5m2     e8m0, one for each 32
    ``nvfp4()``               e2m1                         e4m3, one for each 16, and a float32
    ========================  ===========================  ==================================

    With e8m0 the scale is ``2 ** (floor(log2(max|x|)) - e)``, where `e` is the exponent of the
    largest element, so that the largest values of a block may be clamped. With e4m3 it is the
    nearest e4m3 number to ``max|x| / 6 / global_scale``, where ``global_scale`` is that of the
    whole tensor, ``max|x| / (6 * 448)``. Elements are rounded to the nearest, halves to the even
    mantissa. `MSE` also tries larger scales.

    Sources: Open Compute Project, "OCP Microscaling Formats (MX) Specification", version 1.0,
    sections 5 and 6; NVIDIA, "Pretraining Large Language Models with NVFP4", arXiv 2509.25149,
    appendix C.

    Attributes:
        element: "e2m1", "e2m3", "e3m2", "e4m3" or "e5m2".
        scale: "e8m0" or "e4m3".
        granularity: the group that shares a scale.
    """

    kind: ClassVar[str] = "microscaling"
    element: str = "e2m1"
    scale: str = "e8m0"
    granularity: PerGroup = attrs.field(default=PerGroup(32), validator=_check_granularity)

    def __attrs_post_init__(self) -> None:
        """Refuse formats that there are not."""
        for name, value, known in (
            ("element", self.element, FORMATS),
            ("scale", self.scale, _SCALES),
        ):
            if value not in known:
                names = ", ".join(map(repr, known))
                raise ConfigurationError(f"{name} is one of {names}, not {value!r}")

    @classmethod
    def mxfp4(cls) -> Self:
        """Return MXFP4: 4.25 bits a value."""
        return cls("e2m1")

    @classmethod
    def mxfp6(cls, element: str = "e3m2") -> Self:
        """Return MXFP6, of "e3m2" or "e2m3": 6.25 bits a value."""
        return cls(element)

    @classmethod
    def mxfp8(cls, element: str = "e4m3") -> Self:
        """Return MXFP8, of "e4m3" or "e5m2": 8.25 bits a value."""
        return cls(element)

    @classmethod
    def nvfp4(cls) -> Self:
        """Return NVFP4: 4.5 bits a value."""
        return cls("e2m1", "e4m3", PerGroup(16))

    @property
    def scale_dtype(self) -> torch.dtype:
        """uint8 for e8m0, float8_e4m3fn for e4m3."""
        return _SCALES[self.scale]

    @property
    def code_bits(self) -> int:
        """Bits of an element."""
        return self._format.bits

    @property
    def code_min(self) -> int:
        """Elements of 8 bits are signed bytes; others are counted from 0."""
        return -128 if self._format.bits == 8 else 0

    @property
    def headroom(self) -> float:
        """Twice the range: the next power of two."""
        return 2.0

    @property
    def unit(self) -> float:
        """The largest element, or of scales that are powers of two, the largest such element."""
        return self._format.largest_power if self.scale == "e8m0" else self._format.largest

    def table(self, extra: Mapping[str, Tensor], device: torch.device) -> Tensor:
        """Return the value of each pattern of bits."""
        return torch.tensor(self._format.values, dtype=torch.float32, device=device)

    def encoder(
        self, extra: Mapping[str, Tensor], device: torch.device
    ) -> Callable[[Tensor], Tensor]:
        """Return what finds the element nearest to each value."""
        encode = self._format.encode
        return (lambda values: encode(values).view(torch.int8)) if self.code_min else encode

    def describe(self) -> str:
        """Return the name of the format, or its parts."""
        name = _NAMES.get(self)
        if name is not None:
            return name
        return f"{self.element} with {self.scale} scales {self.granularity.describe()}"

    @property
    def _format(self) -> MiniFloat:
        return FORMATS[self.element]


_NAMES: Mapping[Microscaling, str] = {
    Microscaling.mxfp4(): "MXFP4",
    Microscaling.mxfp6("e3m2"): "MXFP6 (e3m2)",
    Microscaling.mxfp6("e2m3"): "MXFP6 (e2m3)",
    Microscaling.mxfp8("e4m3"): "MXFP8 (e4m3)",
    Microscaling.mxfp8("e5m2"): "MXFP8 (e5m2)",
    Microscaling.nvfp4(): "NVFP4",
}
