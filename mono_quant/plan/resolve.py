"""From a request and a model to the fate of each weight. Looks at names and shapes, at no value."""

from collections.abc import Iterable, Mapping, Sequence

import attrs
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from mono_quant.base import Container, Correction, QuantizedModule, Transform
from mono_quant.calibration import check_tuple
from mono_quant.checkpoint import ModelT, check_supported
from mono_quant.configurable import Config, dtype_name
from mono_quant.errors import CalibrationError, ConfigurationError, Mend
from mono_quant.layers import BUILT_IN_CONTAINERS, BUILT_IN_LAYERS
from mono_quant.numerics.metrics import memory_of, tensor_bytes
from mono_quant.plan.accounting import inside
from mono_quant.plan.faster import rule
from mono_quant.plan.measure import foreseen, unmeasured, wanted_of
from mono_quant.plan.outline import outline_of
from mono_quant.plan.plan import Plan
from mono_quant.plan.request import LOW_BITS, Request, WeightPlan
from mono_quant.selection import Selection, Selector
from mono_quant.settings import Activations, Settings

SMALL = 512
"""Layers with fewer parameters stay float below 8 bits unless they are asked for."""


def resolve(model: ModelT, request: Request, config: Config) -> Plan[ModelT]:
    """Return the plan for a model: every weight's fate, with the reason where it stays float.

    Raises:
        InputError: the model cannot be quantized at all.
        ConfigurationError: a selector matches nothing, tied weights are asked for different
            things, a rounding refuses the grid of a layer, or no layer can have the static inputs
            that were asked for.
    """
    check_supported(model)
    for data in (request.data, request.evidence):
        if data is not None:
            check_tuple(model, data)
    weights = _join_ties(model, _weights(model, request))
    todo = [weight for weight in weights if weight.recipe is not None]
    _check_roundings(todo)
    warnings = tuple(_refused_inputs(todo))
    _check_data(request, todo)
    rules = []
    if request.faster is not None:
        rules = [rule(request.faster.margin), *unmeasured(request, weights)]
    changes = foreseen(model, request, weights)
    outline = outline_of(model, weights, config, rules, warnings, changes)
    plan = Plan(model=model, request=request, weights=tuple(weights), outline=outline)
    plan.check_statistics()
    return plan


def _check_data(request: Request, todo: Sequence[WeightPlan]) -> None:
    changing: tuple[Transform | Correction, ...] = (*request.transforms, *request.corrections)
    for change in changing:
        if change.needs_data and request.data is None:
            raise CalibrationError(f"{change!r} needs data", Mend.DATA)
    if request.statistics is not None:
        lacking = request.statistics.lacking(wanted_of(todo))
        if lacking:
            first = next(iter(lacking.values()))
            names = ", ".join(path or "the model" for path in lacking)
            raise CalibrationError(
                f"the statistics have no {first!r} of the inputs of {names}", Mend.STATISTICS
            )
        request.statistics.check_fit({(one.path, one.name): one.layout.stack for one in todo})
    if request.calibrated:
        return
    needy = [
        weight
        for weight in todo
        if weight.recipe and (weight.recipe.rounding.needs or weight.recipe.rounding.sequential)
    ]
    if needy:
        raise CalibrationError(f"the rounding of {_layers(needy)} needs data", Mend.DATA)
    static = [
        weight for weight in todo if weight.recipe and weight.recipe.activations.mode == "static"
    ]
    if static:
        raise CalibrationError(
            f"static activations of {_layers(static)} are calibrated on data", Mend.DATA_OR_DYNAMIC
        )


def _layers(weights: Sequence[WeightPlan]) -> str:
    """Return the names of the layers of some weights, each once."""
    return ", ".join(dict.fromkeys(weight.path or "the model" for weight in weights))


def _check_roundings(todo: Sequence[WeightPlan]) -> None:
    """Refuse weights whose grid their rounding cannot use: both were asked for.

    Raises:
        ConfigurationError: naming the layers of the first reason.
    """
    refused: dict[str, list[WeightPlan]] = {}
    for weight in todo:
        if weight.recipe is not None:
            reason = weight.recipe.rounding.refuse(weight.recipe.grid.scheme)
            if reason is not None:
                refused.setdefault(reason, []).append(weight)
    for reason, weights in refused.items():
        names = ", ".join(weight.path or "the model" for weight in weights)
        raise ConfigurationError(
            f"the rounding of {names}: {reason}", Mend.GRID, layer=weights[0].path or "*"
        )


def _refused_inputs(todo: Sequence[WeightPlan]) -> Iterable[str]:
    """Yield a warning where the user asked for quantized inputs and no layer can have them.

    Raises:
        ConfigurationError: static ones were asked for.
    """
    asked: dict[str, list[WeightPlan]] = {}
    for weight in todo:
        mode = weight.settings.activations.mode if weight.settings.activations else None
        if mode is not None:
            asked.setdefault(mode, []).append(weight)
    for mode, weights in asked.items():
        why = {weight.float_inputs: weight.path for weight in reversed(weights)}
        if None in why:
            continue
        reasons = ", ".join(f"{path or 'the model'} ({reason})" for reason, path in why.items())
        told = f"no layer can have the {mode} inputs that were asked for: {reasons}"
        if mode == "static":
            raise ConfigurationError(told, Mend.NO_STATIC)
        yield f"{told}; only weights are quantized"


