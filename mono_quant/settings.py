"""What a user asks for, and the recipe that it comes to for one weight."""

from collections.abc import Mapping
from typing import ClassVar, TypeVar, cast

import attrs
import torch

from mono_quant.base import (
    Correction,
    Grid,
    Observer,
    RangeEstimator,
    Rounding,
    Scheme,
    Target,
    Transform,
)
from mono_quant.configurable import (
    Config,
    Configurable,
    Json,
    Kinds,
    as_dtype,
    dtype_name,
    encode,
    register,
)
from mono_quant.errors import ConfigurationError
from mono_quant.numerics.granularity import (
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Shape,
)
from mono_quant.observers import MSE, MinMax
from mono_quant.rounding import GPTQ, RoundToNearest
from mono_quant.schemes import Affine, FittedCodebook, Float8, FloatCast, OutlierColumns, Outliers
from mono_quant.transforms import Rotate, TuneScales

T = TypeVar("T")

DEFAULT_BITS = 8
DEFAULT_GROUP = 64


@attrs.frozen
class Quality:
    """What is done where there is data.

    Attributes:
        rounding: how grid points of weights are chosen; None: to nearest.
        transforms: what is done to the float model first.
        corrections: what is done to the quantized model, where it is not too large for that.
    """

    rounding: Rounding | None = None
    transforms: tuple[Transform, ...] = ()
    corrections: tuple[Correction, ...] = ()


QUALITIES: Mapping[str, Quality] = {
    "fast": Quality(),
    "balanced": Quality(GPTQ(damping=0.1)),
    "best": Quality(GPTQ(damping=0.1, refinements=2), (Rotate(),), (TuneScales(),)),
}
"""By the names that `quality` takes."""

