"""Which layers gain speed from being quantized: each is measured on an example before any is."""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import cast

import attrs
import torch
from torch import Tensor, nn

from mono_quant.base import Container, Grid, QuantizedModule, Statistics
from mono_quant.calibration import CalibrationData, device_of
from mono_quant.checkpoint import calling, copy_structure
from mono_quant.errors import CalibrationError
from mono_quant.gathering import Gathered
from mono_quant.modules import kernels_run
from mono_quant.numerics.extremes import all_finite
from mono_quant.numerics.metrics import tensor_bytes
from mono_quant.observers.minmax import MinMax, MinMaxState
from mono_quant.plan.request import WeightPlan, by_layer
from mono_quant.plan.run import rounded
from mono_quant.plan.simulate import activation_of
from mono_quant.progress import Bar, progress_bar
from mono_quant.rounding import RoundToNearest
from mono_quant.settings import Recipe
from mono_quant.speed import LayerSpeed, take_turns

NO_GAIN = "no gain in speed"
UNREACHED = "the example does not reach it, so nothing shows a gain in speed"

_SHAPES = 8
"""How many different calls of one layer are measured; a loop that lengthens its input has more."""

_SECONDS = 0.5
"""How long one call of a layer is measured, its twin by turns."""

_CACHE = 1 << 27
"""Bytes of other weights that are read between two calls, as a model that is larger does."""

_PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))


@attrs.frozen(eq=False)
class Measured:
    """What was seen of one layer.

    Attributes:
        speed: of one of its calls, or of all that it has within one call of the model.
        kernels: what computed with each weight, by its name.
    """

    speed: LayerSpeed
    kernels: Mapping[str, str]


def measure_layers(
    model: nn.Module,
    todo: Sequence[WeightPlan],
    example: CalibrationData,
    containers: Iterable[Container],
    sizes: tuple[int, int],
    label: str | None,
) -> Mapping[str, Measured]:
    """Return what each layer takes float and quantized, on the inputs that it has in the model.

    The model is called once, in float. Whenever it calls a layer, that is quantized beside it and
    both take turns; calls that are alike (kind and shape of the layer, scheme, shapes of inputs)
    are measured once. Before each turn other weights of the model are read and a copy of the layer
    is run, so that weights lie where they do in the model, and code is in the cache. Only one layer
    is quantized at a time. Its weights are rounded to nearest, and calibrated inputs are on the
    range of that call: neither changes the speed.

    Args:
        model: the float model; containers in it are adapted meanwhile.
        todo: the weights that would be quantized.
        example: what the model is called with.
        containers: those that have to be told to call their layers.
        sizes: bytes of the model before and after: so much is read between two calls of a layer,
            up to what caches hold.
        label: of the progress bar, if one is wanted.

    Returns:
        by the layers' names; those that the example does not reach are absent.

    Raises:
        CalibrationError: the model failed on the example.
        InputError: a weight is not finite; names it.
    """
    known = tuple(containers)
    layers = by_layer(todo)
    watch = _Stopwatch(model, layers, known, sizes)
    bar = progress_bar(label, "layer", len(layers))
    with bar, calling(model, known, layers), watch.running(bar):
        for _ in example.outputs(model):
            pass
    return watch.measured()


def decided(
    weights: Sequence[WeightPlan], found: Mapping[str, Measured], margin: float
) -> tuple[WeightPlan, ...]:
    """Return the weights, those in float whose layers are not faster by more than a margin.

    Layers that share a weight are one: what they take together counts.
    """
    groups = _groups(weight for weight in weights if weight.recipe is not None)
    speeds: dict[int, LayerSpeed] = {}
    for group in {id(group): group for group in groups.values()}.values():
        reached = [found[path].speed for path in sorted(group) if path in found]
        if reached:
            speeds[id(group)] = sum(reached[1:], reached[0])

    def fate(weight: WeightPlan) -> WeightPlan:
        if weight.recipe is None:
            return weight
        speed = speeds.get(id(groups[weight.path]))
        if speed is None:
            return attrs.evolve(weight, recipe=None, reason=UNREACHED)
        if not speed.ratio > 1 + margin:
            return attrs.evolve(weight, recipe=None, reason=NO_GAIN, speed=speed)
        layer = found.get(weight.path)
        kernel = layer.kernels.get(weight.name) if layer is not None else None
        return attrs.evolve(weight, speed=speed, kernel=kernel)

    fates = [fate(weight) for weight in weights]
    leads = {weight.key: weight for weight in fates if weight.tied_to is None}
    return tuple(
        attrs.evolve(weight, tied_to=leads[weight.tied_to.key])
        if weight.tied_to is not None
        else weight
        for weight in fates
    )


