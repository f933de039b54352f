"""From the words of a command line to strategies and a `Quantizer`."""

import json
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from torch import nn

from mono_quant.base import (
    Container,
    Correction,
    LayerQuantizer,
    RangeEstimator,
    Rounding,
    Scheme,
    Transform,
)
from mono_quant.cli.inputs import imported
from mono_quant.cli.options import PlanOptions
from mono_quant.configurable import (
    Config,
    Configurable,
    Json,
    Scalar,
    as_dtype,
    find_kind,
    registered,
)
from mono_quant.errors import ConfigurationError, UnknownKindError
from mono_quant.numerics.granularity import Granularity
from mono_quant.observers import create_observer
from mono_quant.plan.written import GRAPH
from mono_quant.quantizer import GraphQuantizer, Quantizer
from mono_quant.schemes import OutlierColumns, create_scheme
from mono_quant.selection import Selector

StrategyT = TypeVar("StrategyT", bound=Configurable)

_OF_TYPE = "type:"
_TOML = ".toml"
_MOST_TOML, _MOST_DOTS = 1 << 17, 64
_BITS = 64
"""Of a whole number; TOML lets one be written that no message can show."""
_IN_OVERRIDE = (
    "bits",
    "symmetric",
    "granularity",
    "group_size",
    "scale_dtype",
    "float_zero_point",
    "outliers",
    "scheme",
    "observer",
    "rounding",
    "activations",
    "activation_observer",
)


def build_quantizer(options: PlanOptions) -> Quantizer | GraphQuantizer:
    """Return the quantizer that the options describe, the file of ``--config`` first.

    One of a graph where the options or that file ask for it.

    Raises:
        ConfigurationError: they contradict each other or cannot be read.
    """
    config = _read_config(options.config) if options.config is not None else {}
    graph = options.graph or config.get(GRAPH) is True
    quantizer = Quantizer.from_config({**config, GRAPH: False} if graph else config)
    if options.bits is not None:
        quantizer = quantizer.bits(options.bits)
    if options.quality is not None:
        quantizer = quantizer.quality(options.quality)
    if options.scheme is not None:
        quantizer = quantizer.scheme(_scheme(options.scheme))
    if options.symmetric is not None:
        quantizer = quantizer.symmetric(options.symmetric)
    if options.granularity is not None:
        quantizer = quantizer.granularity(_granularity(options.granularity))
    if options.group_size is not None:
        quantizer = quantizer.group_size(options.group_size)
    if options.scale_dtype is not None:
        quantizer = quantizer.scale_dtype(as_dtype(options.scale_dtype))
    if options.float_zero_point is not None:
        quantizer = quantizer.float_zero_point(options.float_zero_point)
    if options.outliers is not None:
        quantizer = quantizer.outliers(_outliers(options.outliers))
    if options.observer is not None:
        quantizer = quantizer.observer(_observer(options.observer))
    if options.rounding is not None:
        quantizer = quantizer.rounding(_rounding(options.rounding))
    quantizer = _inputs(quantizer, options)
    quantizer = quantizer.layer(*map(_layer, options.layer))
    quantizer = quantizer.only(*map(_selector, options.only))
    quantizer = quantizer.skip(*map(_selector, options.skip))
    for text in options.override:
        quantizer = _override(quantizer, text)
    return quantizer.graph() if graph else quantizer


def _inputs(quantizer: Quantizer, options: PlanOptions) -> Quantizer:
    """Return the quantizer with what was said of the inputs of layers, and of changes."""
    more = {
        "--activation-bits": options.activation_bits,
        "--activation-symmetric": options.activation_symmetric,
        "--activation-granularity": options.activation_granularity,
        "--activation-dtype": options.activation_dtype,
    }
    said = [name for name, value in more.items() if value is not None]
    if options.activations is not None:
        quantizer = quantizer.activations(
            None if options.activations == "float" else options.activations,
            bits=options.activation_bits or 8,
            symmetric=options.activation_symmetric or False,
            granularity=options.activation_granularity,
            dtype=options.activation_dtype,
        )
    elif said:
        raise ConfigurationError(f"{said[0]} says how, and not when: add --activations MODE")
    if options.activation_observer is not None:
        quantizer = quantizer.observer(activations=_observer(options.activation_observer))
    if options.fold is not None:
        quantizer = quantizer.fold(options.fold)
    for text in options.transform:
        quantizer = quantizer.transform(_transform(text))
    if options.on_damage is not None:
        quantizer = quantizer.on_damage(options.on_damage)
    return quantizer


