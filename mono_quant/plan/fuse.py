"""Activations that quantized layers compute on their own results, in the class-kept model."""

from collections.abc import Sequence
from itertools import chain

from torch import Tensor, nn

from mono_quant.base import Change, TransformContext
from mono_quant.modules import QuantizedLayer
from mono_quant.transforms import activations, trace
from mono_quant.transforms.activation import computes_in_place
from mono_quant.transforms.edits import put
from mono_quant.transforms.watching import outputs_of


def fuse_activations(model: nn.Module, context: TransformContext) -> tuple[Change, ...]:
    """Let quantized layers compute the activation modules that follow them, in place.

    Where the model's code proves that an activation alone takes what a layer with quantized inputs
    returns, and nothing else calls it. The layer then computes it in the memory of its result,
    which nobody else sees, and an `nn.Identity` stands in its place. What the model computes stays
    the same to the bit; with data, that is looked at.

    Args:
        model: quantized; changed.
        context: data, where there is some.
    """
    if not any(_has_quantized_inputs(one) for one in model.modules()) or not any(
        computes_in_place(one) for one in model.modules()
    ):
        return ()
    pairs = _pairs(model)
    before = outputs_of(model, context, 1) if pairs else []
    changes: list[Change] = []
    for path, (layer_path, layer, activation) in pairs.items():
        put(model, activation, layer.take_over(activation))
        text = f"{path} ({type(activation).__name__}) is computed by {layer_path}, in place"
        changes.append(Change(path, text))
    if changes and (trouble := _trouble(model, context, before)) is not None:
        for _, layer, _ in pairs.values():
            layer.give_back()
        return tuple(
            Change(path, f"{path} is not computed by its layer: {trouble}", done=False)
            for path in pairs
        )
    return tuple(changes)


def _has_quantized_inputs(module: nn.Module) -> bool:
    return isinstance(module, QuantizedLayer) and bool(module.activations())


def _pairs(model: nn.Module) -> dict[str, tuple[str, QuantizedLayer, nn.Module]]:
    """Return layers by the activation that each can compute, by the names of both."""
    graph = trace(model)
    found: dict[str, tuple[str, QuantizedLayer, nn.Module]] = {}
    for one in activations(model, graph):
        layer = model.get_submodule(one.layer)
        if one.path is None or one.shared or graph.chain(one.layer).dropout:
            continue
        activation = model.get_submodule(one.path)
        if (
            isinstance(layer, QuantizedLayer)
            and _has_quantized_inputs(layer)
            and layer.refuse_then() is None
            and computes_in_place(activation)
        ):
            found[one.path] = (one.layer, layer, activation)
    return found


def _trouble(
    model: nn.Module, context: TransformContext, before: Sequence[Sequence[Tensor]]
) -> str | None:
    """Return what is no longer as it was in the model, or None."""
    if (reason := trace(model).reason) is not None:
        return f"without it, {reason}"
    try:
        after = outputs_of(model, context, 1)
    except Exception as error:  # the model's code may ask for what an Identity has not
        return f"without it, the model fails on the data ({error})"
    pairs = zip(chain(*before), chain(*after), strict=True)
    return None if all(_same(*pair) for pair in pairs) else "the model's outputs are others then"


def _same(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    return bool((x.eq(y) | (x.ne(x) & y.ne(y))).all())  # a NaN where there was one