def set_apart(weights: Iterable[WeightPlan]) -> list[WeightPlan]:
    """Return the weights that stay float because nothing shows that they gain."""
    return [weight for weight in weights if weight.reason in (NO_GAIN, UNREACHED)]


def outcome(weights: Sequence[WeightPlan], margin: float) -> str:
    """Return how many layers were found to gain, in words."""
    faster = {weight.path for weight in weights if weight.recipe is not None}
    total = len(faster.union(weight.path for weight in set_apart(weights)))
    return (
        f"quantized only where that is more than {margin:.0%} faster on the example: "
        f"{len(faster)} of {total} layer{'s' if total != 1 else ''}"
    )


def rule(margin: float) -> str:
    """Return what will be decided, in words, for a plan that was not measured yet."""
    return (
        "before any is quantized, layers are measured on the example; one that is not more than "
        f"{margin:.0%} faster quantized stays float, so sizes may be larger than predicted"
    )


def _groups(todo: Iterable[WeightPlan]) -> Mapping[str, frozenset[str]]:
    """Return for each layer those that share weights with it, itself among them."""
    groups: dict[str, frozenset[str]] = {}
    for weight in todo:
        paths = {weight.path, weight.tied_to.path if weight.tied_to is not None else weight.path}
        joined = frozenset().union(*(groups.get(path, {path}) for path in paths))
        groups |= dict.fromkeys(joined, joined)
    return groups


class _Stopwatch:
    """Measures layers when a model calls them."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Sequence[WeightPlan]],
        containers: tuple[Container, ...],
        sizes: tuple[int, int],
    ) -> None:
        self._model, self._layers, self._containers = model, layers, containers
        self._sizes = sizes
        self._trials: dict[Hashable, Measured] = {}
        self._calls: dict[str, Counter[Hashable]] = {}
        self._hooks: set[int] = set()

    @contextmanager
    def running(self, bar: Bar) -> Iterator[None]:
        """Measure until the end; count layers on a bar as each has been called."""

        def see(  # a function of no object, since copies of a layer copy its hooks
            path: str, layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
        ) -> None:
            known = len(self._calls)
            self._see(path, layer, args, kwargs)
            bar.update(len(self._calls) - known)

        with ExitStack() as hooks:
            for path in self._layers:
                module = self._model.get_submodule(path)
                handle = module.register_forward_pre_hook(partial(see, path), with_kwargs=True)
                hooks.callback(handle.remove)
                self._hooks.add(handle.id)
            yield

    def measured(self) -> Mapping[str, Measured]:
        """Return what each layer that was called takes, all its calls together."""
        return {
            path: self._together([(self._trials[key], count) for key, count in calls.items()])
            for path, calls in self._calls.items()
        }

    def _together(self, trials: Sequence[tuple[Measured, int]]) -> Measured:
        speed = LayerSpeed(
            sum(count * trial.speed.float_seconds for trial, count in trials),
            sum(count * trial.speed.seconds for trial, count in trials),
        )
        names = dict.fromkeys(name for trial, _ in trials for name in trial.kernels)
        ran = {
            name: dict.fromkeys(trial.kernels[name] for trial, _ in trials if name in trial.kernels)
            for name in names
        }
        return Measured(speed, {name: ", ".join(kernels) for name, kernels in ran.items()})

    def _see(
        self, path: str, layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        weights = self._layers[path]
        calls = self._calls.setdefault(path, Counter())
        key = (_looks(layer), _asked(weights), _form(args), _form(kwargs))
        if key not in calls and len(calls) >= _SHAPES:
            return
        calls[key] += 1
        if key not in self._trials:
            self._trials[key] = self._tried(weights, layer, args, kwargs)

    def _tried(
        self,
        weights: Sequence[WeightPlan],
        layer: nn.Module,
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> Measured:
        twin = self._unwatched(layer)
        known = _inputs(weights, twin, args, kwargs)
        twin = _twin(weights, twin, known)
        floats = self._reverted(self._unwatched(layer))
        own = {parameter.data_ptr() for parameter in layer.parameters()}
        others = [one for one in self._model.parameters() if one.data_ptr() not in own]

        def after_others(size: int, another: nn.Module) -> None:
            """Leave the caches as a model does that comes to a layer after others of its kind."""
            read(others, min(size, _CACHE))
            another(*args, **kwargs)

        floats(*args, **kwargs)  # what only a first call does is not counted
        with kernels_run() as ran:
            twin(*args, **kwargs)
        before, after = self._sizes
        turns = take_turns(
            partial(floats, *args, **kwargs),
            partial(twin, *args, **kwargs),
            _SECONDS,
            device_of(layer),
            (
                partial(after_others, before, _apart(floats)),
                partial(after_others, after, _apart(twin)),
            ),
        )
        kernels = {name: kernel for (module, name), kernel in ran.items() if module is twin}
        return Measured(turns.quiet, kernels)

    def _unwatched(self, layer: nn.Module) -> nn.Module:
        """Return a copy of a layer whose calls are not seen."""
        copied = copy_structure(layer)
        for module in copied.modules():
            for hook in self._hooks:
                module._forward_pre_hooks.pop(hook, None)
                module._forward_pre_hooks_with_kwargs.pop(hook, None)
        return copied

    def _reverted(self, layer: nn.Module) -> nn.Module:
        """Return the layer, containers in it as they are where nothing is quantized."""
        for module in layer.modules():
            container = next((one for one in self._containers if one.matches(module)), None)
            if container is not None:
                container.revert(module)
        return layer


def _apart(layer: nn.Module) -> nn.Module:
    """Return a copy of a layer in memory of its own."""
    copied = copy_structure(layer)
    copied._apply(torch.clone)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return copied


def _twin(
    weights: Sequence[WeightPlan], layer: nn.Module, known: Mapping[str, Gathered]
) -> QuantizedModule:
    """Return a float layer, turned into the quantized one."""
    quick = [_quick(weight) for weight in weights]
    packed = {weight.name: rounded(weight, layer, Statistics())[0] for weight in quick}
    found = {
        weight.name: activation_of(weight, known.get(weight.name, Gathered())) for weight in quick
    }
    inputs = {name: activation for name, activation in found.items() if activation is not None}
    return weights[0].maker.replace(layer, packed, inputs).eval()


def _quick(weight: WeightPlan) -> WeightPlan:
    """Return a weight whose grid points and ranges are found in the quickest way."""
    recipe = cast("Recipe", weight.recipe)  # only weights with a recipe come here
    grid = Grid(recipe.grid.scheme, MinMax())
    return attrs.evolve(weight, recipe=Recipe(grid, RoundToNearest(), recipe.activations))


def _inputs(
    weights: Sequence[WeightPlan],
    layer: nn.Module,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
) -> Mapping[str, Gathered]:
    """Return the ranges of one call's inputs, where some are to be static."""
    if not any(weight.recipe and weight.recipe.activations.mode == "static" for weight in weights):
        return {}
    observer, states = MinMax(), dict[str, MinMaxState]()
    for name, x in weights[0].maker.inputs(layer, args, kwargs):
        if not x.numel():
            continue
        if not all_finite(x):
            raise CalibrationError(f"what reaches {weights[0].path!r} holds NaN or infinity")
        state = observer.observe(x)
        states[name] = observer.merge(states[name], state) if name in states else state
    return {
        name: Gathered(Statistics(), Statistics({observer: state}))
        for name, state in states.items()
    }


