"""Observers by their name."""

from typing import Literal, overload

from mono_quant.base import RangeEstimator
from mono_quant.configurable import Scalar, find_kind, registered
from mono_quant.errors import ConfigurationError, UnknownKindError
from mono_quant.observers.auto import Auto
from mono_quant.observers.entropy import Entropy
from mono_quant.observers.histogram import Histogram
from mono_quant.observers.minmax import MinMax
from mono_quant.observers.moving_average import MovingAverage
from mono_quant.observers.mse import MSE
from mono_quant.observers.percentile import Percentile


@overload
def create_observer(name: Literal["minmax"]) -> MinMax: ...
@overload
def create_observer(name: Literal["movingaverage"], *, momentum: float = ...) -> MovingAverage: ...
@overload
def create_observer(name: Literal["histogram"], *, bins: int = ...) -> Histogram: ...
@overload
def create_observer(name: Literal["percentile"], *, p: float = ...) -> Percentile: ...
@overload
def create_observer(name: Literal["mse"], *, steps: int = ..., smallest: float = ...) -> MSE: ...
@overload
def create_observer(name: Literal["entropy"], *, bins: int = ...) -> Entropy: ...
@overload
def create_observer(name: Literal["auto"]) -> Auto: ...
@overload
def create_observer(name: str, **options: Scalar) -> RangeEstimator: ...
def create_observer(name: str, **options: Scalar) -> RangeEstimator:
    """Return the observer of a name.

    Args:
        name: "minmax", "movingaverage", "histogram", "percentile", "mse", "entropy" or "auto", or
            the kind of one that was registered.
        options: its fields, such as ``bins=4096``.

    Raises:
        ConfigurationError: there is no such observer, or it has no such field.
    """
    try:
        found = find_kind(name)
    except UnknownKindError as error:
        known = [kind for kind, cls in registered().items() if issubclass(cls, RangeEstimator)]
        raise ConfigurationError(
            f"there is no observer {name!r}; there is {', '.join(sorted(known))}"
        ) from error
    if not issubclass(found, RangeEstimator):
        raise ConfigurationError(f"{name!r} is a {found.__name__}, which is no observer")
    return found.from_config({"kind": name, **options})
