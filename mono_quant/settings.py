"""What a user asks for, and the recipe that it comes to for one weight."""

from typing import Self

import attrs
import torch

from mono_quant.base import Grid, RangeEstimator, Rounding, Scheme
from mono_quant.configurable import Config, Configurable, Kinds, as_dtype, encode
from mono_quant.errors import ConfigurationError
from mono_quant.numerics.granularity import Granularity, PerChannel, PerGroup, Shape
from mono_quant.observers import MinMax
from mono_quant.rounding import RoundToNearest
from mono_quant.schemes import Affine, FloatCast

DEFAULT_BITS = 8
DEFAULT_GROUP = 64


@attrs.frozen
class Recipe:
    """How one weight is quantized.

    Attributes:
        grid: the scheme and how its range is found.
        rounding: how grid points are chosen.
    """

    grid: Grid
    rounding: Rounding


@attrs.frozen
class Settings:
    """What was asked for; None is "not said".

    Attributes:
        bits: width of a code; 16 is a cast.
        symmetric: whether the grid is symmetric.
        granularity: which values share one scale.
        scale_dtype: dtype of the scales.
        scheme: a whole scheme, in place of the four above.
        observer: how the range of weights is found.
        rounding: how grid points are chosen.
    """

    bits: int | None = None
    symmetric: bool | None = None
    granularity: Granularity | None = None
    scale_dtype: torch.dtype | None = attrs.field(
        default=None, converter=attrs.converters.optional(as_dtype)
    )
    scheme: Scheme | None = None
    observer: RangeEstimator | None = None
    rounding: Rounding | None = None

    def __attrs_post_init__(self) -> None:
        """Refuse settings that contradict each other.

        Raises:
            ConfigurationError: naming the two and the call that says both.
        """
        parts = {
            "bits": self.bits,
            "symmetric": self.symmetric,
            "granularity": self.granularity,
            "scale_dtype": self.scale_dtype,
        }
        said = [name for name, value in parts.items() if value is not None]
        if self.scheme is not None and said:
            raise ConfigurationError(
                f"scheme({self.scheme!r}) already fixes {' and '.join(said)}; say it in the scheme"
            )
        if self.bits is not None and (isinstance(self.bits, bool) or self.bits not in _WIDTHS):
            raise ConfigurationError(f"bits is 2 to 8, or 16 for a cast, not {self.bits!r}")
        if self.bits == 16 and len(said) > 1:
            raise ConfigurationError(f"bits(16) is a cast: it has no {' and no '.join(said[1:])}")

    def to_config(self) -> Config:
        """Return what was said as JSON data."""
        values = attrs.asdict(self, recurse=False)
        return {name: encode(value) for name, value in values.items() if value is not None}

    @classmethod
    def from_config(cls, config: Config, kinds: Kinds | None = None) -> "Settings":
        """Return the settings that wrote `config`.

        Raises:
            ConfigurationError: a name is not known, or a value does not fit.
        """
        if unknown := set(config) - {field.name for field in attrs.fields(cls)}:
            raise ConfigurationError(f"there is no setting {', '.join(sorted(unknown))}")
        return cls(**{name: Configurable.from_nested(value, kinds) for name, value in config.items()})

    def over(self, base: Self) -> "Settings":
        """Return these settings laid over `base`: what is said here wins.

        A scheme here replaces its four parts there, and a part here replaces a scheme there.
        """
        here = {name: value for name, value in attrs.asdict(self, recurse=False).items()
                if value is not None}
        there = attrs.asdict(base, recurse=False)
        if self.scheme is not None or self.bits == 16:
            there.update(dict.fromkeys(_PARTS))
        if any(name in here for name in _PARTS):
            there["scheme"] = None
            if there["bits"] == 16 and self.bits is None:
                there["bits"] = None
        return Settings(**{**there, **here})

    @property
    def width(self) -> int:
        """Bits of a code; 16 for a scheme whose codes are floats."""
        if self.scheme is not None:
            return self.scheme.code_bits or 16
        return self.bits or DEFAULT_BITS

    def recipe(self, shape: Shape) -> Recipe:
        """Return how a weight that is a stack of `shape` is quantized."""
        grid = Grid(self._scheme(shape), self.observer or MinMax())
        return Recipe(grid, self.rounding or RoundToNearest())

    def _scheme(self, shape: Shape) -> Scheme:
        """Return the scheme.

        8 bits: symmetric, a scale for each channel. Below: asymmetric, a scale for each group of 64, or
        for each channel where 64 does not divide the row and no granularity was asked for.
        """
        if self.scheme is not None:
            return self.scheme
        if self.width == 16:
            return FloatCast()
        low = self.width < 8
        granularity = self.granularity
        if granularity is None:
            group = PerGroup(DEFAULT_GROUP)
            granularity = group if low and group.refuse(shape) is None else PerChannel()
        symmetric = not low if self.symmetric is None else self.symmetric
        return Affine(self.width, symmetric, granularity, self.scale_dtype or torch.float16)


_WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16)
_PARTS = ("bits", "symmetric", "granularity", "scale_dtype")
