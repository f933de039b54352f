"""Which layers see a module's output, through steps that pass a factor on."""

import operator
from collections.abc import Iterable, Mapping

import torch
from torch import fx, nn
from torch.nn import functional

from mono_quant.transforms.graph import LAYERS, Reach
from mono_quant.transforms.nodes import Modules, activation_of, asks_only, hooked, idle, name_of


def reach(
    start: fx.Node,
    nodes: Iterable[fx.Node],
    modules: Modules,
    calls: Mapping[str, int],
    kept: frozenset[fx.Node],
) -> Reach:
    """Return which layers see the output of a node, through steps that pass a factor on.

    A tensor carries the output if ``value(s * output) = s * value(output)`` for any ``s > 0``,
    whatever moves or sums up the elements meanwhile. Where somebody else sees such a tensor than a
    layer or a step that passes it on, no scale can be moved.

    Args:
        start: the node.
        nodes: of its graph, in order.
        modules: those that nodes call, by their dotted names.
        calls: how often each is called.
        kept: nodes whose values stay behind as attributes of modules.
    """
    carriers = {start}
    layers: list[str] = []
    reasons = ["its output is kept as an attribute of a module"] if start in kept else []
    for node in nodes:
        given = [one for one in node.all_input_nodes if one in carriers]
        if not given or asks_only(node):
            continue
        target = str(node.target)
        if node.op == "call_module" and isinstance(modules[target], LAYERS):
            layers.append(target)
            if calls[target] > 1:
                reasons.append(f"{target!r} is called {calls[target]} times")
            elif len(node.all_input_nodes) > 1:
                reasons.append(f"{target!r} takes more than its output")
        elif _passes(node, given, modules):
            carriers.add(node)
            if node in kept:
                reasons.append("its output is kept as an attribute of a module")
        elif node.op == "output":
            reasons.append("its output is an output of the model")
        else:
            reasons.append(f"its output feeds {name_of(node)}, which does not pass a scale on")
    if not layers and not reasons:
        reasons = ["its output goes to no layer"]
    return Reach(tuple(dict.fromkeys(layers)), reasons[0] if reasons else None)


def _passes(node: fx.Node, given: list[fx.Node], modules: Modules) -> bool:
    """Return whether a node passes a factor of some of its inputs on to its output."""
    if idle(node, modules):
        return True
    if (found := activation_of(node, modules)) is not None:
        return found.homogeneous
    if node.op == "call_module":
        module = modules[str(node.target)]
        indices = getattr(module, "return_indices", False)
        return type(module) in _MODULES and not hooked(module) and not indices
    if node.op not in ("call_function", "call_method"):
        return False
    target, first = node.target, node.args[0] if node.args else node.kwargs.get("input")
    if target in _JOINS:
        return True
    if target in _SUMS:
        return len(node.args) == 2 and all(one in given for one in node.args)
    if _uses(node, given) > 1:
        return False  # a product of it with itself
    if target in _PRODUCTS:
        return True
    if target is functional.scaled_dot_product_attention:
        return given[0] is (node.args[2] if len(node.args) > 2 else node.kwargs.get("value"))
    if target in _QUOTIENTS:
        return first is given[0] and "rounding_mode" not in node.kwargs
    if target is functional.pad:
        return len(node.args) < 4 and not node.kwargs.get("value")
    if node.kwargs.get("return_indices"):
        return False
    if target is getattr:
        return node.args[1] in ("T", "mT")
    return target in _LINEAR and first is given[0]


def _uses(node: fx.Node, given: list[fx.Node]) -> int:
    """Return how often a node takes one of some others, in lists too."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return sum(one in given for one in found)


_MOVES = (
    "chunk", "clone", "contiguous", "expand", "expand_as", "flatten", "flip", "index_select",
    "movedim", "narrow", "permute", "repeat", "repeat_interleave", "reshape", "reshape_as", "roll",
    "select", "split", "squeeze", "swapaxes", "swapdims", "t", "tile", "transpose", "unbind",
    "unflatten", "unsqueeze", "view", "view_as",
)  # fmt: skip
"""Methods, most of them functions of torch as well, that move elements or repeat them."""

_CASTS = ("bfloat16", "double", "float", "half", "to", "type_as")


def _named(*names: str) -> frozenset[object]:
    """Return the functions of torch of these names, and the names for methods."""
    found = (getattr(torch, name, None) for name in names)
    return frozenset((*names, *(one for one in found if callable(one))))


_JOINS: frozenset[object] = frozenset((torch.cat, torch.concat, torch.stack))
"""What puts tensors side by side: each channel comes from one of them."""

_SUMS = _named("add", "sub") | {operator.add, operator.iadd, operator.sub, operator.isub}
"""Linear in both together, in none alone."""

_PRODUCTS = _named("bmm", "einsum", "matmul", "mm", "mul", "multiply") | {
    operator.imul,
    operator.matmul,
    operator.mul,
}
"""Linear in each operand alone."""

_QUOTIENTS = _named("div", "divide", "true_divide") | {operator.truediv}

_LINEAR: frozenset[object] = (
    _named(*_MOVES, *_CASTS, "mean", "neg", "sum")
    | {operator.getitem, operator.neg}
    | {
        getattr(functional, f"{kind}_pool{dims}d")
        for kind in ("avg", "adaptive_avg", "max", "adaptive_max")
        for dims in (1, 2, 3)
    }
    | {functional.interpolate, functional.pixel_shuffle, functional.pixel_unshuffle}
)
"""What keeps a factor of its first operand, whatever the others are."""

_MODULES: frozenset[type[nn.Module]] = frozenset(
    (
        nn.Flatten,
        nn.Unflatten,
        nn.ChannelShuffle,
        nn.PixelShuffle,
        nn.PixelUnshuffle,
        nn.Upsample,
        nn.ZeroPad1d,
        nn.ZeroPad2d,
        nn.ZeroPad3d,
        *(
            getattr(nn, f"{kind}{dims}d")
            for kind in ("AvgPool", "AdaptiveAvgPool", "MaxPool", "ReflectionPad", "ReplicationPad")
            for dims in (1, 2, 3)
        ),
    )
)