def _looks(layer: nn.Module) -> Hashable:
    """Return what tells one layer from another, but for values."""
    return tuple(
        (
            path,
            type(module),
            tuple((name, repr(value)) for name, value in vars(module).items() if _is_plain(value)),
            tuple((name, _form(one)) for name, one in module._parameters.items()),
        )
        for path, module in layer.named_modules()
    )


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _asked(weights: Sequence[WeightPlan]) -> Hashable:
    """Return how a layer is to be quantized."""
    return tuple(
        (weight.name, repr(weight.maker), recipe.grid.scheme, recipe.activations)
        for weight in weights
        if (recipe := weight.recipe) is not None
    )


def _form(value: object) -> Hashable:
    """Return what a value is like: of tensors the shape and how they lie, of numbers all."""
    if isinstance(value, Tensor):
        dense = value.layout is torch.strided and not value.is_nested
        shape = tuple(value.shape) if dense else repr(value.layout)
        strides = value.stride() if dense else ()
        return (shape, strides, value.dtype, value.device)
    if isinstance(value, Mapping):
        return tuple((str(name), _form(item)) for name, item in value.items())
    if isinstance(value, tuple | list):
        return (type(value), *map(_form, value))
    return repr(value) if isinstance(value, _PLAIN) else type(value).__qualname__


def read(tensors: Iterable[Tensor], limit: int) -> int:
    """Read floats up to a number of bytes, so that caches hold them, and return how many it was."""
    seen = 0
    for tensor in tensors:
        if seen >= limit:
            break
        if not tensor.is_floating_point() or tensor.is_nested or tensor.element_size() == 1:
            continue  # no sum is known of 8-bit floats
        values = tensor.detach()
        if values.is_contiguous():
            values = values.flatten()[: -(-(limit - seen) // values.element_size())]
        values.sum()
        seen += tensor_bytes(values)
    return seen