@attrs.frozen(eq=False)
class _Selected:
    """The names that a request's selectors mean in one model."""

    only: frozenset[str] | None
    skip: frozenset[str]
    overrides: Sequence[tuple[frozenset[str], Selector, Settings]]

    @classmethod
    def of(cls, selection: Selection, request: Request) -> "_Selected":
        only = [selection.names(selector) for selector in request.only]
        return cls(
            frozenset().union(*only) if only else None,
            frozenset().union(*map(selection.names, request.skip)),
            [(selection.names(one), one, settings) for one, settings in request.overrides],
        )

    def settings(self, names: frozenset[str], base: Settings) -> tuple[Settings, bool]:
        """Return the settings of a layer and whether the user named it.

        Raises:
            ConfigurationError: some of them contradict each other, as they follow each other.
        """
        found, before = base, list[tuple[Selector, Settings]]()
        for meant, selector, settings in self.overrides:
            if not names & meant:
                continue
            try:
                found = settings.over(found)
            except ConfigurationError as error:
                if (first := _before(before, settings, base)) is None:
                    raise
                raise ConfigurationError(
                    f"{error}; the override of {selector!r} comes after that of {first!r}, and the "
                    f"last one wins: say that of {selector!r} first"
                ) from error
            before.append((selector, settings))
        asked = self.only is not None and bool(names & self.only)
        return found, asked or bool(before)

    def reason(self, names: frozenset[str]) -> str | None:
        if names & self.skip:
            return "skipped"
        if self.only is not None and not names & self.only:
            return "not among only(...)"
        return None


def _before(
    overrides: Sequence[tuple[Selector, Settings]], last: Settings, base: Settings
) -> Selector | None:
    """Return which override some settings would have to stand before; None where none helps."""
    for place, (selector, _) in enumerate(overrides):
        found = base
        try:
            for settings in (*(one for _, one in overrides[:place]), last):
                found = settings.over(found)
            for _, settings in overrides[place:]:
                found = settings.over(found)
        except ConfigurationError:
            continue
        return selector
    return None


def _weights(model: nn.Module, request: Request) -> list[WeightPlan]:
    """Return the fate of every weight that some layer quantizer knows, ties not yet looked at."""
    selected = _Selected.of(Selection.of(model), request)
    names = _all_names(model)
    refused = _refused_children(model, (*request.containers, *BUILT_IN_CONTAINERS))
    makers = (*request.layers, *BUILT_IN_LAYERS)
    found: list[WeightPlan] = []
    claimed: set[str] = set()
    for path, module in model.named_modules():
        if inside(path, claimed):
            continue
        if isinstance(module, QuantizedModule):
            if module.made_by is None or module.made_by.takes_children:
                claimed.add(path)
            continue
        maker = next((maker for maker in makers if maker.matches(module)), None)
        if maker is None:
            continue
        if maker.takes_children:
            claimed.add(path)
        refusal = refused.get(id(module))
        if "forward" in vars(module):
            refusal = refusal or "its forward was replaced on the object, and would not be asked"
        for name, layout in maker.layouts(module).items():
            called = names[id(module)]
            called |= {f"{one}.{name}" if one else name for one in called}
            settings, asked = selected.settings(called, request.settings)
            reason = selected.reason(called) or refusal
            sources = _sources(module, path, name)
            tensors = [model.get_parameter(source) for source in sources]
            dtypes = {tensor.dtype for tensor in tensors if not tensor.is_floating_point()}
            odd = f"its weight is {dtype_name(min(dtypes, key=str))}" if dtypes else None
            weight = WeightPlan(
                path=path,
                name=name,
                layer=type(module).__name__,
                maker=maker,
                layout=layout,
                settings=settings,
                sources=sources,
                parameters=sum(tensor.numel() for tensor in tensors),
                float_bytes=sum(tensor_bytes(tensor) for tensor in tensors),
                asked=asked,
            )
            found.append(_decide(weight, module, reason or odd, request.calibrated))
    return found


