"""What a user asks for, and the recipe that it comes to for one weight."""

from collections.abc import Mapping
from typing import ClassVar, TypeVar, cast

import attrs
import torch

from mono_quant.base import Grid, Observer, RangeEstimator, Rounding, Scheme, Target
from mono_quant.configurable import Config, Configurable, Kinds, as_dtype, encode, register
from mono_quant.errors import ConfigurationError
from mono_quant.numerics.granularity import (
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Shape,
)
from mono_quant.observers import MinMax
from mono_quant.rounding import RoundToNearest
from mono_quant.schemes import Affine, FloatCast

T = TypeVar("T")

DEFAULT_BITS = 8
DEFAULT_GROUP = 64


@register
@attrs.frozen
class Activations(Configurable):
    """How the inputs of layers are quantized.

    Attributes:
        mode: "dynamic" (a range for each input, found when it comes), "static" (one range,
            calibrated) or None: they stay float.
        bits: 2 to 8.
        symmetric: no zero point.
        granularity: `PerToken` (the default of dynamic ones) or `PerTensor`, all that static ones
            can be.
    """

    kind: ClassVar[str] = "activations"
    mode: str | None = None
    bits: int = 8
    symmetric: bool = False
    granularity: Granularity | None = None

    def __attrs_post_init__(self) -> None:
        """Refuse what no grid of activations can be."""
        if self.mode not in _MODES:
            raise ConfigurationError(
                f"activations are 'dynamic', 'static' or None (float), not {self.mode!r}"
            )
        allowed = (PerTensor, PerToken) if self.mode == "dynamic" else (PerTensor,)
        if self.granularity is not None and not isinstance(self.granularity, allowed):
            names = " or ".join(f"{one.__name__}()" for one in allowed)
            raise ConfigurationError(
                f"the granularity of {self.mode or 'float'} activations is {names}, "
                f"not {self.granularity!r}"
            )
        said = (self.bits, self.symmetric, self.granularity) != (8, False, None)
        if self.mode is None and said:
            raise ConfigurationError(
                "activations that stay float have no bits, symmetry or granularity; say "
                "'dynamic' or 'static', or leave those out"
            )
        if type(self.bits) is not int or self.bits not in range(2, 9):
            raise ConfigurationError(
                f"activations have 2 to 8 bits, not {self.bits!r}; activations(None) leaves them "
                "in float"
            )

    @property
    def scheme(self) -> Affine:
        """The grid; its scales are float32, since they are few or never stored."""
        default = PerToken() if self.mode == "dynamic" else PerTensor()
        return Affine(self.bits, self.symmetric, self.granularity or default, torch.float32)


