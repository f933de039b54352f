"""What single steps of a traced graph do to the tensor that they are given."""

import operator
from collections.abc import Mapping

import torch
from torch import fx, nn
from torch.nn import functional

from mono_quant.transforms import activation
from mono_quant.transforms.activation import Nonlinearity
from mono_quant.transforms.graph import IDLE

Modules = Mapping[str, nn.Module]

_QUESTIONS = {"shape", "dtype", "device", "ndim", "size", "dim"}
"""Attributes and methods of a tensor that do not read its values."""


def hooked(module: nn.Module) -> bool:
    """Return whether a hook of the module sees or changes what flows through it."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def idle(node: fx.Node, modules: Modules) -> bool:
    """Return whether a node hands its input on as it is, in eval mode."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return type(module) in IDLE and not hooked(module)
    if node.target is functional.dropout:
        return node.kwargs.get("training") is False or node.args[2:3] == (False,)
    return False


def activation_of(node: fx.Node, modules: Modules) -> Nonlinearity | None:
    """Return the activation that a node computes on its one input, or None."""
    if len(node.all_input_nodes) != 1:
        return None
    if node.op == "call_module":
        module = modules[str(node.target)]
        return activation.of_module(module) if not hooked(module) else None
    if node.op in ("call_function", "call_method"):
        return activation.of_call(node.target, node.args, node.kwargs)
    return None


def asks_only(node: fx.Node) -> bool:
    """Return whether a node only asks for the shape, dtype or place of a tensor."""
    if node.op == "call_method":
        return node.target in _QUESTIONS
    return node.target is getattr and len(node.args) > 1 and node.args[1] in _QUESTIONS


def flattens(node: fx.Node, modules: Modules) -> bool:
    """Return whether a node makes a matrix ``[N, C]`` of its input."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
    if node.target in (torch.flatten, "flatten"):
        return node.args[1:] in ((1,), (1, -1)) or (
            len(node.args) == 1 and dict(node.kwargs) == {"start_dim": 1}
        )
    if node.target in ("view", "reshape"):
        sizes = node.args[1:]
        return len(sizes[0] if sizes and isinstance(sizes[0], tuple | list) else sizes) == 2
    return False


def name_of(node: fx.Node) -> str:
    """Return what a node is, in words."""
    match node.op:
        case "call_module":
            return repr(str(node.target))
        case "output":
            return "the model's output"
        case "placeholder":
            return "the model's input"
        case "get_attr":
            return str(node.target)
    if isinstance(node.target, str):
        return f"{node.target}()"
    if node.target in (operator.add, operator.iadd, torch.add):
        return "an addition"
    return f"{getattr(node.target, '__name__', node.target)}()"
