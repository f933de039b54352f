"""The fluent builder: it names things and computes nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, overload

import attrs
from torch import Tensor, nn

from mono_quant.builder import FASTER_GRAPH, Builder
from mono_quant.checkpoint import ModelT
from mono_quant.errors import ConfigurationError, InputError
from mono_quant.modules import BareModule, tree_of
from mono_quant.plan import GraphPlan, GraphResult, Plan, resolve, resolve_graph
from mono_quant.plan.written import config_of
from mono_quant.result import QuantizationResult
from mono_quant.selection import Selection


@attrs.frozen(eq=False, repr=False)
class Quantizer(Builder):
    """Says how a model is to be quantized.

    Immutable: every method returns a new quantizer, so one may be kept, shared and varied. Its repr
    is the chain of calls that makes it. Without a word more, `Quantizer()` means 8 bits.

    Example:
        ``Quantizer().bits(4).group_size(64).skip("head").fit(data).apply(model)``
    """

    def graph(self) -> "GraphQuantizer":
        """Return a quantizer whose result is a `GraphModule`, in which layers pass codes on.

        It knows the same calls, so this one may stand anywhere in the chain. See `integer_flow` for
        what the graph computes.

        Raises:
            ConfigurationError: `only_if_faster` was said, which measures layers of floats.
        """
        if self._request.faster is not None:
            raise ConfigurationError(FASTER_GRAPH)
        return GraphQuantizer(self._request)

    @overload
    def plan(self, model: ModelT) -> Plan[ModelT]: ...
    @overload
    def plan(self, model: Mapping[str, Tensor]) -> Plan[BareModule]: ...
    def plan(self, model: ModelT | Mapping[str, Tensor]) -> Plan[ModelT] | Plan[BareModule]:
        """Return what will be done to each layer of a model, or of a bare state dict.

        No tensor is touched. Print it, or `run` it. Where batch normalizations are to be folded,
        the model's code is traced, on symbols, to say into which layers.

        Raises:
            InputError: the model cannot be quantized (lazy, on the meta device, scripted).
            ConfigurationError: a name matches no layer, or tied weights are asked for two things.
        """
        if isinstance(model, nn.Module):
            return resolve(model, self._request, config_of(self._request, Selection.of(model)))
        if not isinstance(model, Mapping):
            raise InputError(_no_model(model))
        bound = {"fit": self._request.data, "measure_on": self._request.measured}
        for call, data in bound.items():
            if data is not None:
                raise InputError(
                    f"a state dict cannot be run, so {call}(data) has no use; give the model"
                )
        if self._request.statistics is not None:
            raise InputError(
                "a state dict's layers are guessed, so statistics(...) has no use; give the model"
            )
        if self._request.faster is not None:
            raise InputError(
                "a state dict cannot be run, so only_if_faster(example) can measure nothing; give "
                "the model"
            )
        tree = tree_of(model)
        return resolve(tree, self._request, config_of(self._request, Selection.of(tree)))

    @overload
    def apply(
        self, model: ModelT, *, resume: Path | str | None = None, progress: bool = True
    ) -> QuantizationResult[ModelT]: ...
    @overload
    def apply(
        self,
        model: Mapping[str, Tensor],
        *,
        resume: Path | str | None = None,
        progress: bool = True,
    ) -> QuantizationResult[BareModule]: ...
    def apply(
        self,
        model: ModelT | Mapping[str, Tensor],
        *,
        resume: Path | str | None = None,
        progress: bool = True,
    ) -> QuantizationResult[ModelT] | QuantizationResult[BareModule]:
        """Return the quantized model; the given one is not changed. It *is* ``plan(model).run()``.

        What stays float shares its storage with the given model, so writing into those weights in
        place shows in both.

        Args:
            model: a module, or a bare state dict.
            resume: a folder to go on from after an interruption; see `Plan.run`.
            progress: show progress bars where the output is a terminal.
        """
        if isinstance(model, nn.Module):
            return self.plan(model).run(resume=resume, progress=progress)
        return self.plan(model).run(resume=resume, progress=progress)

    def apply_(
        self, model: ModelT, *, resume: Path | str | None = None, progress: bool = True
    ) -> QuantizationResult[ModelT]:
        """Quantize the given model itself, freeing its float weights on the way."""
        return self.plan(model).run(in_place=True, resume=resume, progress=progress)


@attrs.frozen(eq=False, repr=False)
class GraphQuantizer(Builder):
    """Says how a model is to be quantized, and written as a graph whose layers pass codes on.

    What `Quantizer.graph` returns; it has the same calls, but none that works in place, and
    `only_if_faster` is refused. The result's model is a `torch.fx.GraphModule`, no longer of the
    model's class.

    Example:
        ``Quantizer().fit(data).graph().apply(model)``
    """

    _graph: ClassVar[bool] = True

    def plan(self, model: ModelT) -> GraphPlan[ModelT]:
        """Return what will be done to each layer of a model whose code can be followed.

        The code is traced, on symbols; no tensor is touched.

        Raises:
            InputError: the model cannot be quantized, or its code cannot be traced, with the module
                and line where.
            CalibrationError: there is no data, on which grids are calibrated.
            ConfigurationError: no layer would pass codes on, with the reasons.
        """
        if not isinstance(model, nn.Module):
            raise InputError(
                f"a {type(model).__name__} has no code to make a graph of: give a torch.nn.Module"
            )
        return resolve_graph(model, self._request, config_of(self._request, Selection.of(model)))

    def apply(self, model: ModelT, *, progress: bool = True) -> GraphResult[ModelT]:
        """Return the quantized model as a graph; the given one is not changed.

        It *is* ``plan(model).run()``.
        """
        return self.plan(model).run(progress=progress)


def _no_model(given: object) -> str:
    """Return what is wrong with something that was given for a model."""
    if isinstance(given, type):
        return f"{given.__name__} is a class and no model yet: give {given.__name__}(...)"
    return (
        f"a {type(given).__name__} is no model: give a torch.nn.Module or a state dict "
        "(read_state_dict(path) reads one from a file)"
    )