_FINE, _FINEST = 32, 8
"""Most and least values of a group whose scales take 8 bits: as many as twice of it with 16."""


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
        dtype: float8_e4m3fn or float8_e5m2 for a grid of floats; None for integers.
    """

    kind: ClassVar[str] = "activations"
    mode: str | None = None
    bits: int = 8
    symmetric: bool = False
    granularity: Granularity | None = None
    dtype: torch.dtype | None = attrs.field(
        default=None, converter=attrs.converters.optional(as_dtype)
    )

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
        is_plain = (self.bits, self.symmetric) == (8, False)
        said = not is_plain or self.granularity is not None or self.dtype is not None
        if self.mode is None and said:
            raise ConfigurationError(
                "activations that stay float have no bits, symmetry, granularity or dtype; say "
                "'dynamic' or 'static', or leave those out"
            )
        if self.dtype is not None and not is_plain:
            raise ConfigurationError(
                f"activations in {dtype_name(self.dtype)} have 8 bits and no symmetry to choose: "
                "leave bits and symmetric out, or the dtype"
            )
        if type(self.bits) is not int or self.bits not in range(2, 9):
            raise ConfigurationError(
                f"activations have 2 to 8 bits, not {self.bits!r}; activations(None) leaves them "
                "in float"
            )
        if self.mode is not None:
            _ = self.scheme  # which refuses dtypes that are not of 8-bit floats

    @property
    def scheme(self) -> Affine | Float8:
        """The grid; its scales are float32, since they are few or never stored.

        Raises:
            ConfigurationError: the dtype is not one of 8-bit floats.
        """
        granularity = self.granularity
        if granularity is None:
            granularity = PerToken() if self.mode == "dynamic" else PerTensor()
        if self.dtype is not None:
            return Float8(self.dtype, granularity, torch.float32)
        return Affine(self.bits, self.symmetric, granularity, torch.float32)


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
        float_zero_point: whether zero points are floats.
        outliers: which columns are kept in half precision beside the grid; a number means so many.
        scheme: a whole scheme, in place of the five above.
        observer: how the range of weights is found.
        rounding: how grid points are chosen.
        activations: how inputs are quantized.
        activation_observer: how the range of static activations is found.
        quality: what is chosen where nothing is said: a name of `QUALITIES`.
    """

    bits: int | None = None
    symmetric: bool | None = None
    granularity: Granularity | None = None
    scale_dtype: torch.dtype | None = attrs.field(
        default=None, converter=attrs.converters.optional(as_dtype)
    )
    float_zero_point: bool | None = None
    outliers: OutlierColumns | int | None = None
    scheme: Scheme | None = None
    observer: RangeEstimator | None = None
    rounding: Rounding | None = None
    activations: Activations | None = None
    activation_observer: RangeEstimator | None = None
    quality: str | None = None

    def __attrs_post_init__(self) -> None:
        """Refuse what is no setting, and settings that contradict each other.

        Raises:
            ConfigurationError: naming what was expected, or the two and the call that says both.
        """
        for name, (expected, call) in _EXPECTED.items():
            value: object = getattr(self, name)
            if value is not None and not isinstance(value, expected):
                raise ConfigurationError(f"{name} is an instance, as in {call}, not {value!r}")
        if self.quality is not None and self.quality not in QUALITIES:
            known = ", ".join(map(repr, QUALITIES))
            raise ConfigurationError(f"quality is {known}, not {self.quality!r}")
        said = [name for name in _PARTS if getattr(self, name) is not None]
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
            self._affine(self.granularity or PerChannel())
        if self.outliers is not None:
            Outliers(columns=self.outliers)  # which refuses what names no columns
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
        bits, dtype = config.get("bits"), config.get("scale_dtype")
        symmetric, floats = config.get("symmetric"), config.get("float_zero_point")
        if not isinstance(bits, int | None):
            raise ConfigurationError(f"bits is a number, in {config}")
        quality = config.get("quality")
        if not isinstance(quality, str | None):
            raise ConfigurationError(f"quality is a name, in {config}")
        if not isinstance(symmetric, bool | None) or not isinstance(floats, bool | None):
            raise ConfigurationError(f"symmetric and float_zero_point are booleans, in {config}")

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
            float_zero_point=floats,
            outliers=_columns(config.get("outliers"), kinds),
            scheme=Scheme.from_config(scheme, kinds) if scheme else None,
            observer=RangeEstimator.from_config(observer, kinds) if observer else None,
            rounding=Rounding.from_config(rounding, kinds) if rounding else None,
            activations=Activations.from_config(activations, kinds) if activations else None,
            activation_observer=RangeEstimator.from_config(watcher, kinds) if watcher else None,
            quality=quality,
        )

    def over(self, base: "Settings") -> "Settings":
        """Return these settings laid over `base`: what is said here wins.

        A scheme or a cast here replaces the five parts there, and a part here replaces a scheme
        there. Symmetry and float zero points replace each other.
        """
        if self.scheme is not None or self.bits == 16:
            base = attrs.evolve(base, **dict.fromkeys(_PARTS))
        if self.bits == 16:
            base = attrs.evolve(base, activations=None)
        if any(getattr(self, name) is not None for name in _PARTS):
            base = attrs.evolve(base, scheme=None)
        if self.symmetric and self.float_zero_point is None:
            base = attrs.evolve(base, float_zero_point=None)
        if self.float_zero_point and self.symmetric is None and base.symmetric:
            base = attrs.evolve(base, symmetric=None)
        return Settings(
            bits=_first(self.bits, base.bits),
            symmetric=_first(self.symmetric, base.symmetric),
            granularity=_first(self.granularity, base.granularity),
            scale_dtype=_first(self.scale_dtype, base.scale_dtype),
            float_zero_point=_first(self.float_zero_point, base.float_zero_point),
            outliers=self.outliers if self.outliers is not None else base.outliers,
            scheme=_first(self.scheme, base.scheme),
            observer=_first(self.observer, base.observer),
            rounding=_first(self.rounding, base.rounding),
            activations=_first(self.activations, base.activations),
            activation_observer=_first(self.activation_observer, base.activation_observer),
            quality=_first(self.quality, base.quality),
        )

    @property
    def width(self) -> int:
        """Bits of a code; 16 for a scheme whose codes are floats."""
        if self.scheme is not None:
            return self.scheme.code_bits or 16
        return self.bits or DEFAULT_BITS

    def recipe(self, shape: Shape, has_data: bool = False, looked_up: bool = False) -> Recipe:
        """Return how a weight that is a stack of `shape` is quantized, and its inputs.

        Args:
            shape: of the stack.
            has_data: whether there is data to calibrate on.
            looked_up: whether its rows are looked up, so that no inputs meet it.
        """
        ranges = MSE() if self.quality is not None else MinMax()
        grid = Grid(self._scheme(shape), self.observer or ranges)
        observer = cast("Observer[object]", self.activation_observer or ranges)  # checked above
        return Recipe(
            grid, self._rounding(has_data, looked_up), self._activations(has_data), observer
        )

    def _rounding(self, has_data: bool, looked_up: bool) -> Rounding:
        """Return what was asked for, or what the quality means; to nearest without data for it.

        To nearest too for rows that are looked up where inputs would be needed.
        """
        if self.rounding is not None:
            return RoundToNearest() if looked_up and self.rounding.needs else self.rounding
        if not has_data or looked_up or self.width >= 16:
            return RoundToNearest()
        return QUALITIES.get(self.quality or "", Quality()).rounding or RoundToNearest()

    def _activations(self, has_data: bool) -> Activations:
        """Return what was asked for; of 8 bits without a scheme static or dynamic, else float.

        Dynamic where columns are kept apart: calibrated ranges hold the inputs of those too.
        """
        if self.activations is not None:
            return self.activations
        if self.scheme is not None or self.width != 8:
            return Activations()
        return Activations("static" if has_data and self.outliers is None else "dynamic")

    def _scheme(self, shape: Shape) -> Scheme:
        """Return the scheme.

        8 bits: symmetric, but for float zero points, a scale for each channel. Below: asymmetric, a
        scale for each group of 64, or for each channel where 64 does not divide the row and no
        granularity was asked for. With a quality, and where nothing but bits was said: a table of
        its own for each weight, in groups of 32 or of the next smaller size that divides the row.
        """
        if self.scheme is not None:
            return self.scheme
        if self.width == 16:
            return FloatCast()
        low = self.width < 8
        granularity = self.granularity
        free = all(getattr(self, name) is None for name in _PARTS if name != "bits")
        fine = _fine_group(shape[-1]) if self.quality is not None and free and low else None
        if fine is not None:
            return FittedCodebook(self.width, fine, torch.float8_e4m3fn)
        if granularity is None:
            group = PerGroup(DEFAULT_GROUP)
            granularity = group if low and group.refuse(shape) is None else PerChannel()
        grid = self._affine(granularity)
        return grid if self.outliers is None else Outliers(grid, self.outliers)

    def _affine(self, granularity: Granularity) -> Affine:
        floats = self.float_zero_point or False
        symmetric = self.width == DEFAULT_BITS and not floats
        return Affine(
            self.width,
            symmetric if self.symmetric is None else self.symmetric,
            granularity,
            self.scale_dtype or torch.float16,
            floats,
        )


