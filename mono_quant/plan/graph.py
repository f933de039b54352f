"""A plan whose result is a graph of codes, and what is known of that."""

from typing import Generic

import attrs
import torch
from torch import fx, nn

from mono_quant.calibration import CalibrationData, compare
from mono_quant.checkpoint import ModelT, copy_structure, dequantized
from mono_quant.configurable import Config, dtype_name
from mono_quant.errors import CalibrationError, ConfigurationError, InputError
from mono_quant.flow import FLOWING, float_graph, integer_flow
from mono_quant.plan.duration import TimeEstimate
from mono_quant.plan.plan import Plan
from mono_quant.plan.request import Request, WeightPlan
from mono_quant.plan.resolve import resolve
from mono_quant.plan.warnings import with_output
from mono_quant.plan.written import GRAPH
from mono_quant.result import Outline, QuantizationResult, seeded_outputs

_SHOWN = 3


@attrs.define(eq=False, repr=False, on_setattr=attrs.setters.frozen)
class GraphResult(QuantizationResult[fx.GraphModule], Generic[ModelT]):
    """A quantized model as a graph of codes, and what is known of it.

    Files, exported programs and validation are those of the model that keeps its class, from which
    the graph is written anew: ``integer_flow(load_model(path, Model())).model``.

    Attributes:
        model: the graph; no longer of the class of the float model.
        report: per-layer evidence, and what each layer of the graph takes and gives. Its output
            SQNR is that of the graph.
        plan: what was decided, and why.
        kept: the result that keeps the model's class; the graph shares its weights.
    """

    kept: QuantizationResult[ModelT] = attrs.field(kw_only=True)

    def dequantize(self) -> fx.GraphModule:
        """Return a float graph whose weights lie on the grid; of `kept`, a float model."""
        return float_graph(dequantized(copy_structure(self.kept.model)))

    @property
    def _class_kept(self) -> nn.Module:
        return self.kept.model

    def _as_run(self, model: nn.Module) -> nn.Module:
        return self.model if model is self.kept.model else integer_flow(model).model


@attrs.frozen(eq=False, repr=False)
class GraphPlan(Generic[ModelT]):
    """What will be done to each layer of one model, which is then written as a graph of codes.

    Attributes:
        outline: what can be shown of it.
    """

    _kept: Plan[ModelT] = attrs.field(alias="kept")
    _model: ModelT = attrs.field(alias="model")
    _request: Request = attrs.field(alias="request")
    _data: CalibrationData = attrs.field(alias="data")
    _floats: fx.GraphModule = attrs.field(alias="floats")
    outline: Outline

    @property
    def weights(self) -> tuple[WeightPlan, ...]:
        """The fate of each weight that some layer quantizer knows."""
        return self._kept.weights

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

    def estimate_time(self) -> TimeEstimate:
        """Return about how long `run` will take on this machine; see `Plan.estimate_time`."""
        return self._kept._estimated(2)  # the graph is measured beside the model

    def run(self, *, progress: bool = True) -> GraphResult[ModelT]:
        """Quantize the model layer by layer, write the graph, and measure it.

        Args:
            progress: show progress bars where the output is a terminal.

        Returns:
            the graph with the evidence, and the result that keeps the class.

        Raises:
            InputError: a weight is not finite; or, before anything is quantized, the graph of the
                model's code does not compute what the model does on the first batch.
            CalibrationError: the model failed on the data.
        """
        data = self._data.held()
        self._check_graph(data)
        request = attrs.evolve(self._request, data=data).held()
        measured = request.evidence or data
        kept = attrs.evolve(self._kept, request=request).run(progress=progress)
        flow = integer_flow(kept.model)
        label = "measuring the graph" if progress else None
        error = compare(measured.outputs(self._model), measured.outputs(flow.model, label))
        report = with_output(kept.report, error.sqnr_db)
        report = attrs.evolve(
            report,
            class_kept_sqnr_db=kept.report.output_sqnr_db,
            flow=flow.lines,
            notes=(_note(self._model), *report.notes),
        )
        return GraphResult(flow.model, report, self.outline, kept._data, kept._layers, kept=kept)

    def _check_graph(self, data: CalibrationData) -> None:
        """Refuse a model whose graph would be another model, before time is spent on it."""
        first = CalibrationData([data.first()], 1, data.forward)
        expected = seeded_outputs(first, self._model)
        try:
            error = compare([expected], [seeded_outputs(first, self._floats)])
        except CalibrationError as reason:
            raise InputError(f"{_ANOTHER}: {reason}") from reason
        if not error.sqnr_db >= _SAME_DB:  # NaN is not
            raise InputError(
                f"{_ANOTHER}: their outputs differ. In a graph, arguments that have a default keep "
                "it; quantize the model without graph()"
            )