def _layer(text: str) -> LayerQuantizer | Container:
    found = find_kind(_described(text).get("kind")) if _known(text) else LayerQuantizer
    if issubclass(found, Container):
        return _strategy(Container.from_config, Container, text)
    return _strategy(LayerQuantizer.from_config, LayerQuantizer, text, Container)


def _transform(text: str) -> Transform | Correction:
    found = find_kind(_described(text).get("kind")) if _known(text) else Transform
    if issubclass(found, Correction):
        return _strategy(Correction.from_config, Correction, text)
    return _strategy(Transform.from_config, Transform, text, Correction)


def _known(text: str) -> bool:
    return _described(text).get("kind") in registered()


def _read_config(path: Path) -> Config:
    """Return the configuration of a JSON file, or of a TOML one by its suffix."""
    in_toml = path.suffix == _TOML
    try:
        text = path.read_text(encoding="utf-8")
        if in_toml:
            _check_toml(path, text)
        config: Json = tomllib.loads(text) if in_toml else json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        format_ = "TOML" if in_toml else f"JSON (a file in TOML is called {_TOML})"
        raise ConfigurationError(f"{path} is not {format_}: {error}") from error
    if not isinstance(config, Mapping):
        raise ConfigurationError(f"{path} holds no JSON object; --dump-config prints one")
    if any(isinstance(one, int) and one.bit_length() > _BITS for one in _values(config)):
        raise ConfigurationError(f"{path} holds a number of more than {_BITS} bits")
    return config