def _decide(
    weight: WeightPlan, module: nn.Module, reason: str | None, has_data: bool
) -> WeightPlan:
    """Return the weight with a recipe, or with the reason why it has none."""
    looked_up = weight.maker.looks_up
    recipe = weight.settings.recipe(weight.layout.stack, has_data, looked_up)
    scheme = recipe.grid.scheme
    reason = reason or weight.maker.refuse(module, scheme) or scheme.refuse(weight.layout.stack)
    if reason is not None:
        return attrs.evolve(weight, reason=reason)
    if weight.settings.width < LOW_BITS and not weight.asked:
        reason = weight.maker.discourage(module, weight.path)
        if reason is None and weight.parameters < SMALL:
            reason = f"fewer than {SMALL} values, below 8 bits unless asked for"
        if reason is not None:
            return attrs.evolve(weight, reason=reason, by_default=True, recipe=None)
    if scheme.nbytes(weight.layout.stack) >= weight.float_bytes and not weight.asked:
        reason = "it would not become smaller"
        return attrs.evolve(weight, reason=reason, by_default=True, recipe=None)
    mode = recipe.activations.mode
    if mode is not None:
        float_inputs = weight.maker.refuse_activation(module, weight.name, mode)
        if float_inputs is not None:
            recipe = attrs.evolve(recipe, activations=Activations())
            return attrs.evolve(weight, recipe=recipe, float_inputs=float_inputs)
    return attrs.evolve(weight, recipe=recipe)


def _join_ties(model: nn.Module, weights: list[WeightPlan]) -> list[WeightPlan]:
    """Give the weights of each tie one fate: quantized alike and stored once, or all float.

    A weight left in float only by default follows one that the user asked for by name.
    """
    owners = _owners(model)
    groups: dict[tuple[object, ...], list[int]] = {}
    for place, weight in enumerate(weights):
        if weight.sources != (weight.key,):
            continue  # computed from others, so its values are its own
        tensor = model.get_parameter(weight.key)
        groups.setdefault(memory_of(tensor), []).append(place)
    joined = list(weights)
    for identity, places in groups.items():
        others = owners[identity] - {
            source for place in places for source in weights[place].sources
        }
        if len(places) == 1 and not others:
            continue
        group = [weights[place] for place in places]
        for place, fate in zip(places, _one_fate(group, sorted(others)), strict=True):
            joined[place] = fate
    return joined


def _one_fate(group: list[WeightPlan], others: list[str]) -> list[WeightPlan]:
    asked = [weight for weight in group if weight.asked and weight.recipe is not None]
    if asked and len({weight.settings for weight in asked}) > 1:
        names = " and ".join(weight.key for weight in asked)
        raise ConfigurationError(
            f"{names} are one tied weight, and different things are asked of it"
        )
    floats = [weight for weight in group if weight.recipe is None]
    if asked:
        floats = [weight for weight in floats if not weight.by_default]
    first = asked[0] if asked else group[0]
    reason = None
    if others:
        reason = f"tied to {others[0]!r}, which no layer quantizer reads"
    elif floats:
        reason = f"tied to {floats[0].key!r}, which stays float: {floats[0].reason}"
    elif any(weight.layout != first.layout for weight in group):
        reason = "tied to a layer that reads the weight in another shape"
    if reason is not None:
        fates = [
            weight if weight in floats else attrs.evolve(weight, recipe=None, reason=reason)
            for weight in group
        ]
    else:
        fates = [_alike(weight, first) for weight in group]
    lead = attrs.evolve(fates[0], aliases=tuple(weight.key for weight in fates[1:]))
    return [lead, *(attrs.evolve(weight, tied_to=lead) for weight in fates[1:])]


def _alike(weight: WeightPlan, first: WeightPlan) -> WeightPlan:
    """Return a tied weight, quantized as the first of the tie; its inputs are its own."""
    recipe = first.recipe
    if recipe is not None:
        own = weight.recipe.activations if weight.recipe is not None else Activations()
        recipe = attrs.evolve(recipe, activations=own)
    return attrs.evolve(weight, recipe=recipe, reason=None)


def _sources(module: nn.Module, path: str, name: str) -> tuple[str, ...]:
    """Return the names of the parameters that a weight is made of; several if parametrized."""
    prefix = f"{path}." if path else ""
    if is_parametrized(module, name):
        made_of = f"parametrizations.{name}."
        return tuple(
            prefix + key for key, _ in module.named_parameters() if key.startswith(made_of)
        )
    return (
        (prefix + name,)
        if name in module._parameters
        else tuple(
            prefix + key
            for key, _ in module.named_parameters(recurse=False)
            if key.startswith(name)
        )
    )


def _all_names(model: nn.Module) -> Mapping[int, frozenset[str]]:
    names: dict[int, frozenset[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        names[id(module)] = names.get(id(module), frozenset()) | {path}
    return names


def _refused_children(model: nn.Module, containers: Sequence[Container]) -> Mapping[int, str]:
    refused: dict[int, str] = {}
    for module in model.modules():
        for container in containers:
            if container.matches(module):
                for name, child in module.named_children():
                    if reason := container.refuse_child(module, name):
                        refused[id(child)] = reason
    return refused


def _owners(model: nn.Module) -> Mapping[tuple[object, ...], set[str]]:
    """Return every name of each parameter, other names of one module left out."""
    owners: dict[tuple[object, ...], set[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                key = f"{path}.{name}" if path else name
                owners.setdefault(memory_of(parameter), set()).add(key)
    return owners
