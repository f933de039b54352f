"""What does the damage where a quantized layer no longer computes what it did, and the way out."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import attrs
import torch
from torch import Tensor, nn

from mono_quant.base import Grid, QuantizedModule
from mono_quant.calibration import CalibrationData, output_error
from mono_quant.checkpoint import copy_structure
from mono_quant.evidence import CRITICAL_DB, WARNING_DB, LayerReport
from mono_quant.numerics.metrics import SquaredError
from mono_quant.observers import MinMax
from mono_quant.plan.request import LOW_BITS, WeightPlan
from mono_quant.rounding import RoundToNearest
from mono_quant.schemes import FloatCast
from mono_quant.settings import Activations, Recipe
from mono_quant.text import format_db


@attrs.frozen
class Culprit:
    """One weight of a damaged layer.

    Attributes:
        key: the weight's dotted name.
        weight_db: SQNR of the layer's output with this weight alone quantized; of an estimate for a
            model without data.
        both_db: with its inputs quantized too; None where they are not.
        cast_db: of the same estimate with the weight at 16 bits; None where that was not tried.
        faint: whether the estimate is for inputs that meet small weights alone.
    """

    key: str
    weight_db: float
    both_db: float | None = None
    cast_db: float | None = None
    faint: bool = False

    @property
    def by_weight(self) -> bool:
        """Whether the weight alone costs too much."""
        return not self.weight_db >= WARNING_DB

    @property
    def by_inputs(self) -> bool:
        """Whether its inputs cost too much, and not the weight."""
        return not self.by_weight and self.both_db is not None and not self.both_db >= WARNING_DB


@attrs.frozen
class Damage:
    """A layer that no longer computes what it did.

    Attributes:
        path: its dotted name.
        output_db: SQNR of what it returns for its float inputs; None where it was only estimated.
        culprits: its weights.
    """

    path: str
    output_db: float | None
    culprits: tuple[Culprit, ...]

    @property
    def guilty(self) -> tuple[Culprit, ...]:
        """The weights that do it, or all of them where none does it alone."""
        found = tuple(one for one in self.culprits if one.by_weight or one.by_inputs)
        return found or self.culprits

    def __str__(self) -> str:
        """Return what happened, what does it, and the calls that mend it."""
        if self.output_db is None:
            ((one),) = self.culprits
            where = (
                " where inputs are loud for the smaller half of each row's values, to which the "
                "largest leave few codes"
                if one.faint
                else ""
            )
            tried = f", which leaves {format_db(one.cast_db)}" if one.cast_db is not None else ""
            return (
                f"{one.key} would leave {format_db(one.weight_db)} of what its layer returns"
                f"{where} (an estimate for drawn inputs: no layer was measured); fit(data) has it "
                'measured, on_damage("keep") mends it, and so does '
                f"override({one.key!r}, bits=16){tried}"
            )
        causes, calls = [], []
        for one in self.guilty:
            if one.by_inputs and one.both_db is not None:
                causes.append(f"{format_db(one.both_db)} by the inputs of {one.key}")
                calls.append(f'override({one.key!r}, activations="float")')
            else:
                causes.append(f"{format_db(one.weight_db)} by {one.key} alone")
                calls.append(f"override({one.key!r}, bits=16)")
        name = self.path or "the model"
        grave = "critical: " if not self.output_db >= CRITICAL_DB else ""
        return (
            f"{grave}{name} returns {format_db(self.output_db)} SQNR for its "
            f'float inputs ({", ".join(causes)}); say on_damage("keep"), or {", ".join(calls)}'
        )


def estimated(rows: Iterable[LayerReport]) -> tuple[Damage, ...]:
    """Return the weights whose estimate, without data, is below what a layer needs."""
    found = []
    for row in rows:
        if row.is_doubtful and row.drawn_db is not None:
            one = Culprit(row.name, row.drawn_db, cast_db=row.cast_db, faint=row.loses_faint)
            found.append(Damage(row.name.rpartition(".")[0], None, (one,)))
    return tuple(found)


def diagnosed(
    floats: nn.Module,
    model: nn.Module,
    todo: Sequence[WeightPlan],
    errors: Mapping[str, SquaredError],
    data: CalibrationData,
) -> tuple[Damage, ...]:
    """Return the layers whose output was destroyed, and which of their weights does it.

    Below 20 dB, where a sound layer of 8 bits returns more than 30; below 10 dB for fewer bits.
    One more run of the float model, where any is: each weight of those layers is tried alone.
    """
    least = {weight.path: CRITICAL_DB for weight in todo if weight.settings.width < LOW_BITS}
    hurt = {
        path: error.sqnr_db
        for path, error in errors.items()
        if not error.sqnr_db >= least.get(path, WARNING_DB)
    }
    if not hurt:
        return ()
    trials = [
        trial for weight in todo if weight.path in hurt for trial in _trials(floats, model, weight)
    ]
    with ExitStack() as hooks:
        for trial in trials:
            module = floats.get_submodule(trial.weight.path)
            handle = module.register_forward_hook(trial.see, with_kwargs=True)
            hooks.callback(handle.remove)
        for _ in data.outputs(floats):
            pass
    return tuple(
        Damage(
            path,
            decibels,
            tuple(_culprit(weight, trials) for weight in todo if weight.path == path),
        )
        for path, decibels in hurt.items()
    )


def amended(
    weights: Iterable[WeightPlan], damages: Iterable[Damage], model: nn.Module
) -> tuple[WeightPlan, ...]:
    """Return the weights with those that do damage kept at 16 bits, or their inputs in float."""
    guilty = {one.key: (one, damage) for damage in damages for one in damage.guilty}

    def kept(weight: WeightPlan) -> WeightPlan:
        key = weight.tied_to.key if weight.tied_to is not None else weight.key
        if key not in guilty or weight.recipe is None:
            return weight
        one, damage = guilty[key]
        seen = damage.output_db if damage.output_db is not None else one.weight_db
        how = "would return" if damage.output_db is not None else "is estimated to return"
        if one.by_inputs:
            recipe = attrs.evolve(weight.recipe, activations=Activations())
            why = f"float inputs, since its layer {how} {format_db(seen)} with quantized ones"
            return attrs.evolve(weight, recipe=recipe, kept=why)
        why = f"kept at 16 bits, since its layer {how} {format_db(seen)}"
        return attrs.evolve(weight, recipe=_cast(model, weight), kept=why)

    return tuple(map(kept, weights))


def cast_of(tensors: Iterable[Tensor]) -> FloatCast:
    """Return a cast to float16, or to bfloat16 where some values are too large for that."""
    largest = max((float(x.detach().abs().max()) for x in tensors if x.numel()), default=0.0)
    fits = largest <= torch.finfo(torch.float16).max
    return FloatCast() if fits else FloatCast(torch.bfloat16)


def _cast(model: nn.Module, weight: WeightPlan) -> Recipe:
    """Return the recipe of a weight that is kept at 16 bits."""
    scheme = cast_of(map(model.get_parameter, weight.sources))
    return Recipe(Grid(scheme, MinMax()), RoundToNearest())


class _Trial:
    """A layer with one of its weights quantized, held against the float one."""

    def __init__(self, weight: WeightPlan, layer: nn.Module, with_inputs: bool) -> None:
        self.weight = weight
        self.with_inputs = with_inputs
        self.error = SquaredError()
        self._layer = layer.eval()

    def see(
        self,
        _: nn.Module,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        output: object,
    ) -> None:
        """Run the layer on what the float one was called with."""
        self.error += output_error(output, self._layer(*args, **kwargs))


def _trials(floats: nn.Module, model: nn.Module, weight: WeightPlan) -> Iterator[_Trial]:
    quantized, layer = model.get_submodule(weight.path), floats.get_submodule(weight.path)
    if not isinstance(quantized, QuantizedModule):
        return
    packed = {weight.name: quantized.packed_weights()[weight.name]}
    activation = quantized.activations().get(weight.name)
    replace = partial(weight.maker.replace, weights=packed)
    yield _Trial(weight, replace(copy_structure(layer), activations={}), with_inputs=False)
    if activation is not None:
        inputs = {weight.name: activation}
        yield _Trial(weight, replace(copy_structure(layer), activations=inputs), with_inputs=True)


def _culprit(weight: WeightPlan, trials: Iterable[_Trial]) -> Culprit:
    found = {
        trial.with_inputs: trial.error.sqnr_db
        for trial in trials
        if trial.weight is weight  # by identity: two weights may be planned alike
    }
    return Culprit(weight.key, found.get(False, float("nan")), found.get(True))