_SAME_DB = 60.0  # float sums in another order are above 100
_ANOTHER = "on the first batch of the data, the graph of the model's code is not the model"


def resolve_graph(model: ModelT, request: Request, config: Config) -> GraphPlan[ModelT]:
    """Return the plan for a model that is to become a graph: its code is traced, no tensor touched.

    Args:
        model: the model.
        request: what was asked for.
        config: of the same without a graph.

    Raises:
        InputError: the model cannot be quantized, is not float32, or its code cannot be traced.
        CalibrationError: there is no data.
        ConfigurationError: no layer would pass codes, or a selector matches nothing.
    """
    if request.data is None:
        raise CalibrationError(
            "graph() lets layers pass codes, on grids that are calibrated on data; give some with "
            "fit(data)"
        )
    if request.statistics is not None:
        raise ConfigurationError(
            "a graph calibrates what passes between layers too, which statistics do not hold: "
            "leave statistics(...) or graph() out"
        )
    plan = resolve(model, request, config)
    reasons = {weight.path: _refusal(model, weight) for weight in plan.weights}
    flowing = [path for path, reason in reasons.items() if reason is None]
    if not flowing:
        said = [f"{path or 'the model'} ({reason})" for path, reason in reasons.items()]
        said = said or [f"{type(model).__name__} has no weight that can be quantized"]
        more = f" and {len(said) - _SHOWN} more" if len(said) > _SHOWN else ""
        raise ConfigurationError(
            f"no layer would pass codes in a graph: {', '.join(said[:_SHOWN])}{more}; say "
            'activations("static") for Linear layers and convolutions, or leave graph() out'
        )
    floats = float_graph(model, flowing)
    report = attrs.evolve(plan.outline.report, notes=(_note(model), *plan.outline.report.notes))
    packed = sum(weight.parameters for weight in plan.weights if weight.path in flowing)  # bytes
    outline = attrs.evolve(
        plan.outline,
        report=report,
        peak_bytes=plan.outline.peak_bytes + packed,
        peak_bytes_in_place=None,
        config={**config, GRAPH: True},
    )
    return GraphPlan(
        kept=plan, model=model, request=request, data=request.data, floats=floats, outline=outline
    )


def _note(model: nn.Module) -> str:
    name = type(model).__name__
    return f"written as a graph: a GraphModule, no longer a {name}; files hold the {name}"


def _refusal(model: nn.Module, weight: WeightPlan) -> str | None:
    """Return why a layer would not pass codes, or None.

    Raises:
        InputError: it would, and is not float32.
    """
    layer = model.get_submodule(weight.path)
    if weight.recipe is None:
        return f"float: {weight.reason}"
    if not isinstance(layer, FLOWING):
        return f"a {weight.layer} does not pass codes"
    activations = weight.recipe.activations
    if activations.mode != "static":
        return f"its inputs are {activations.mode or 'float'}, not static"
    if activations.symmetric:
        return "its inputs are on a symmetric grid"
    dtype = model.get_parameter(weight.sources[0]).dtype
    if dtype != torch.float32:
        raise InputError(
            f"{weight.key!r} is {dtype_name(dtype)}, and a graph computes in float32; call "
            "float() on the model first"
        )
    return None
