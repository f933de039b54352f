"""What can be shown of a plan: the predicted report, its notes, and the peak of memory."""

from collections import Counter
from collections.abc import Iterable, Sequence

import attrs
from torch import nn

from mono_quant.base import Change
from mono_quant.configurable import Config
from mono_quant.plan.accounting import account
from mono_quant.plan.request import WeightPlan
from mono_quant.plan.stages import block_of
from mono_quant.result import Outline
from mono_quant.rounding import RoundToNearest
from mono_quant.settings import Recipe
from mono_quant.text import joined

WORK_BYTES = 12
"""Bytes of working memory that each value of the layer at hand takes while it is quantized."""


def outline_of(
    model: nn.Module,
    weights: Sequence[WeightPlan],
    config: Config,
    notes: Iterable[str],
    warnings: Iterable[str],
    changes: Sequence[Change] = (),
) -> Outline:
    """Return the outline of a plan, with further notes after its own.

    Args:
        model: as it was given.
        weights: their fates.
        config: what was asked for.
        notes: further ones.
        warnings: those of the plan.
        changes: what is foreseen to be done to the model first.
    """
    todo = [weight for weight in weights if weight.recipe is not None]
    report = attrs.evolve(
        account(model, weights, changes), notes=(*_notes(weights), *notes), warnings=tuple(warnings)
    )
    work = WORK_BYTES * max((weight.parameters for weight in todo), default=0)
    work += _of_roundings(model, todo)
    return Outline(
        report, report.float_bytes + report.bytes + work, report.float_bytes + work, config
    )


def _of_roundings(model: nn.Module, todo: Sequence[WeightPlan]) -> int:
    """Return the bytes that roundings take beside weights: of all weights of a block at once."""
    blocks: Counter[str] = Counter()
    for weight in todo:
        if weight.recipe is not None and weight.tied_to is None:
            taken = weight.recipe.rounding.work_bytes(weight.layout.stack)
            if taken:
                blocks[block_of(model, weight.path, todo)] += taken
    return max(blocks.values(), default=0)


_FLOATS_SLOWED = (
    "on a CPU 8-bit floats are decoded and multiplied as floats, slower than before; a CUDA device "
    "multiplies them as they are in Linear layers whose weights are such floats too"
)


def _notes(weights: Sequence[WeightPlan]) -> Iterable[str]:
    if not any(weight.recipe is not None for weight in weights):
        yield "no weight is quantized by this"
    yield from _roundings(weights)
    slowed: dict[str, list[str]] = {}
    for weight in weights:
        if weight.recipe is None or weight.recipe.activations.mode is None:
            continue
        floats = weight.recipe.activations.dtype is not None
        text = _FLOATS_SLOWED if floats else weight.maker.slowed
        if text is not None:
            paths = slowed.setdefault(text, [])
            paths += [weight.path] if weight.path not in paths else []
    for text, (first, *more) in slowed.items():
        names = f"{first or 'the layer'} and {len(more)} more" if more else first or "the layer"
        yield f"quantized inputs of {names}: {text}"


def _roundings(weights: Sequence[WeightPlan]) -> Iterable[str]:
    """Yield how weights are rounded, where that is more than to nearest, and what was chosen."""
    recipes = [(weight, weight.recipe) for weight in weights if weight.recipe is not None]
    counts = Counter(
        (weight.settings.quality, recipe.rounding, recipe.grid.observer)
        for weight, recipe in recipes
        if weight.settings.quality is not None or not isinstance(recipe.rounding, RoundToNearest)
    )
    for (quality, rounding, observer), count in counts.items():
        chosen = f"quality {quality!r}: " if quality is not None else ""
        noun = "weight" if count == 1 else "weights"
        yield f"{chosen}{count} {noun} by {rounding.describe()}; ranges by {observer!r}"
    blind = [
        weight
        for weight, recipe in recipes
        if weight.tied_to is None and weight.settings.rounding not in (None, recipe.rounding)
    ]
    if blind:
        names = joined([weight.key for weight in blind])
        asked = joined(sorted({type(weight.settings.rounding).__name__ for weight in blind}))
        yield f"rows of {names} are looked up and meet no inputs for {asked}: rounded to nearest"
    missed = {
        weight.settings.quality
        for weight, recipe in recipes
        if weight.tied_to is None and recipe.rounding != _with_data(weight).rounding
    }
    for quality in sorted(map(repr, missed)):
        yield f"quality {quality} learns from data, of which fit(data) gave none"


def _with_data(weight: WeightPlan) -> Recipe:
    """Return the recipe that a weight would have if there were data."""
    return weight.settings.recipe(weight.layout.stack, True, weight.maker.looks_up)
