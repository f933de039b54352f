"""What would help where quantizing costs more than it should and destroys no layer: by trial."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice

import attrs
from torch import nn

from mono_quant.base import Statistics
from mono_quant.calibration import CalibrationData, Noted, compare, evaluating, output_error
from mono_quant.checkpoint import copy_structure
from mono_quant.evidence import WARNING_DB, LayerReport
from mono_quant.numerics.granularity import PerGroup
from mono_quant.numerics.metrics import SquaredError
from mono_quant.plan.request import WeightPlan
from mono_quant.plan.run import rounded
from mono_quant.schemes import Affine
from mono_quant.text import format_db

_TRIED = 3
"""Layers that are tried in float, those that return least; and always fewer than half of all."""

_WORTH_DB = 3.0
"""What floats in their place, or groups, have to gain: half of the error."""

OUTLIER = 20.0
"""How far columns, rows or channels have to dwarf the median one to be worth a word."""

_GROUPS = (32, 16, 8)


def has_outlier_columns(row: LayerReport) -> bool:
    """Return whether columns dwarf others on their scale, in a layer that is not known sound."""
    shared = bool(row.scale_block) and row.scale_block[-1] == row.columns
    return shared and (row.outliers or 0) >= OUTLIER and not row.is_sound


def groups_for(row: LayerReport) -> int | None:
    """Return a size of groups that keeps columns of a weight apart, or None where none fits."""
    return next((size for size in _GROUPS if row.columns % size == 0), None)


def groups_help(row: LayerReport) -> bool:
    """Return whether groups that fit help what the layer returns, as far as that was tried."""
    tried = row.groups_gain_db
    return groups_for(row) is not None and (tried is None or tried >= _WORTH_DB)


@attrs.frozen
class Relief:
    """Layers without which the model's output would be better.

    Attributes:
        layers: their names, with the SQNR of what each returns for its float inputs, in dB.
        output_db: SQNR of the model's output with these layers in float.
        batches: the first ones, which it is of; None for all.
    """

    layers: tuple[tuple[str, float], ...]
    output_db: float
    batches: int | None = None

    def __str__(self) -> str:
        """Return what was found, and the calls that do it."""
        names = " and ".join(
            f"{name} (returns {format_db(decibels)})" for name, decibels in self.layers
        )
        calls = ", ".join(f"skip({name!r})" for name, _ in self.layers)
        level = format_db(self.output_db)
        batches = "batch" if self.batches == 1 else f"{self.batches} batches"
        some = f" on the first {batches}" if self.batches is not None else ""
        return f"with {names} in float, the output would be at {level}{some}: {calls}"


def relief(
    floats: nn.Module,
    model: nn.Module,
    errors: Mapping[str, SquaredError],
    outputs: Sequence[SquaredError],
    data: CalibrationData,
    noted: Noted,
) -> Relief | None:
    """Return the layers that cost the output most, or None where no few of them do.

    Up to three layers that return least, and fewer than half of all, run in float in the quantized
    model, all of them and then fewer, on the batches of which outputs are at hand. As few are named
    as come near what all of them gain, or bring the output above 20 dB.

    Args:
        floats: the float twin, whose layers are put in.
        model: the quantized one.
        errors: of what each layer returns, by name.
        outputs: of the model's outputs, a batch each.
        data: example data.
        noted: what the float model returns for the first of them.
    """
    tried = min(_TRIED, (len(errors) - 1) // 2)
    worst = sorted(errors, key=lambda path: errors[path].sqnr_db)[:tried]
    if not worst:
        return None
    count = len(noted.kept)

    def without(paths: Iterable[str]) -> float:
        with ExitStack() as hooks:
            for path in paths:
                instead = partial(_instead, floats.get_submodule(path))
                layer = model.get_submodule(path)
                hooks.callback(layer.register_forward_hook(instead, with_kwargs=True).remove)
            return compare(noted.kept, islice(data.outputs(model), count)).sqnr_db

    before = SquaredError.total(outputs[:count]).sqnr_db
    found = without(worst)
    if not found >= before + _WORTH_DB:
        return None
    enough = min(found - 1, WARNING_DB)
    for few in range(1, len(worst)):
        if (fewer := without(worst[:few])) >= enough:
            worst, found = worst[:few], fewer
            break
    named = tuple((path, errors[path].sqnr_db) for path in worst)
    return Relief(named, found, None if noted.complete else count)


def _instead(
    layer: nn.Module,
    _: nn.Module,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    __: object,
) -> object:
    with evaluating(layer):  # the layer alone: somebody else is running the model
        return layer(*args, **kwargs)


def with_tried_groups(
    rows: Mapping[str, LayerReport],
    floats: nn.Module,
    todo: Sequence[WeightPlan],
    data: CalibrationData,
) -> Mapping[str, LayerReport]:
    """Return the rows, those whose columns ask for groups with what groups gain in their layers.

    A weight is quantized in groups alone in its float layer, and held against itself as it is. One
    more run of the float model where any asks for it.
    """
    trials: list[_Trial] = []
    for weight in todo:
        row = rows.get(weight.key)
        size = groups_for(row) if row is not None and has_outlier_columns(row) else None
        if size is not None and (trial := _Trial.of(weight, size, floats)) is not None:
            trials.append(trial)
    if not trials:
        return rows
    with ExitStack() as hooks:
        for trial in trials:
            module = floats.get_submodule(trial.weight.path)
            hooks.callback(module.register_forward_hook(trial.see, with_kwargs=True).remove)
        for _ in data.outputs(floats):
            pass
    gains = {trial.weight.key: trial.gain_db for trial in trials if trial.errors[0].count}
    return {
        name: attrs.evolve(row, groups_gain_db=gains[name]) if name in gains else row
        for name, row in rows.items()
    }


@attrs.define(eq=False)
class _Trial:
    """A float layer with one weight quantized, as planned and in groups."""

    weight: WeightPlan
    planned: nn.Module
    grouped: nn.Module
    errors: tuple[SquaredError, SquaredError] = (SquaredError(), SquaredError())

    @classmethod
    def of(cls, weight: WeightPlan, size: int, floats: nn.Module) -> "_Trial | None":
        """Return the trial of groups of a size, None where a rounding or scheme forbids it."""
        recipe, layer = weight.recipe, floats.get_submodule(weight.path)
        if recipe is None or recipe.rounding.needs or not isinstance(recipe.grid.scheme, Affine):
            return None
        scheme = attrs.evolve(recipe.grid.scheme, granularity=PerGroup(size))
        grid = attrs.evolve(recipe.grid, scheme=scheme)
        other = attrs.evolve(weight, recipe=attrs.evolve(recipe, grid=grid))
        return cls(weight, _alone(weight, layer), _alone(other, layer))

    def see(
        self,
        _: nn.Module,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        output: object,
    ) -> None:
        """Run both on what the float layer was called with."""
        planned, grouped = self.errors
        planned += output_error(output, self.planned(*args, **kwargs))
        grouped += output_error(output, self.grouped(*args, **kwargs))
        self.errors = planned, grouped

    @property
    def gain_db(self) -> float:
        """How much less error groups leave in what the layer returns, in dB."""
        planned, grouped = self.errors
        return grouped.sqnr_db - planned.sqnr_db


def _alone(weight: WeightPlan, layer: nn.Module) -> nn.Module:
    """Return a float layer with one weight quantized and its inputs in float, in eval mode."""
    packed, _ = rounded(weight, layer, Statistics())
    made = weight.maker.replace(copy_structure(layer), {weight.name: packed}, {})
    return made.eval()