@attrs.frozen
class Recipe:
    """How one weight is quantized, and the inputs that meet it.

    Attributes:
        grid: the scheme and how its range is found.
        rounding: how grid points are chosen.
        activations: how its inputs are quantized; of mode None where they stay float.
        observer: how the range of static ones is found.
    """

    grid: Grid
    rounding: Rounding
    activations: Activations = attrs.field(factory=Activations)
    observer: Observer[object] = attrs.field(factory=MinMax)

    @property
    def target(self) -> Target:
        """The same in the words of the contract, without the rounding."""
        mode = self.activations.mode
        return Target(
            self.grid,
            self.activations.scheme if mode is not None else None,
            self.observer if mode == "static" else None,
        )


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
        activations: how inputs are quantized.
        activation_observer: how the range of static activations is found.
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
    activations: Activations | None = None
    activation_observer: RangeEstimator | None = None

    def __attrs_post_init__(self) -> None:
        """Refuse what is no setting, and settings that contradict each other.

        Raises:
            ConfigurationError: naming what was expected, or the two and the call that says both.
        """
        for name, (expected, call) in _EXPECTED.items():
            value: object = getattr(self, name)
            if value is not None and not isinstance(value, expected):
                raise ConfigurationError(f"{call} takes an instance, not {value!r}")
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
        quantized = self.activations is not None and self.activations.mode is not None
        if self.bits == 16 and quantized:
            raise ConfigurationError("bits(16) is a cast: its activations cannot be quantized")
        if self.scheme is None and self.bits != 16:  # which refuses what no grid can have
            symmetric, dtype = self.symmetric, self.scale_dtype
            Affine(
                self.bits or DEFAULT_BITS,
                True if symmetric is None else symmetric,
                scale_dtype=dtype or torch.float16,
            )
        watcher = self.activation_observer
        if watcher is not None and not isinstance(watcher, Observer):
            raise ConfigurationError(
                f"{watcher!r} sees a tensor whole, and activations come in pieces: give an Observer"
            )

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
        activations, watcher = described("activations"), described("activation_observer")
        return cls(
            bits=bits,
            symmetric=symmetric,
            granularity=Granularity.from_config(granularity, kinds) if granularity else None,
            scale_dtype=as_dtype(str(dtype)) if dtype is not None else None,
            scheme=Scheme.from_config(scheme, kinds) if scheme else None,
            observer=RangeEstimator.from_config(observer, kinds) if observer else None,
            rounding=Rounding.from_config(rounding, kinds) if rounding else None,
            activations=Activations.from_config(activations, kinds) if activations else None,
            activation_observer=RangeEstimator.from_config(watcher, kinds) if watcher else None,
        )

    def over(self, base: "Settings") -> "Settings":
        """Return these settings laid over `base`: what is said here wins.

        A scheme or a cast here replaces the four parts there, and a part here replaces a scheme
        there.
        """
        if self.scheme is not None or self.bits == 16:
            base = attrs.evolve(base, bits=None, symmetric=None, granularity=None, scale_dtype=None)
        if self.bits == 16:
            base = attrs.evolve(base, activations=None)
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
            activations=_first(self.activations, base.activations),
            activation_observer=_first(self.activation_observer, base.activation_observer),
        )

    @property
    def width(self) -> int:
        """Bits of a code; 16 for a scheme whose codes are floats."""
        if self.scheme is not None:
            return self.scheme.code_bits or 16
        return self.bits or DEFAULT_BITS

    def recipe(self, shape: Shape, has_data: bool = False) -> Recipe:
        """Return how a weight that is a stack of `shape` is quantized, and its inputs.

        Args:
            shape: of the stack.
            has_data: whether there is data to calibrate on.
        """
        grid = Grid(self._scheme(shape), self.observer or MinMax())
        observer = cast("Observer[object]", self.activation_observer or MinMax())  # checked above
        return Recipe(
            grid, self.rounding or RoundToNearest(), self._activations(has_data), observer
        )

    def _activations(self, has_data: bool) -> Activations:
        """Return what was asked for; of 8 bits without a scheme static or dynamic, else float."""
        if self.activations is not None:
            return self.activations
        if self.scheme is not None or self.width != 8:
            return Activations()
        return Activations("static" if has_data else "dynamic")

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


_EXPECTED: Mapping[str, tuple[type, str]] = {
    "granularity": (Granularity, "granularity(PerChannel())"),
    "scheme": (Scheme, "scheme(Affine(4))"),
    "observer": (RangeEstimator, "observer(MinMax())"),
    "rounding": (Rounding, "rounding(RoundToNearest())"),
    "activations": (Activations, 'activations("dynamic")'),
    "activation_observer": (RangeEstimator, "observer(activations=MinMax())"),
}
_MODES = ("dynamic", "static", None)
_WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16)


def granularity_of_weights(said: Granularity | str) -> Granularity:
    """Return a granularity, or the one that a name means for weights.

    Raises:
        ConfigurationError: there is no such name.
    """
    return _named(said, _OF_WEIGHTS, "granularity")


def granularity_of_inputs(said: Granularity | str) -> Granularity:
    """Return a granularity, or the one that a name means for activations.

    Raises:
        ConfigurationError: there is no such name.
    """
    return _named(said, _OF_INPUTS, "the granularity of activations")


_OF_WEIGHTS: Mapping[str, Granularity] = {
    "tensor": PerTensor(),
    "channel": PerChannel(),
    "group": PerGroup(),
}
_OF_INPUTS: Mapping[str, Granularity] = {"token": PerToken(), "tensor": PerTensor()}


def _named(said: Granularity | str, names: Mapping[str, Granularity], what: str) -> Granularity:
    if isinstance(said, Granularity):
        return said
    found = names.get(str(said))
    if found is None:
        raise ConfigurationError(
            f"{what} is {', '.join(map(repr, names))} or a Granularity, not {said!r}"
        )
    return found


def _first(one: T | None, other: T | None) -> T | None:
    return one if one is not None else other
