"""Carrying out what was decided, one layer at a time."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from types import MappingProxyType
from typing import Generic, cast

import attrs
import torch
from torch import Tensor, nn

from mono_quant import kernels
from mono_quant.base import Activation, Change, Container, PackedTensor, Statistics
from mono_quant.calibration import CalibrationData, evaluating
from mono_quant.checkpoint import ModelT, calling
from mono_quant.errors import InputError, Mend
from mono_quant.evidence import LayerReport
from mono_quant.gathering import Gathered, Gathering, Wanted
from mono_quant.modules import tie
from mono_quant.numerics.blocks import AT_ONCE
from mono_quant.numerics.metrics import tensor_bytes
from mono_quant.observers import MinMax
from mono_quant.plan.blocks import BlockRun, on_floats, unlearned
from mono_quant.plan.checks import check_finite, check_gathered
from mono_quant.plan.damage import cast_of
from mono_quant.plan.drawn import Worst, weight_histogram
from mono_quant.plan.journal import Journal
from mono_quant.plan.measure import gather_for, wanted_of
from mono_quant.plan.relay import Relay
from mono_quant.plan.request import WeightPlan, by_layer
from mono_quant.plan.simulate import activation_of
from mono_quant.plan.stages import Stage, stages_of
from mono_quant.plan.weight_error import WeightError
from mono_quant.progress import progress_bar
from mono_quant.settings import Recipe
from mono_quant.statistics import CalibrationStatistics
from mono_quant.transforms.edits import put

NOTHING: Mapping[str, PackedTensor] = MappingProxyType({})
_MATRIX = 2
_KEPT = 16 * AT_ONCE  # bytes: more than a temporary of rows that are worked on at once


class LayerRun(Generic[ModelT]):
    """A working copy whose layers are quantized, some at a time.

    Attributes:
        model: the copy; another object than before where it is one layer, and its quantizer made a
            new one.
        rows: what is known of each weight that was quantized, by its name.
        changes: what else was changed on the way.
        packed: every weight that was quantized, by its name.
    """

    def __init__(self, model: ModelT, todo: Sequence[WeightPlan], *, drawn: bool) -> None:
        """Quantize weights `todo` of `model`, in place.

        Args:
            model: the copy.
            todo: which.
            drawn: keep histograms of the worst, of which no float weight will be left.
        """
        self.model = model
        self.changes: list[Change] = []
        self.rows: dict[str, LayerReport] = {}
        self._multiplied = {  # by one of those that share it
            (weight.tied_to or weight).key for weight in todo if not weight.maker.looks_up
        }
        self.packed: dict[str, PackedTensor] = {}
        self._layers: dict[str, nn.Module] = {}
        self._worst = Worst() if drawn else None

    @torch.no_grad()
    def quantize(
        self,
        weights: Sequence[WeightPlan],
        gathered: Mapping[tuple[str, str], Gathered],
        given: Mapping[str, PackedTensor] = NOTHING,
    ) -> None:
        """Quantize all weights of one layer that are quantized at all.

        Args:
            weights: those.
            gathered: what is known of inputs, by layer and weight.
            given: weights that are on their grids already, by name.
        """
        path, maker = weights[0].path, weights[0].maker
        layer = self.model.get_submodule(path)
        activations: dict[str, Activation] = {}
        for weight in weights:
            known = gathered.get((path, weight.name), Gathered())
            activation = activation_of(weight, known)
            if activation is not None:
                activations[weight.name] = activation
            said, size = _inputs(weight, activation)
            why = _input_reason(weight, known)
            if weight.tied_to is not None:
                first = weight.tied_to.key
                self.packed[weight.key] = self.packed[first]
                self.rows[first] = self.rows[first].with_inputs(said, size, weight.key, reason=why)
                continue
            looked_up = weight.key not in self._multiplied
            found = given.get(weight.key)
            packed, row = rounded(weight, layer, known.rows, looked_up, found, self._worst)
            self.packed[weight.key] = packed
            self.rows[weight.key] = row.with_inputs(said, size, reason=why)
        mine = {weight.name: self.packed[weight.key] for weight in weights}
        module = maker.replace(layer, mine, activations)
        module.made_by = maker
        self.model = put(self.model, layer, module)
        self._layers[path] = module
        for weight in weights:
            if weight.tied_to is not None:
                lead = weight.tied_to
                tie(self._layers[lead.path], lead.name, module, weight.name)


def quantize_weights(
    run: LayerRun[ModelT],
    todo: Sequence[WeightPlan],
    data: CalibrationData | None,
    containers: Iterable[Container],
    *,
    sequential: bool,
    journal: Journal | None,
    label: str | None,
    statistics: CalibrationStatistics | None = None,
) -> None:
    """Quantize weights of a working copy, after gathering what that needs from the data.

    Args:
        run: the copy.
        todo: which.
        data: None where there is none; the plan has refused what needs some.
        containers: what must be adapted for layers to be called.
        sequential: layers that come later see what those before make of the data once they are
            quantized; the reference computes them, so that the result does not depend on what is
            fastest here. Else one pass over the float model serves all layers.
        journal: where each stage is written once it is finished, and read from if it was.
        label: of progress bars; None for none.
        statistics: what was gathered before; the data is then not asked.
    """
    _keep_freed_memory()
    layers = by_layer(todo)
    bar = progress_bar(label, "layer", len(layers))
    with bar, calling(run.model, containers, layers):
        if not sequential or data is None:
            if statistics is not None:
                found, why = statistics.gathered(), "statistics were given in place of data"
                run.changes += on_floats(todo)
            else:
                found = gather_for(run.model, todo, data, label)
                why = "sequential=False was asked for"
            run.changes += unlearned(todo, why)
            for weights in layers.values():
                run.quantize(weights, found)
                bar.update()
            return
        stages, wanted = stages_of(run.model, todo, data), wanted_of(todo)
        with kernels.use("reference"):
            relay, blocks = Relay(run.model, data), BlockRun(run.model, todo, data)
            run.changes += blocks.changes
            for number, (stage, then) in enumerate(zip_longest(stages, stages[1:])):
                _quantize_stage(run, number, stage, then, wanted, relay, blocks, journal)
                relay.leave(stage, then)
                bar.update(len(by_layer(stage.weights)))
    if journal is not None:
        journal.close()


def _keep_freed_memory() -> None:
    """Have glibc keep the memory of temporaries for those that come next.

    It gives blocks back to the system at once unless one of their size was freed before (mallopt(3)
    calls it a dynamic threshold). Asking for them anew page by page takes longer than arithmetic.
    """
    torch.empty(_KEPT, dtype=torch.uint8)


def _quantize_stage(
    run: LayerRun[ModelT],
    number: int,
    stage: Stage,
    then: Stage | None,
    wanted: Mapping[str, Wanted],
    relay: Relay,
    blocks: BlockRun,
    journal: Journal | None,
) -> None:
    """Quantize the layers of a stage; what was gathered for them is gone when it returns."""
    done = journal.read(number, stage, run.model) if journal is not None else None
    here = by_layer(stage.weights)
    mine = {path: wanted[path] for path in here if path in wanted}
    if done is not None:  # of which only ranges of inputs are found anew
        mine = {path: attrs.evolve(one, of_rows={}) for path, one in mine.items()}
    with Gathering(run.model, mine).attached() as gathering:
        relay.visit(stage)
    found = gathering.found()
    if done is None:
        fit = blocks.fit(stage, found, relay.calls, then)
    else:
        fit = done
        blocks.skip(stage, then)
    fit.put(run.model)
    run.changes += fit.changes
    for weights in here.values():
        run.quantize(weights, found, fit.weights)
    if journal is not None and done is None:
        journal.write(number, stage, run.packed, fit)


def rounded(
    weight: WeightPlan,
    layer: nn.Module,
    statistics: Statistics,
    looked_up: bool = False,
    given: PackedTensor | None = None,
    worst: Worst | None = None,
) -> tuple[PackedTensor, LayerReport]:
    """Return a weight of `layer` on its grid, and what is known of it.

    Args:
        weight: which, with a recipe.
        layer: the float one.
        statistics: of its inputs.
        looked_up: its rows are the layer's output, and meet no inputs.
        given: the weight, where it was rounded already.
        worst: says whether its values are to be drawn; None for no.

    Raises:
        InputError: it is not finite, or no grid can hold it; names it.
        CalibrationError: its rounding needs statistics that were not gathered.
    """
    recipe = cast("Recipe", weight.recipe)  # only weights with a recipe are rounded
    with evaluating(layer):  # in train mode, reading a spectral_norm weight changes it
        view = weight.maker.weights(layer)[weight.name]
    stack = view.stack()
    check_finite(weight.key, stack)
    if given is not None:
        scheme, q = given.scheme, given.unpack()
    else:
        check_gathered(weight, statistics)
        try:
            scheme, q = recipe.grid.scheme.rounded(
                stack, recipe.rounding, recipe.grid.observer, statistics
            )
        except InputError as reason:
            text = f"{weight.key} cannot be quantized: {reason}"
            raise InputError(text, Mend.GRID, layer=weight.path or "*") from reason
    apart = q.qparams.extra.get(scheme.columns_apart) if scheme.columns_apart else None
    error = WeightError.of(stack, q, scheme, apart)
    why = (
        recipe.grid.observer.remark(*scheme.ranged(stack, q.qparams))
        if q.qparams.scale is not None
        else None
    )
    dead = int((error.by_row == 0).sum()) if stack.shape[2] else 0
    notes = (
        weight.kept,
        scheme.remark(q),
        f"{dead} of {error.by_row.numel()} rows are all zero" if dead else None,
        _met_by_all(weight) if apart is not None else None,
    )
    # A convolution's values meet neighbours of one input: those that meet small ones meet large.
    by_value = len(weight.layout.native) == _MATRIX and not looked_up
    estimated = error.total.sqnr_db if looked_up else error.estimated_db
    drawn = worst is not None and worst.admits(estimated)
    histogram = weight_histogram(stack, scheme, q.qparams) if drawn else None
    packed = given or PackedTensor.pack(q, scheme, weight.layout, view.native.dtype, consume=True)
    row = LayerReport(
        weight.key,
        weight.layer,
        weight.layout.native,
        weight.parameters,
        weight.float_bytes,
        packed.nbytes,
        scheme=scheme.describe(),
        sqnr_db=error.total.sqnr_db,
        estimated_db=estimated,
        faint_db=error.faint_db if by_value else None,
        outliers=error.outliers,
        row_outliers=error.row_outliers,
        columns=stack.shape[2],
        scale_block=q.qparams.block_size if q.qparams.scale is not None else (),
        ranges=(f"weight range by {why}",) if why else (),
        note="; ".join(part for part in notes if part) or None,
        aliases=weight.aliases,
        speed=weight.speed,
        kernel=weight.kernel,
        histogram=histogram,
    )
    return packed, _tried_at_16_bits(row, stack) if row.is_doubtful else row


def _tried_at_16_bits(row: LayerReport, stack: Tensor) -> LayerReport:
    """Return a row whose estimate is low with the same estimate for the weight at 16 bits."""
    half = cast_of([stack])
    q = half.quantize(stack, half.choose_qparams(stack, MinMax()))
    error = WeightError.of(stack, q, half)
    return attrs.evolve(row, cast_db=error.faint_db if row.loses_faint else error.estimated_db)


def _met_by_all(weight: WeightPlan) -> str | None:
    """Return that inputs of the columns kept apart are quantized all the same, or None."""
    recipe = cast("Recipe", weight.recipe)  # only weights with a recipe come here
    if recipe.activations.mode is None:
        return None
    if len(weight.layout.native) != _MATRIX:
        return "the inputs of its outlier columns are quantized: only those of a matrix stay float"
    if recipe.activations.mode == "static":
        return (
            "the inputs of its outlier columns are quantized, on the range of all; "
            'activations="dynamic" leaves them out'
        )
    return None


def _input_reason(weight: WeightPlan, gathered: Gathered) -> str | None:
    """Return why the calibrated range of the inputs of a weight is what it is, or None."""
    recipe = cast("Recipe", weight.recipe)  # only weights with a recipe come here
    if recipe.activations.mode != "static" or recipe.observer not in gathered.inputs:
        return None
    state = gathered.inputs.state(recipe.observer)
    return recipe.observer.explain(state, recipe.activations.scheme)


def _inputs(weight: WeightPlan, activation: Activation | None) -> tuple[str | None, int]:
    """Return what is to be said of the inputs of a weight, and the bytes that they take."""
    if activation is not None:
        calibrated = sum(map(tensor_bytes, activation.tensors.values()))
        return f"{activation.describe()} inputs", calibrated
    recipe = cast("Recipe", weight.recipe)  # only weights with a recipe come here
    why = "no data reached it" if recipe.activations.mode is not None else weight.float_inputs
    return (f"float inputs: {why}" if why is not None else None), 0
