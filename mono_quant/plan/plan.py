"""What will be done to each layer of one model, decided and shown before a tensor is touched."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Generic

import attrs
from torch import nn

from mono_quant.base import (
    Change,
    Container,
    CorrectionContext,
    QuantizedModule,
    TransformContext,
)
from mono_quant.calibration import CalibrationData, Kept, Noted, compare, compared, count_samples
from mono_quant.checkpoint import ModelT, adapt_containers, calling, copy_structure, guard_saving
from mono_quant.configurable import Config
from mono_quant.errors import CalibrationError, DamageError, InputError, Mend
from mono_quant.evidence import WARNING_DB, LayerReport
from mono_quant.layers import BUILT_IN_CONTAINERS
from mono_quant.numerics.metrics import SquaredError
from mono_quant.plan.accounting import account
from mono_quant.plan.accumulated import Accumulated
from mono_quant.plan.checks import check_finite, check_fits
from mono_quant.plan.chosen import Chosen
from mono_quant.plan.damage import Damage, amended, diagnosed, estimated
from mono_quant.plan.drawn import with_histograms
from mono_quant.plan.duration import TimeEstimate, foresee_time
from mono_quant.plan.faster import decided, measure_layers, outcome, set_apart
from mono_quant.plan.fuse import fuse_activations
from mono_quant.plan.inputs import InputUses
from mono_quant.plan.journal import Journal
from mono_quant.plan.measure import (
    LayerErrors,
    correct,
    foreseen,
    gather_for,
    left_out,
    transform,
    transforms_of,
    unmeasured,
    wanted_of,
    with_outputs,
)
from mono_quant.plan.outline import outline_of
from mono_quant.plan.relief import Relief, relief, with_tried_groups
from mono_quant.plan.request import Request, WeightPlan, by_layer
from mono_quant.plan.run import LayerRun, quantize_weights
from mono_quant.plan.staged import StagedOutputs
from mono_quant.plan.warnings import warnings_of
from mono_quant.plan.written import skipping
from mono_quant.report import Report
from mono_quant.result import Outline, QuantizationResult
from mono_quant.statistics import CalibrationStatistics
from mono_quant.transforms.rotated import turned_in


@attrs.frozen(eq=False)
class _Evidence:
    """What carrying a plan out showed.

    Attributes:
        rows: of quantized weights, by name.
        changes: by transforms and corrections.
        damages: layers that were destroyed: measured, or estimated without data.
        output: error of the model's outputs; of none without data.
        relief: layers without which a poor output would be better, where none was destroyed.
    """

    rows: Mapping[str, LayerReport]
    changes: tuple[Change, ...]
    damages: tuple[Damage, ...]
    output: SquaredError = attrs.field(factory=SquaredError)
    relief: Relief | None = None


@attrs.frozen(eq=False, repr=False)
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
    _measured: bool = attrs.field(default=False, alias="measured")

    def explain(self) -> str:
        """Return what will happen to each weight and why, predicted size and peak memory."""
        return self.outline.explain()

    def __str__(self) -> str:
        """Return `explain()`."""
        return self.explain()

    def __repr__(self) -> str:
        """Return the model's class and the predicted size; `explain()` says more."""
        model = type(self._model).__name__
        return f"<{type(self).__name__} of {model}: {self.outline.report.sizes}>"

    def measured(self, *, progress: bool = True) -> "Plan[ModelT]":
        """Return the plan after `only_if_faster` was acted on: layers that gain nothing stay float.

        Each layer is measured on the example. `run` does so first; by itself this shows what comes
        of it, and its answer is kept. Without such a rule the plan itself comes back.

        Args:
            progress: show a progress bar where the output is a terminal.

        Raises:
            CalibrationError: the model failed on the example.
            InputError: a weight is not finite; names it.
        """
        if self._request.faster is None or self._measured:
            return self
        return self._decided(copy_structure(self._model), progress)

    def estimate_time(self) -> TimeEstimate:
        """Return about how long `run` will take on this machine; print it.

        It is foreseen from samples: some rows of a weight of each kind are rounded, and the model
        is run on a few samples of the data. That takes about a second, and more only where a
        sample of the data, or the rounding of a wide row, does.

        Raises:
            CalibrationError: the model failed on the data.
            InputError: a weight cannot be quantized.
        """
        return self._estimated(0)

    def _estimated(self, runs: int) -> TimeEstimate:
        """Return `estimate_time`, where the data goes through the model some times more."""
        changed = any(change.done for change in self.outline.report.changes)
        work = copy_structure(self._model)
        found = foresee_time(
            work, self.weights, self._request, self._containers, runs=runs + changed
        )
        if self._request.faster is None or self._measured:
            return found
        first = "measuring layers, as only_if_faster(example) does first"
        return attrs.evolve(found, left_out=(*found.left_out, first))

    def run(
        self,
        *,
        in_place: bool = False,
        sequential: bool | None = None,
        resume: Path | str | None = None,
        progress: bool = True,
    ) -> QuantizationResult[ModelT]:
        """Carry the plan out, layer by layer.

        Args:
            in_place: change the model itself, and free its float weights on the way.
            sequential: calibrate each block of layers on what the blocks before it make of the data
                once they are quantized, and not on what the float model makes of it. None: where a
                rounding wants it, as `GPTQ` does.
            resume: a folder in which each block is written once it is finished. After a run was
                stopped, the same call goes on behind the last one, and ends in the same bytes; at
                its end the files are removed.
            progress: show progress bars where the output is a terminal.

        Returns:
            the quantized model with the evidence.

        Raises:
            InputError: a weight is not finite; names it.
            CalibrationError: the model failed on the data, or there is none and `sequential` is
                asked for.
        """
        label = "quantizing" if progress else None
        request = self._request
        if sequential and request.data is None:
            raise CalibrationError("sequential calibration needs data", Mend.DATA)
        if sequential and request.statistics is not None:
            raise CalibrationError(
                "statistics are of the inputs of float layers, and sequential=True asks for those "
                "that quantized layers make: leave one of the two out"
            )
        if request.faster is not None and not self._measured:
            if in_place:
                self._check_in_place([])
                plan = self._decided(self._model, progress)
            else:
                plan = self.measured(progress=progress)
            return plan.run(
                in_place=in_place, sequential=sequential, resume=resume, progress=progress
            )
        request = request.held()
        data, measured = request.data, request.evidence
        seen = data or measured
        todo = [weight for weight in self.weights if weight.recipe is not None]
        kept = Kept()
        self._check_unspent(todo)
        if in_place:
            self._check_in_place(todo)
            if measured is not None:
                kept.add_all(measured.outputs(self._model, label and "float outputs"))
        work = self._model if in_place else copy_structure(self._model)
        changes = transform(work, transforms_of(request, todo), todo, data, progress)
        chosen = Chosen.of(request, todo, in_place=in_place)
        compared = measured is not None or bool(chosen.corrections)
        floats = copy_structure(work) if compared and not in_place else None
        if request.statistics is not None:
            request.statistics.check_turned(turned_in(work))
            sequential = False
        if sequential is None:
            recipes = [weight.recipe for weight in todo if weight.recipe is not None]
            sequential = any(recipe.rounding.sequential for recipe in recipes)
        journal = None
        if resume is not None:
            if not sequential or data is None:
                raise InputError(
                    "only what is calibrated block after block can be resumed: give data with "
                    "fit(data), and a rounding such as GPTQ() or sequential=True"
                )
            journal = Journal.open(Path(resume), work, todo, data, self.outline.config)
        before = floats
        if before is None and not in_place and not any(change.done for change in changes):
            before = self._model  # still what was quantized
        layers = LayerRun(work, todo, drawn=before is None)
        quantize_weights(
            layers,
            todo,
            data,
            self._containers,
            sequential=sequential,
            journal=journal,
            label=label,
            statistics=request.statistics,
        )
        work, rows = layers.model, layers.rows
        changes = (*changes, *layers.changes)
        del layers  # whose codes would be held beside what kernels make of them
        adapt_containers(work, self._containers)
        guard_saving(work)
        changes = (*changes, *chosen.refused)
        found = _Evidence(rows, changes, tuple(estimated(rows.values())))
        if floats is not None:
            with calling(floats, self._containers, by_layer(todo)):
                outputs = StagedOutputs(work, todo, data) if data is not None else None
                context = CorrectionContext(floats, self._model, outputs)
                changes = (*changes, *correct(work, chosen.corrections, context))
                found = attrs.evolve(found, changes=changes)
                if measured is not None:
                    found = self._beside(floats, work, found, measured, label)
        elif measured is not None:
            error = compare(kept, measured.outputs(work, label and "measuring"))
            found = attrs.evolve(found, output=error)
        if found.damages and request.on_damage != "warn":
            amended = self._amended(found.damages, request)
            return amended.run(sequential=sequential, resume=resume, progress=progress)
        drawn = with_histograms(found.rows, todo, work, before)
        found = attrs.evolve(found, rows=drawn)
        if request.fold is not False:
            fused = fuse_activations(work, TransformContext(seen.outputs if seen else None))
            found = attrs.evolve(found, changes=(*found.changes, *fused))
        report = self._report(work, found, request)
        example = CalibrationData([seen.first()], 1, seen.forward) if seen is not None else None
        return QuantizationResult(work, report, self.outline, example, request.layers)

    def calibrate(self, *, progress: bool = True) -> CalibrationStatistics:
        """Return what the data tells of the inputs of the weights that are going to be quantized.

        One pass over the float model, after its transforms. What comes back can be saved, and
        stands in for that pass by `statistics(...)`.

        Args:
            progress: show a progress bar where the output is a terminal.

        Raises:
            CalibrationError: there is no data, or the model failed on it.
        """
        if self._request.data is None:
            raise CalibrationError("what is calibrated is calibrated on data", Mend.DATA)
        data = self._request.data.held()
        todo = [weight for weight in self.weights if weight.recipe is not None]
        work = copy_structure(self._model)
        transform(work, transforms_of(self._request, todo), todo, data, progress)
        label = "calibrating" if progress else None
        with calling(work, self._containers, by_layer(todo)):
            gathered = gather_for(work, todo, data, label)
        turned = turned_in(work)
        return CalibrationStatistics.of(wanted_of(todo), gathered, self._before(), turned)

    def check_statistics(self) -> None:
        """Refuse statistics of a model that was changed in another way first.

        Raises:
            CalibrationError: naming what is done now and what was done then.
        """
        known = self._request.statistics
        if known is not None and known.transforms != self._before():
            then, now = (
                ", ".join(str(one["kind"]) for one in some) or "nothing"
                for some in (known.transforms, self._before())
            )
            raise CalibrationError(
                f"the statistics were gathered after {then} was done to the float model, and now "
                f"that is {now} (or the same otherwise)",
                Mend.STATISTICS,
            )

    def _before(self) -> tuple[Config, ...]:
        """Return what is done to the float model first, as configurations."""
        return tuple(one.to_config() for one in transforms_of(self._request, self.weights))

    def _decided(self, floats: nn.Module, progress: bool) -> "Plan[ModelT]":
        """Return the plan whose layers were measured in a float model, which shares the weights.

        Its configuration names the weights that stay float, to make the same model without a clock.
        """
        faster, before = self._request.faster, self.outline
        todo = [weight for weight in self.weights if weight.recipe is not None]
        self._check_unspent(todo)
        if faster is None:
            return self
        sizes = (before.report.float_bytes, before.report.bytes)
        label = "measuring layers" if progress else None
        example = faster.example.called_as(self._request.data)
        found = (
            measure_layers(floats, todo, example, self._containers, sizes, label) if todo else {}
        )
        weights = decided(self.weights, found, faster.margin)
        outline = outline_of(
            self._model,
            weights,
            skipping(before.config, self._model, set_apart(weights)),
            [outcome(weights, faster.margin), *unmeasured(self._request, weights)],
            before.report.warnings,
            foreseen(self._model, self._request, weights),
        )
        return attrs.evolve(self, weights=weights, outline=outline, measured=True)

    def _beside(
        self,
        floats: nn.Module,
        work: nn.Module,
        found: "_Evidence",
        data: CalibrationData,
        label: str | None,
    ) -> "_Evidence":
        """Return what data shows of the quantized model beside its float twin."""
        todo = [weight for weight in self.weights if weight.recipe is not None]
        accumulated = Accumulated(work, len(by_layer(todo)))
        layers = LayerErrors(floats, work, InputUses(work), accumulated)
        reference = layers.outputs(todo, data, label and "measuring layers")
        if any(change.done for change in found.changes):  # then the twin is not the model given
            both = zip(reference, data.outputs(self._model), strict=True)
            reference = (given for _, given in both)
        noted = Noted()
        passing = noted.passing(reference)
        others = accumulated.outputs(data, label and "measuring")
        errors = tuple(compared(passing, others))
        error = SquaredError.total(errors)
        damages = diagnosed(floats, work, todo, layers.errors, data)
        rows = with_outputs(found.rows, todo, layers)
        rows = with_tried_groups(rows, floats, todo, data)
        poor = not error.sqnr_db >= WARNING_DB and not damages
        helps = relief(floats, work, layers.errors, errors, data, noted) if poor else None
        return _Evidence(rows, found.changes, tuple(damages), error, helps)

    def _amended(self, damages: Sequence[Damage], request: Request) -> "Plan[ModelT]":
        """Return the plan that keeps what does damage; what is left after it is warned of.

        Raises:
            DamageError: that was asked for.
        """
        if self._request.on_damage == "error":
            raise DamageError("; ".join(map(str, damages)))
        return attrs.evolve(
            self,
            weights=amended(self.weights, damages, self._model),
            request=attrs.evolve(request, on_damage="warn"),
            measured=False,
        )

    @property
    def _containers(self) -> tuple[Container, ...]:
        return (*self._request.containers, *BUILT_IN_CONTAINERS)

    def _report(self, work: nn.Module, found: "_Evidence", request: Request) -> Report:
        """Return the report of a finished model: transforms may have changed what there is.

        Args:
            work: the model.
            found: what carrying the plan out showed.
            request: what was asked for, its data held.
        """
        before = self.outline.report
        floats = [weight for weight in self.weights if weight.recipe is None]
        after = account(work, floats, found.changes)
        report = attrs.evolve(
            after,
            layers=tuple(found.rows.get(row.name, row) for row in after.layers),
            notes=before.notes,
            head=before.head,
            changes=found.changes,
            original_bytes=before.float_bytes,
        )
        if request.evidence is not None:
            notes = ["measured on other data than it was calibrated on"] if request.apart else []
            for data in filter(None, (request.data, request.measured)):
                notes += left_out(work, data)
            report = attrs.evolve(
                report,
                output_sqnr_db=found.output.sqnr_db,
                samples=sum(count_samples(batch) for batch in request.evidence.batches()),
                notes=(*report.notes, *dict.fromkeys(notes)),
            )
        warned = (*warnings_of(report, found.damages, found.relief), *before.warnings)
        return attrs.evolve(report, warnings=warned)

    def _check_unspent(self, todo: Iterable[WeightPlan]) -> None:
        for weight in todo:
            if isinstance(self._model.get_submodule(weight.path), QuantizedModule):
                raise InputError(
                    f"{weight.path!r} is quantized already: this plan was carried out in place; "
                    "make another with plan(model)"
                )

    def _check_in_place(self, todo: Iterable[WeightPlan]) -> None:
        """Refuse what would only be refused halfway, with a part of the model changed."""
        if self._request.on_damage == "keep":
            raise InputError(
                "to keep what quantizing destroys, it begins again from the float model, which is "
                "not kept in place",
                Mend.COPY,
            )
        if self._request.corrections:
            raise InputError(
                f"{self._request.corrections[0]!r} holds the result against the float model, which "
                "is not kept in place",
                Mend.COPY,
            )
        for weight in todo:
            for source in weight.sources:
                tensor = self._model.get_parameter(source)
                check_finite(source, tensor)
                if weight.recipe is not None:
                    check_fits(source, tensor, weight.recipe.grid.scheme)
