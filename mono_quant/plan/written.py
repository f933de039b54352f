"""What was asked for, as a configuration that comes back and as the chain of calls that says it."""

from collections.abc import Iterable, Mapping

import attrs
from torch import nn

from mono_quant.base import Container, Correction, LayerQuantizer, Transform
from mono_quant.configurable import Config, Json, Kinds
from mono_quant.errors import ConfigurationError
from mono_quant.plan.request import ACTIONS, Request, WeightPlan
from mono_quant.selection import Selection, Selector
from mono_quant.settings import Activations, Settings
from mono_quant.speed import NO_DIFFERENCE

GRAPH = "graph"
"""The call that makes a graph, and its word in a configuration."""

_OBSERVERS = {"observer": "weights", "activation_observer": "activations"}
_STRATEGIES = ("layers", "containers", "transforms", "corrections")


def config_of(request: Request, selection: Selection | None) -> Config:
    """Return everything but the data as JSON data.

    Args:
        request: what was asked for.
        selection: resolves selectors to names of its model's layers; None where there is no model.

    Raises:
        ConfigurationError: a selector cannot be written down; use a name.
    """

    def write(selector: Selector) -> list[str]:
        if isinstance(selector, str):
            return [selector]
        if selection is None:
            raise ConfigurationError(
                f"{_show(selector)} cannot be written down; name the layers instead"
            )
        return selection.roots(selector)

    return {
        "settings": request.settings.to_config(),
        "overrides": [
            {"selector": name, **settings.to_config()}
            for selector, settings in request.overrides
            for name in write(selector)
        ],
        "only": [name for selector in request.only for name in write(selector)],
        "skip": [name for selector in request.skip for name in write(selector)],
        "layers": [layer.to_config() for layer in request.layers],
        "containers": [container.to_config() for container in request.containers],
        "transforms": [transform.to_config() for transform in request.transforms],
        "corrections": [correction.to_config() for correction in request.corrections],
        "fold": request.fold,
        "on_damage": request.on_damage,
    }


def skipping(config: Config, model: nn.Module, weights: Iterable[WeightPlan]) -> Config:
    """Return a configuration that leaves these weights in float too.

    They are named themselves, but for weights that are computed: there their layers are.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = [weight.key if weight.key in parameters else weight.path for weight in weights]
    return {**config, "skip": list(dict.fromkeys([*_names(config["skip"]), *names]))}


def request_from(config: Config, kinds: Kinds | None = None) -> Request:
    """Return what was asked for in `config`, without data.

    Raises:
        ConfigurationError: it holds something unknown.
        UnknownKindError: it names an unknown kind.
    """
    known = {"settings", "overrides", "only", "skip", "fold", "on_damage", *_STRATEGIES}
    if unknown := set(config) - known:
        raise ConfigurationError(f"a quantizer has no {', '.join(sorted(unknown))}")
    overrides = []
    for entry in _list(config.get("overrides", [])):
        said = dict(_object(entry))
        selector = said.pop("selector", None)
        if not isinstance(selector, str):
            raise ConfigurationError(f"an override's selector is a name, not {selector!r}")
        overrides.append((selector, Settings.from_config(said, kinds)))
    fold = config.get("fold")
    if not isinstance(fold, bool | None):
        raise ConfigurationError(f"fold is true, false or null, not {fold!r}")
    action = config.get("on_damage", "warn")
    if action not in ACTIONS:
        raise ConfigurationError(f"on_damage is one of {', '.join(ACTIONS)}, not {action!r}")
    return Request(
        settings=Settings.from_config(_object(config.get("settings", {})), kinds),
        overrides=tuple(overrides),
        only=_names(config.get("only", [])),
        skip=_names(config.get("skip", [])),
        layers=tuple(
            LayerQuantizer.from_config(one, kinds) for one in _objects(config.get("layers"))
        ),
        containers=tuple(
            Container.from_config(one, kinds) for one in _objects(config.get("containers"))
        ),
        transforms=tuple(
            Transform.from_config(one, kinds) for one in _objects(config.get("transforms"))
        ),
        corrections=tuple(
            Correction.from_config(one, kinds) for one in _objects(config.get("corrections"))
        ),
        fold=fold,
        on_damage=str(action),
    )


def calls_of(request: Request) -> list[str]:
    """Return the calls of a chain; data, modules and functions are shown, not written down."""
    calls = [_call(name, value) for name, value in _said(request.settings)]
    if request.only:
        calls.append(f"only({', '.join(map(_show, request.only))})")
    if request.skip:
        calls.append(f"skip({', '.join(map(_show, request.skip))})")
    for selector, override in request.overrides:
        said = ", ".join(f"{name}={value!r}" for name, value in _said(override))
        calls.append(f"override({_show(selector)}, {said})")
    calls += [f"layer({layer!r})" for layer in (*request.layers, *request.containers)]
    calls += [f"fold({request.fold})"] if request.fold is not None else []
    if request.on_damage != "warn":
        calls.append(f"on_damage({request.on_damage!r})")
    changing = (*request.transforms, *request.corrections)
    calls += [f"transform({transform!r})" for transform in changing]
    if request.faster is not None:
        margin = request.faster.margin
        more = f", margin={margin!r}" if margin != NO_DIFFERENCE else ""
        calls.append(f"only_if_faster({_shown(request.faster.example.first())}{more})")
    if request.data is not None:
        calls.append(f"fit({_shown(request.data.source)})")
    if request.measured is not None:
        calls.append(f"measure_on({_shown(request.measured.source)})")
    if request.statistics is not None:
        calls.append(f"statistics(<{len(request.statistics.weights)} weights>)")
    return calls


def _said(settings: Settings) -> list[tuple[str, object]]:
    values = attrs.asdict(settings, recurse=False)
    return [(name, value) for name, value in values.items() if value is not None]


def _call(name: str, value: object) -> str:
    if isinstance(value, Activations):
        said = {
            "bits": value.bits if value.bits != 8 else None,
            "symmetric": value.symmetric or None,
            "granularity": value.granularity,
            "dtype": value.dtype,
        }
        more = "".join(f", {key}={one!r}" for key, one in said.items() if one is not None)
        return f"activations({value.mode!r}{more})"
    if name in _OBSERVERS:
        return f"observer({_OBSERVERS[name]}={value!r})"
    return f"{name}({value!r})"


def _shown(data: object) -> str:
    return f"<{type(data).__name__}>"


def _show(selector: Selector) -> str:
    if isinstance(selector, type):
        return f"{selector.__module__}.{selector.__qualname__}"
    if isinstance(selector, str):
        return repr(selector)
    return f"<{getattr(selector, '__name__', type(selector).__name__)}>"


def _object(value: Json) -> Config:
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"expected a mapping, not {value!r}")
    return value


def _objects(value: Json) -> list[Config]:
    return [_object(one) for one in _list(value or [])]


def _list(value: Json) -> list[Json]:
    if isinstance(value, str) or not isinstance(value, list | tuple):
        raise ConfigurationError(f"expected a list, not {value!r}")
    return list(value)


def _names(value: Json) -> tuple[str, ...]:
    return tuple(str(name) for name in _list(value))
