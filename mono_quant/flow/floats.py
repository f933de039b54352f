"""The graph of a float model: what a graph of codes is held against, and what shows beforehand."""

from collections.abc import Iterable

from torch import fx, nn

from mono_quant.errors import InputError
from mono_quant.flow.assign import checked_steps
from mono_quant.flow.tracer import VALUE, trace_floats

FLOWING = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Float layers which, once their inputs are calibrated, pass codes."""


def float_graph(model: nn.Module, layers: Iterable[str] = ()) -> fx.GraphModule:
    """Return the graph of a float model, on the model's own modules and parameters.

    Whatever would keep `integer_flow` from writing a graph of the quantized model is found here,
    without data and before anything is quantized. Parameters of the model's forward that have a
    default keep it, and are no arguments of the graph.

    Args:
        model: the model.
        layers: names of those that will pass codes, whose own forwards are looked into.

    Raises:
        InputError: the code cannot be traced, with the module and line where; or it changes a
            tensor in place that it reads again.
    """
    for path, module in model.named_modules():
        if "forward" in vars(module):
            raise InputError(
                f"the forward of {path or 'the model'} was replaced on the object, so its class "
                "does not tell what it computes: make it a method of the class"
            )
    traced = trace_floats(model, {path: model.get_submodule(path) for path in layers})
    modules = dict(model.named_modules(remove_duplicate=False))
    checked_steps(traced, modules)
    held: dict[str, object] = {}
    for node in reversed(traced.graph.nodes):
        if node in traced.asserted or (node.op == "get_attr" and not node.users):
            traced.graph.erase_node(node)
        elif node.op == "call_module":
            held[str(node.target)] = modules[str(node.target)]
        elif node.op == "get_attr":
            held[str(node.target)] = node.meta[VALUE]
    return fx.GraphModule(held, traced.graph, type(model).__name__)
