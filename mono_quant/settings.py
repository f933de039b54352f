"""What a user asks for, and the recipe that it comes to for one weight."""

from collections.abc import Mapping
from typing import TypeVar

import attrs
import torch

from mono_quant.base import Grid, RangeEstimator, Rounding, Scheme
from mono_quant.configurable import Config, Kinds, as_dtype, encode
from mono_quant.errors import ConfigurationError
from mono_quant.numerics.granularity import Granularity, PerChannel, PerGroup, Shape
from mono_quant.observers import MinMax
from mono_quant.rounding import RoundToNearest
from mono_quant.schemes import Affine, FloatCast

T = TypeVar("T")

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
        bits, symmetric, dtype = (config.get(name) for name in ("bits", "symmetric", "scale_dtype"))
        if not isinstance(bits, int | None) or not isinstance(symmetric, bool | None):
            raise ConfigurationError(f"bits is a number and symmetric a boolean, in {config}")

        def described(name: str) -> Config | None:
            value = config.get(name)
            if value is not None and not isinstance(value, Mapping):
                raise ConfigurationError(f"{name} is a mapping with a kind, not {value!r}")
            return value

        granularity, scheme = described("granularity"), described("scheme")
        observer, rounding = described("observer"), described("rounding")
        return cls(
            bits=bits,
            symmetric=symmetric,
            granularity=Granularity.from_config(granularity, kinds) if granularity else None,
            scale_dtype=as_dtype(str(dtype)) if dtype is not None else None,
            scheme=Scheme.from_config(scheme, kinds) if scheme else None,
            observer=RangeEstimator.from_config(observer, kinds) if observer else None,
            rounding=Rounding.from_config(rounding, kinds) if rounding else None,
        )

    def over(self, base: "Settings") -> "Settings":
        """Return these settings laid over `base`: what is said here wins.

        A scheme or a cast here replaces the four parts there, and a part here replaces a scheme
        there.
        """
        if self.scheme is not None or self.bits == 16:
            base = attrs.evolve(base, bits=None, symmetric=None, granularity=None, scale_dtype=None)
        parts = (self.bits, self.symmetric, self.granularity, self.scale_dtype)
        if any(part is not None for part in parts):
            base = attrs.evolve(base, scheme=None)
        return Settings(
            bits=_first(self.bits, base.bits),
            symmetric=_first(self.symmetric, base.symmetric),
            granularity=_first(self.granularity, base.granularity),
            scale_dtype=_first(self.scale_dtype, base.scale_dtype),
            scheme=_first(self.scheme, base.scheme),
            observer=_first(self.observer, base.observer),
            rounding=_first(self.rounding, base.rounding),
        )

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

        8 bits: symmetric, a scale for each channel. Below: asymmetric, a scale for each group of
        64, or for each channel where 64 does not divide the row and no granularity was asked for.
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


def _first(one: T | None, other: T | None) -> T | None:
    return one if one is not None else other
