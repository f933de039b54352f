"""A model's graph whose steps are torch's own modules and the products of quantized layers."""

import builtins
import inspect
import operator
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import attrs
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from mono_quant.base import Operation
from mono_quant.errors import InputError
from mono_quant.modules import QuantizedLayer
from mono_quant.transforms.aside import following, named
from mono_quant.transforms.tracing import is_leaf

PRODUCT = "product"
"""Key, in the `meta` of a node, of the operation that a quantized layer was asked for."""

VALUE = "value"
"""Key, in the `meta` of a node that reads an attribute, of what it reads."""

_TORCH = str(Path(torch.__file__).parent)


@attrs.frozen(eq=False)
class Traced:
    """What a model's code computes.

    Attributes:
        graph: in floats; a node with an operation in its `meta`, under `PRODUCT`, is the product of
            the layer that its target names, without padding and the like.
        asserted: nodes that only check arguments that were left at their defaults.
    """

    graph: fx.Graph
    asserted: frozenset[fx.Node]


def trace_products(model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> Traced:
    """Return the graph of a model in eval mode; the forwards of `layers` are looked into.

    A subclass that pads and calls ``super().forward`` so shows its padding. Parameters with a
    default keep it. While a model is traced, torch replaces `nn.Module.__call__` for all threads.

    Raises:
        InputError: the code cannot be traced; the message says in which module and line.
    """
    return _trace(model, layers, layers)


def trace_floats(model: nn.Module, layers: Mapping[str, nn.Module]) -> Traced:
    """Return the graph of a float model in eval mode, as `trace_products` does.

    Args:
        model: the model.
        layers: to be looked into, where they have a forward of their own.

    Raises:
        InputError: the code cannot be traced; the message says in which module and line.
    """
    return _trace(
        model,
        {
            path: layer
            for path, layer in layers.items()
            if not type(layer).__module__.startswith("torch.nn.") and not is_parametrized(layer)
        },
        {},
    )


def _trace(
    model: nn.Module, inside: Mapping[str, nn.Module], products: Mapping[str, nn.Module]
) -> Traced:
    tracer = _Tracer(inside)
    signature = inspect.signature(model.forward).parameters.values()
    defaults = {one.name: one.default for one in signature if one.default is not one.empty}
    with following(model), named(model, _BUILT_INS):
        for path, layer in products.items():
            vars(layer)["run"] = partial(tracer.product, path)  # taken away by `following`
        try:
            graph = tracer.trace(model, concrete_args=defaults)
        except Exception as error:  # whatever the model's own code raises on symbolic values
            raise InputError(_refusal(tracer.failed or "", model, error)) from error
        for node in graph.nodes:
            if node.op == "get_attr":  # a constant of the trace is taken away by `following`
                node.meta[VALUE] = operator.attrgetter(str(node.target))(model)
    given = {name for name in inspect.signature(model.forward).parameters if name not in defaults}
    asserted: set[fx.Node] = set()
    for node in graph.nodes:
        extra = node.op == "placeholder" and str(node.target).lstrip("*") not in given
        if extra or not asserted.isdisjoint(node.all_input_nodes):
            asserted.add(node)
    return Traced(graph, frozenset(asserted))


class _Tracer(fx.Tracer):
    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.layers = frozenset(map(id, layers.values()))
        self.failed: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether `m` is one step of the graph."""
        return id(m) not in self.layers and is_leaf(m)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., object],
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> object:
        """Go into a module or make it a step, and remember the innermost one that fails."""
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None:
                self.failed = self.path_of_module(m)
            raise

    def product(
        self, path: str, operation: Operation, x: Tensor, bias: object, name: str = "weight"
    ) -> fx.Proxy:
        """Record what a layer was about to `run`."""
        own = isinstance(bias, fx.Proxy) and bias.node.op == "get_attr"
        if not (bias is None or own):
            raise InputError(f"{path!r} hands on a bias that it computes itself")
        made: fx.Proxy = self.create_proxy("call_module", path, (x,), {})
        made.node.meta[PRODUCT] = operation
        return made


def _refusal(path: str, model: nn.Module, error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        frame
        for frame in frames
        if not frame.filename.startswith((_TORCH, str(Path(__file__).parent)))
    ]
    module = type(model.get_submodule(path)).__name__
    where = f"{path!r} ({module})" if path else module
    line = f", line {own[-1].lineno} of {Path(own[-1].filename).name}" if own else ""
    first = str(error).strip().partition("\n")[0]
    return (
        f"the model does not trace, so layers cannot pass codes to each other: in {where}{line}: "
        f"{first}; quantize it without a graph, which keeps its class"
    )


def _recorded(
    function: Callable[..., object], step: Callable[..., object], *args: object, **kwargs: object
) -> object:
    """Return what a built-in returns, or the same as steps of a graph, which can be traced again.

    Unpickling a graph traces it: there, the built-in would ask a symbol for its truth.
    """
    if not any(isinstance(one, fx.Proxy) for one in args):
        return function(*args, **kwargs)
    found, *others = args
    for other in others:
        found = step(found, other)
    return found


_BUILT_INS = {
    "max": partial(_recorded, builtins.max, torch.sym_max),
    "min": partial(_recorded, builtins.min, torch.sym_min),
}
"""What takes symbolic sizes: code that pads asks for ``max(missing, 0)``, a branch to Python."""
