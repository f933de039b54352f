"""What will be done to each layer of one model, decided and shown before a tensor is touched."""

from collections.abc import Iterable, Mapping
from typing import Generic

import attrs
from torch import nn

from mono_quant.base import Container, QuantizedModule
from mono_quant.calibration import (
    CalibrationData,
    Gathered,
    Outputs,
    Wanted,
    compare,
    count_samples,
    gather,
    positional_arguments,
)
from mono_quant.checkpoint import ModelT, adapt_containers, calling, copy_structure
from mono_quant.errors import InputError
from mono_quant.layers import BUILT_IN_CONTAINERS
from mono_quant.numerics.metrics import SquaredError
from mono_quant.plan.request import Request, WeightPlan
from mono_quant.plan.run import check_finite, check_fits, quantize_weights
from mono_quant.plan.warnings import warnings_of
from mono_quant.result import Outline, QuantizationResult


@attrs.frozen(eq=False)
class Plan(Generic[ModelT]):
    """What will be done to each layer of one model. Nothing has been touched yet.

    Attributes:
        weights: the fate of each weight that some layer quantizer knows.
        outline: what can be shown of it.
    """

    _model: ModelT = attrs.field(alias="model")
    _request: Request = attrs.field(alias="request")
    weights: tuple[WeightPlan, ...]
    outline: Outline

    def explain(self) -> str:
        """Return what will happen to each weight and why, predicted size and peak memory."""
        return self.outline.explain()

    def __str__(self) -> str:
        """Return `explain()`."""
        return self.explain()

    def run(self, *, in_place: bool = False, progress: bool = True) -> QuantizationResult[ModelT]:
        """Carry the plan out, layer by layer.

        Args:
            in_place: change the model itself, and free its float weights on the way.
            progress: show progress bars where the output is a terminal.

        Returns:
            the quantized model with the evidence.

        Raises:
            InputError: a weight is not finite; names it.
            CalibrationError: the model failed on the data.
        """
        label = "quantizing" if progress else None
        request = self._request
        data = request.data.held() if request.data is not None else None
        todo = [weight for weight in self.weights if weight.recipe is not None]
        kept = Outputs()
        self._check_unspent(todo)
        if in_place:
            self._check_values(todo)
            if data is not None:
                for outputs in data.outputs(self._model, label and "float outputs"):
                    kept.add(outputs)
        work = self._model if in_place else copy_structure(self._model)
        for transform in request.transforms:
            transform.apply(work)
        containers = (*request.containers, *BUILT_IN_CONTAINERS)
        statistics = _gather(work, todo, containers, data, label)
        work, rows = quantize_weights(work, todo, statistics, label)
        adapt_containers(work, containers)
        error, samples, notes = SquaredError(), 0, self.outline.report.notes
        if data is not None:
            floats = kept if in_place else data.outputs(self._model)
            error = compare(floats, data.outputs(work, label and "measuring"))
            samples = sum(count_samples(batch) for batch in data.batches())
            notes = (*notes, *left_out(work, data))
        report = attrs.evolve(
            self.outline.report,
            layers=tuple(rows.get(row.name, row) for row in self.outline.report.layers),
            output_sqnr_db=error.sqnr_db if data is not None else None,
            samples=samples,
            notes=notes,
        )
        report = attrs.evolve(report, warnings=warnings_of(report))
        example = CalibrationData([data.first()], 1, data.forward) if data is not None else None
        return QuantizationResult(work, report, self.outline, example, request.layers)

    def _check_unspent(self, todo: Iterable[WeightPlan]) -> None:
        for weight in todo:
            if isinstance(self._model.get_submodule(weight.path), QuantizedModule):
                raise InputError(
                    f"{weight.path!r} is quantized already: this plan was carried out in place; "
                    "make another with plan(model)"
                )

    def _check_values(self, todo: Iterable[WeightPlan]) -> None:
        """Refuse what would only be refused halfway, with a part of the model changed."""
        for weight in todo:
            for source in weight.sources:
                tensor = self._model.get_parameter(source)
                check_finite(source, tensor)
                if weight.recipe is not None:
                    check_fits(source, tensor, weight.recipe.grid.scheme)


def _gather(
    work: nn.Module,
    todo: Iterable[WeightPlan],
    containers: Iterable[Container],
    data: CalibrationData | None,
    label: str | None,
) -> Mapping[tuple[str, str], Gathered]:
    """Return what roundings and ranges of activations need, from one pass over the data."""
    wanted: dict[str, Wanted] = {}
    for weight in todo:
        recipe = weight.recipe
        if recipe is None or data is None:  # the plan has refused what needs data without any
            continue
        static = recipe.activations.mode == "static"
        if recipe.rounding.needs or static:
            known = wanted.get(weight.path, Wanted(weight.maker, {}, {}))
            observers = (recipe.observer,) if static else ()
            wanted[weight.path] = Wanted(
                weight.maker,
                {**known.of_rows, weight.name: recipe.rounding.needs},
                {**known.of_inputs, weight.name: observers},
            )
    if not wanted or data is None:
        return {}
    with calling(work, containers, wanted):
        return gather(work, wanted, data, label and "calibrating")


def left_out(model: nn.Module, data: CalibrationData) -> list[str]:
    """Return what of each batch was not handed to the model."""
    batch = data.first()
    taken = positional_arguments(model)
    if data.forward is not None or not isinstance(batch, tuple | list) or taken is None:
        return []
    extra = len(batch) - taken
    if extra <= 0:
        return []
    return [
        f"the last {extra} of {len(batch)} items of each batch were left out, since forward takes "
        f"{taken}: taken for labels"
    ]