_EXPECTED: Mapping[str, tuple[type, str]] = {
    "granularity": (Granularity, "granularity(PerChannel())"),
    "scheme": (Scheme, "scheme(Affine(4)) or scheme(create_scheme('nf4'))"),
    "observer": (RangeEstimator, "observer(MinMax())"),
    "rounding": (Rounding, "rounding(GPTQ())"),
    "activations": (Activations, 'activations("dynamic")'),
    "activation_observer": (RangeEstimator, "observer(activations=MinMax())"),
}
_PARTS = ("bits", "symmetric", "granularity", "scale_dtype", "float_zero_point", "outliers")
"""Settings that a scheme fixes."""

_MODES = ("dynamic", "static", None)
_WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16)


def _fine_group(row: int) -> PerGroup | None:
    """Return the largest groups with a scale of 8 bits that divide a row; None without any."""
    sizes = (size for size in range(_FINE, _FINEST - 1, -1) if row % size == 0)
    size = next(sizes, None)
    return PerGroup(size) if size is not None else None


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


def _columns(said: Json, kinds: Kinds | None) -> OutlierColumns | int | None:
    if said is None or isinstance(said, int):
        return said
    if not isinstance(said, Mapping):
        raise ConfigurationError(f"outliers is a number or a mapping with a kind, not {said!r}")
    return OutlierColumns.from_config(said, kinds)


def _first(one: T | None, other: T | None) -> T | None:
    return one if one is not None else other
