"""Changes of a model's structure, made again on the skeleton that a file is loaded into."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar, cast

import torch
from torch import nn

from mono_quant.base import Edit
from mono_quant.configurable import Json
from mono_quant.errors import CheckpointError
from mono_quant.transforms.graph import NORMS
from mono_quant.transforms.rescaling import kind_of, widths
from mono_quant.transforms.rotated import RotatedLinear, refuse_rotation

ModelT = TypeVar("ModelT", bound=nn.Module)

_EDITED = "_edited"  # where a module keeps the operations of its edits

IDENTITY = "identity"
BIAS = "bias"
ROTATE = "rotate"


def repeat(model: nn.Module, edits: Json) -> None:
    """Make the structural changes of a transform on a float skeleton, in place.

    A batch normalization becomes an `nn.Identity`; a layer without bias is given one of zeros, on
    its weight's device; a Linear takes a weight for inputs that are turned first. What is so
    already is left alone. Everything is checked before anything is changed; nothing that the list
    says is imported or called.

    Args:
        model: the skeleton; may be on the meta device.
        edits: a list of ``{"op": "identity" | "bias" | "rotate", "path": "name of a module"}``, as
            `Edit.to_config` writes them; taken for what a stranger may have written.

    Raises:
        CheckpointError: the list is not of that form, or does not fit the model.
    """
    if not isinstance(edits, list | tuple):
        raise CheckpointError("the changes of the model's structure are not a list")
    modules = dict(model.named_modules(remove_duplicate=False))
    checked = [_checked(edit, modules) for edit in edits]
    for edit in checked:
        module = modules[edit.path]
        if edit.op == IDENTITY:
            remove(model, module)
        elif edit.op == ROTATE:
            module.__class__ = RotatedLinear
        elif module.bias is None:
            add_bias(module)
    mark(model, checked)


def remove(model: nn.Module, norm: nn.Module) -> nn.Identity:
    """Put an `nn.Identity` wherever `model` has `norm`, and return it."""
    identity = nn.Identity().train(norm.training)
    put(model, norm, identity)
    return identity


def edits_of(model: nn.Module) -> Iterator[Edit]:
    """Yield the edits that `mark` has noted in a model, by the names that its modules have now."""
    for path, module in model.named_modules():
        for op in module.__dict__.get(_EDITED, ()):
            yield Edit(str(op), path)


def mark(model: nn.Module, edits: Iterable[Edit]) -> None:
    """Note edits in the modules that they changed, where copies and pickles keep them."""
    for edit in edits:
        module = model.get_submodule(edit.path)
        done = module.__dict__.get(_EDITED, ())
        module.__dict__[_EDITED] = tuple(dict.fromkeys((*done, edit.op)))


def put(model: ModelT, old: nn.Module, new: nn.Module) -> ModelT:
    """Put `new` wherever `model` has `old`, and return the model: `new` itself, if it was `old`."""
    if old is new:
        return model
    if model is old:
        return cast("ModelT", new)  # who makes the new one answers for the class
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children leaves out repetitions
            if child is old:
                setattr(parent, name, new)
    return model


def add_bias(layer: nn.Module) -> None:
    """Give a layer a bias of zeros."""
    weight = layer.get_parameter("weight")
    zeros = torch.zeros(widths(layer)[1], dtype=weight.dtype, device=weight.device)
    layer.register_parameter("bias", nn.Parameter(zeros, requires_grad=weight.requires_grad))


def _checked(edit: Json, modules: Mapping[str, nn.Module]) -> Edit:
    match edit:
        case {"op": str(op), "path": str(path), **rest} if not rest:
            pass
        case _:
            raise CheckpointError(f"{edit!r:.80} is no change of a model: an op and a path")
    if op not in (IDENTITY, BIAS, ROTATE):
        raise CheckpointError(f"{op!r:.40} is no change of a model that is known here")
    module = modules.get(path) if path else None
    if module is None:
        raise CheckpointError(f"the file changes {path!r:.80}, which the model lacks")
    name = type(module).__name__
    if op == IDENTITY and not isinstance(module, (*NORMS, nn.Identity)):
        raise CheckpointError(f"the file removes {path!r}, a {name}; only a BatchNorm is removed")
    if op == ROTATE and (reason := refuse_rotation(module)) is not None:
        raise CheckpointError(f"the file turns the inputs of {path!r}, but {reason}")
    if op == BIAS and ("weight" not in module._parameters or kind_of(module) is None):
        raise CheckpointError(f"the file gives {path!r}, a {name}, a bias, which it cannot have")
    return Edit(op, path)
