"""Floats of 4 to 8 bits: their values, and rounding to them.

A pattern is sign, exponent and mantissa, the lowest bit of the mantissa being bit 0. Source of the
formats: Open Compute Project, "OCP Microscaling Formats (MX) Specification", version 1.0, 2023, and
"OCP 8-bit Floating Point Specification (OFP8)", revision 1.0, 2023.
"""

import math
from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

EXPONENT_BIAS = 127
"""What is added to the exponent of an e8m0 scale."""


@attrs.frozen
class MiniFloat:
    """One format.

    Attributes:
        exponent: bits of the exponent; its bias is ``2 ** (exponent - 1) - 1``.
        mantissa: bits of the mantissa.
        largest: the largest finite value.
        dtype: torch's own, where it has one that holds a value a byte.
        values: the value of every pattern, from 0 on; those beyond `largest` are NaN or infinity.
    """

    exponent: int
    mantissa: int
    largest: float
    dtype: torch.dtype | None = None
    values: tuple[float, ...] = attrs.field(init=False, repr=False)

    @values.default
    def _every_value(self) -> tuple[float, ...]:
        found = [self._value(pattern) for pattern in range(1 << self.bits - 1)]
        return (*found, *(-value for value in found))

    @property
    def bits(self) -> int:
        """Bits of a pattern."""
        return 1 + self.exponent + self.mantissa

    @property
    def least_exponent(self) -> int:
        """The exponent of the smallest normal value."""
        return 2 - (1 << self.exponent - 1)

    @property
    def largest_power(self) -> float:
        """The largest power of two."""
        return 2.0 ** math.floor(math.log2(self.largest))

    def encode(self, x: Tensor) -> Tensor:
        """Return the pattern of the nearest value of each float32 value, ``uint8`` like `x`.

        Halves go to the even mantissa, and what lies beyond `largest` to `largest`.
        """
        bounded = x.clamp(-self.largest, self.largest)
        if self.dtype is not None:
            return bounded.to(self.dtype).view(torch.uint8)
        power = (bounded.view(torch.int32) & _EXPONENT).view(torch.float32)  # 0 of a denormal one
        power.clamp_(min=2.0**self.least_exponent)
        # how often the power doubled, and the mantissa with its leading one, both in mantissa units
        octave = (power.view(torch.int32) >> 23) - (EXPONENT_BIAS + self.least_exponent)
        digits = bounded.abs().div_(power).mul_(1 << self.mantissa).round_().to(torch.int32)
        pattern = (octave << self.mantissa) + digits  # a mantissa that overflows is the next power
        negative = (bounded.view(torch.int32) < 0).to(torch.int32)
        return (pattern | negative << self.bits - 1).to(torch.uint8)

    def _value(self, pattern: int) -> float:
        """Return the value of a pattern without its sign."""
        exponent, mantissa = divmod(pattern, 1 << self.mantissa)
        leading = 1 << self.mantissa if exponent else 0
        power = self.least_exponent + max(0, exponent - 1) - self.mantissa
        value = (leading + mantissa) * 2.0**power
        if value <= self.largest:
            return value
        infinite = self.dtype is torch.float8_e5m2 and mantissa == 0
        return math.inf if infinite else math.nan


_EXPONENT = 0x7F800000  # bits of the exponent of a float32

FORMATS: Mapping[str, MiniFloat] = {
    "e2m1": MiniFloat(2, 1, 6.0),
    "e2m3": MiniFloat(2, 3, 7.5),
    "e3m2": MiniFloat(3, 2, 28.0),
    "e4m3": MiniFloat(4, 3, 448.0, torch.float8_e4m3fn),
    "e5m2": MiniFloat(5, 2, 57344.0, torch.float8_e5m2),
}
"""By the name that their specifications give them."""

POWERS: tuple[float, ...] = (*(2.0 ** (byte - EXPONENT_BIAS) for byte in range(255)), math.nan)
"""The value of each byte of an e8m0 scale."""


def power_below(x: Tensor) -> Tensor:
    """Return the e8m0 byte of the power of two at or below each positive float32 value, uint8."""
    exponent = torch.frexp(x).exponent - 1  # of a mantissa in [1, 2)
    return (exponent.clamp(-EXPONENT_BIAS, EXPONENT_BIAS) + EXPONENT_BIAS).to(torch.uint8)