def _once(pairs: list[tuple[str, Json]]) -> Config:
    """Return what a JSON object says, each of it once."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = Counter(name for name, _ in pairs)
        raise ValueError(f"it says {seen.most_common(1)[0][0]!r} twice")
    return found


def _values(config: Json) -> Iterator[Json]:
    """Yield all that is in a configuration."""
    waiting = [config]
    while waiting:
        match waiting.pop():
            case dict(inner):
                waiting += inner.values()
            case list(inner):
                waiting += inner
            case value:
                yield value


def _check_toml(path: Path, text: str) -> None:
    """Refuse names in a name in a name, of which the standard library's reader copies each part.

    A line of 40 kB took 2 GB.
    """
    if len(text) > _MOST_TOML:
        raise ConfigurationError(
            f"{path} has {len(text)} characters, and TOML of up to {_MOST_TOML} is read; write "
            "JSON, as --dump-config does"
        )
    for number, line in enumerate(text.split("\n"), 1):
        if line.count(".") > _MOST_DOTS:
            raise ConfigurationError(
                f"{path} has more than {_MOST_DOTS} dots in line {number}: tables are not nested "
                "so deeply; break the line, or write JSON"
            )


def _strategy(
    make: Callable[[Config], StrategyT], base: type, text: str, *others: type
) -> StrategyT:
    """Return the strategy of ``KIND``, of ``KIND:name=value,...`` or of a JSON object."""
    config = _described(text)
    try:
        return make(config)
    except UnknownKindError as error:
        bases = (base, *others)
        known = sorted(kind for kind, cls in registered().items() if issubclass(cls, bases))
        asked = " or ".join(one.__name__ for one in bases)
        raise ConfigurationError(
            f"there is no {asked} of kind {config.get('kind')!r}: there is "
            f"{', '.join(known)}; --import the module of another"
        ) from error


def _described(text: str) -> Config:
    if text.lstrip().startswith("{"):
        try:
            config: Json = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(f"{text:.60} is not JSON: {error}") from error
        return config if isinstance(config, Mapping) else {}
    kind, _, rest = text.partition(":")
    return {**_pairs(rest), "kind": kind}


def _scheme(text: str) -> Scheme:
    kind, simple = _simply(text)
    if kind is None:
        return _strategy(Scheme.from_config, Scheme, text)
    group = simple.pop("group_size", None)
    if group is not None and (isinstance(group, bool) or not isinstance(group, int)):
        raise ConfigurationError(f"group_size is a whole number, not {group!r}")
    return create_scheme(kind, group_size=group, **simple)


def _observer(text: str) -> RangeEstimator:
    kind, simple = _simply(text)
    if kind is None:
        return _strategy(RangeEstimator.from_config, RangeEstimator, text)
    return create_observer(kind, **simple)


def _simply(text: str) -> tuple[str | None, dict[str, Scalar]]:
    """Return the name of a strategy and its fields; None for a name where one is no scalar."""
    config = _described(text)
    kind = config.get("kind")
    simple: dict[str, Scalar] = {
        name: value
        for name, value in config.items()
        if name != "kind" and (value is None or isinstance(value, str | int | float))
    }
    is_simple = isinstance(kind, str) and len(simple) == len(config) - 1
    return (str(kind) if is_simple else None), simple


def _rounding(text: str) -> Rounding:
    return _strategy(Rounding.from_config, Rounding, text)


def _granularity(text: str) -> Granularity | str:
    if text in registered() or not text.isalpha():
        return _strategy(Granularity.from_config, Granularity, text)
    return text


def _outliers(text: str) -> OutlierColumns | int:
    """Return how many columns of each weight, or the rule that finds them."""
    if text.isdecimal():
        return int(text)
    return _strategy(OutlierColumns.from_config, OutlierColumns, text)


def _selector(text: str) -> Selector:
    """Return a name pattern, or the class of ``type:Linear`` or ``type:package.module:Class``."""
    if not text.startswith(_OF_TYPE):
        return text
    name = text.removeprefix(_OF_TYPE)
    found = imported(name) if ":" in name else getattr(nn, name, None)
    if isinstance(found, type) and issubclass(found, nn.Module):
        return found
    raise ConfigurationError(
        f"{text!r} names no module class: type:Linear is torch.nn.Linear, and another one is "
        "type:package.module:Class"
    )


def _override(quantizer: Quantizer, text: str) -> Quantizer:
    pattern, said = _split_override(text)
    if unknown := set(said) - set(_IN_OVERRIDE):
        raise ConfigurationError(
            f"--override {text!r}: there is no {', '.join(sorted(unknown))}; there is "
            f"{', '.join(_IN_OVERRIDE)}"
        )
    named = {name: str(value) for name, value in said.items()}
    return quantizer.override(
        _selector(pattern),
        bits=_whole(said, "bits", text),
        symmetric=_truth(said, "symmetric", text),
        granularity=_granularity(named["granularity"]) if "granularity" in said else None,
        group_size=_whole(said, "group_size", text),
        scale_dtype=as_dtype(named["scale_dtype"]) if "scale_dtype" in said else None,
        float_zero_point=_truth(said, "float_zero_point", text),
        outliers=_outliers(named["outliers"]) if "outliers" in said else None,
        scheme=_scheme(named["scheme"]) if "scheme" in said else None,
        observer=_observer(named["observer"]) if "observer" in said else None,
        rounding=_rounding(named["rounding"]) if "rounding" in said else None,
        activations=named.get("activations"),
        activation_observer=_observer(named["activation_observer"])
        if "activation_observer" in said
        else None,
    )


def _split_override(text: str) -> tuple[str, dict[str, Scalar]]:
    """Return the pattern and what is said of it: ``PATTERN=BITS`` or ``PATTERN:name=value,...``."""
    pattern, colon, rest = text.rpartition(":")
    of_type = f"{pattern}:".startswith(_OF_TYPE) and rest.partition("=")[0] not in _IN_OVERRIDE
    if colon and not of_type:
        return pattern, _pairs(rest)
    pattern, equals, bits = text.rpartition("=")
    if not equals or not pattern:
        raise ConfigurationError(
            f"--override {text!r} says nothing: write PATTERN=BITS or PATTERN:name=value,..."
        )
    return pattern, {"bits": _scalar(bits)}


def _truth(said: Mapping[str, Scalar], name: str, text: str) -> bool | None:
    value = said.get(name)
    if isinstance(value, bool | None):
        return value
    raise ConfigurationError(f"--override {text!r}: {name} is true or false, not {value!r}")


def _whole(said: Mapping[str, Scalar], name: str, text: str) -> int | None:
    value = said.get(name)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise ConfigurationError(f"--override {text!r}: {name} is a whole number, not {value!r}")


def _pairs(text: str) -> dict[str, Scalar]:
    pairs: dict[str, Scalar] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            raise ConfigurationError(f"{part!r} is not name=value")
        pairs[name.strip()] = _scalar(value.strip())
    return pairs


def _scalar(text: str) -> Scalar:
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if value is None or isinstance(value, bool | int | float) else text
