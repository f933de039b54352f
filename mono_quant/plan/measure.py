"""What data does for a plan: it is gathered from, measured on, and corrected by."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import attrs
from torch import Tensor, nn

from mono_quant.base import (
    Change,
    Correction,
    CorrectionContext,
    Transform,
    TransformContext,
)
from mono_quant.calibration import (
    CalibrationData,
    evaluating,
    left_over,
    output_error,
    positional_arguments,
)
from mono_quant.errors import CalibrationError
from mono_quant.evidence import LayerReport
from mono_quant.gathering import Gathered, Gathering, Wanted
from mono_quant.numerics.metrics import SquaredError
from mono_quant.numerics.nested import tensors_in
from mono_quant.plan.accumulated import Accumulated
from mono_quant.plan.chosen import Chosen
from mono_quant.plan.inputs import InputUses
from mono_quant.plan.request import Request, WeightPlan, by_layer
from mono_quant.text import joined
from mono_quant.transforms import FoldBatchNorm
from mono_quant.transforms.edits import mark


def transforms_of(request: Request, weights: Iterable[WeightPlan]) -> tuple[Transform, ...]:
    """Return what is done to the float model: folding first, where it is asked for or due."""
    fold, weights = request.fold, tuple(weights)
    if fold is None:
        recipes = [weight.recipe for weight in weights if weight.recipe is not None]
        fold = any(recipe.activations.mode is not None for recipe in recipes)
    transforms = Chosen.of(request, weights).transforms
    return (*((FoldBatchNorm(),) if fold else ()), *transforms)


def unmeasured(request: Request, weights: Iterable[WeightPlan]) -> Iterator[str]:
    """Yield what is not in the speeds of layers, which are measured as they were given."""
    names = [type(one).__name__ for one in transforms_of(request, weights) if one.slows]
    if names:
        yield f"speeds of layers are without {joined(names)}, which takes time at each call"


def foreseen(
    model: nn.Module, request: Request, weights: Iterable[WeightPlan]
) -> tuple[Change, ...]:
    """Return what a plan can know of what will be done to a model, before and after."""
    has_data, weights = request.data is not None, tuple(weights)
    found: list[Change] = []
    for one in transforms_of(request, weights):
        found += one.foresee(model, has_data=has_data)
    return (*found, *Chosen.of(request, weights).foreseen)


def transform(
    model: nn.Module,
    transforms: Iterable[Transform],
    todo: Iterable[WeightPlan],
    data: CalibrationData | None,
    progress: bool = False,
) -> tuple[Change, ...]:
    """Apply transforms to a float model and return what they did, noted in the model too."""
    outputs = data.outputs if data is not None else None
    targets = {one.key: one.recipe.target for one in todo if one.recipe is not None}
    context = TransformContext(outputs, targets, progress)
    return _noted(model, (one.apply(model, context) for one in transforms))


def correct(
    model: nn.Module,
    corrections: Iterable[Correction],
    context: CorrectionContext,
) -> tuple[Change, ...]:
    """Apply corrections to a quantized model and return what they did, noted in the model too."""
    return _noted(model, (one.apply(model, context) for one in corrections))


def _noted(model: nn.Module, done: Iterable[Sequence[Change]]) -> tuple[Change, ...]:
    """Return all changes, each noted in the model before the next is made."""
    changes: list[Change] = []
    for found in done:
        for change in found:
            mark(model, change.edits)
        changes += found
    return tuple(changes)


def wanted_of(todo: Iterable[WeightPlan]) -> Mapping[str, Wanted]:
    """Return what roundings and ranges of activations ask of the data, by layer."""
    wanted: dict[str, Wanted] = {}
    for weight in todo:
        recipe = weight.recipe
        if recipe is None:
            continue
        static = recipe.activations.mode == "static"
        of_rows = tuple(dict.fromkeys((*recipe.rounding.needs, *recipe.grid.scheme.uses)))
        if of_rows or static:
            known = wanted.get(weight.path, Wanted(weight.maker, {}, {}))
            observers = (recipe.observer,) if static else ()
            wanted[weight.path] = Wanted(
                weight.maker,
                {**known.of_rows, weight.name: of_rows},
                {**known.of_inputs, weight.name: observers},
            )
    return wanted


def gather_for(
    model: nn.Module,
    todo: Iterable[WeightPlan],
    data: CalibrationData | None,
    label: str | None,
) -> Mapping[tuple[str, str], Gathered]:
    """Return what weights ask of the data, from one pass over it; nothing where there is none."""
    wanted = wanted_of(todo)
    if data is None or not wanted:
        return {}
    with Gathering(model, wanted).attached() as gathering:
        for _ in data.outputs(model, label and "calibrating"):
            pass
    return gathering.found()


@attrs.frozen(eq=False)
class LayerErrors:
    """The error of what each quantized layer returns, for the inputs of its float twin.

    Attributes:
        floats: the float model.
        model: the quantized one.
        uses: what was seen of the inputs meanwhile.
        accumulated: what is to be seen of the layers inside the quantized model.
        errors: by the layers' names, after `outputs` was gone through; layers that no data reached
            are absent.
    """

    floats: nn.Module
    model: nn.Module
    uses: InputUses
    accumulated: Accumulated
    errors: dict[str, SquaredError] = attrs.field(factory=dict)

    def outputs(
        self, todo: Iterable[WeightPlan], data: CalibrationData, progress: str | None
    ) -> Iterator[list[Tensor]]:
        """Yield the outputs of the float model, measuring the layers of these weights meanwhile.

        Raises:
            CalibrationError: NaN reaches a layer, whose output then says nothing of quantizing.
        """
        with ExitStack() as hooks:
            for path, weights in by_layer(todo).items():
                module = self.floats.get_submodule(path)
                handle = module.register_forward_hook(partial(self._add, weights), with_kwargs=True)
                hooks.callback(handle.remove)
            yield from data.outputs(self.floats, progress)

    def _add(
        self,
        weights: Sequence[WeightPlan],
        module: nn.Module,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        output: object,
    ) -> None:
        path = weights[0].path
        given = tensors_in((args, kwargs))
        if any(bool(x.isnan().any()) for x in given if x.is_floating_point()):
            raise CalibrationError(f"what reaches {path!r} in the float model holds NaN")
        self.uses.see(weights, module, args, kwargs)
        layer = self.model.get_submodule(path)
        with evaluating(layer):  # the layer alone: somebody else may be running the model
            other = layer(*args, **kwargs)
        error = output_error(output, other)
        self.accumulated.keep(path, output)
        if error.count:
            self.errors[path] = self.errors.get(path, SquaredError()) + error


def with_outputs(
    rows: Mapping[str, LayerReport],
    todo: Sequence[WeightPlan],
    layers: LayerErrors,
) -> Mapping[str, LayerReport]:
    """Return the rows with the SQNR of what their layers return, and what is known of inputs."""
    inputs = layers.uses.reports(todo)
    paths = {weight.key: weight.path for weight in todo}

    def measured(name: str, row: LayerReport) -> LayerReport:
        path = paths[name]
        error, inside = layers.errors.get(path), layers.accumulated.errors.get(path)
        return attrs.evolve(
            row,
            output_sqnr_db=error.sqnr_db if error is not None else None,
            accumulated_db=inside.sqnr_db if inside is not None and inside.count else None,
            place=layers.accumulated.order.get(path),
            inputs=tuple(inputs[key] for key in (name, *row.aliases) if key in inputs),
        )

    return {name: measured(name, row) for name, row in rows.items()}


def left_out(model: nn.Module, data: CalibrationData) -> list[str]:
    """Return what of each batch was not handed to the model."""
    extra, taken = left_over(model, data), positional_arguments(model)
    if not extra or taken is None:
        return []
    return [
        f"the last {extra} of {taken + extra} items of each batch were left out, since forward "
        f"takes {taken}: taken for labels"
    ]
