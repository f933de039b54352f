"""Activations that directly follow a layer, for kernels that compute both at once."""

import attrs
from torch import nn

from mono_quant.transforms.activation import Nonlinearity
from mono_quant.transforms.graph import Graph
from mono_quant.transforms.rescaling import kind_of, watched
from mono_quant.transforms.tracing import trace


@attrs.frozen
class FollowingActivation:
    """An activation that alone takes the output of a layer.

    Attributes:
        layer: dotted name of the Linear or convolution, quantized or not.
        activation: what is computed.
        path: dotted name of the module that computes it; None where the code calls a function.
        shared: whether that module is called elsewhere too, so that it has to stay as it is.
    """

    layer: str
    activation: Nonlinearity
    path: str | None
    shared: bool


def activations(model: nn.Module, graph: Graph | None = None) -> tuple[FollowingActivation, ...]:
    """Return the activations that the model's code proves to follow a layer directly.

    A layer whose output something else sees, a hook included, is left out. Nothing is returned of a
    model that cannot be traced. Batch normalizations stand in between as long as they are not
    folded.

    Args:
        model: the model.
        graph: of the model as it is now; traced if it is not given.
    """
    graph = graph or trace(model)
    if not graph.traced:
        return ()
    found: list[FollowingActivation] = []
    for layer, module in model.named_modules():
        if kind_of(module) is None:
            continue
        chain = graph.chain(layer)
        path = chain.activation_path
        if chain.activation is None or watched(model, layer, path or "") is not None:
            continue
        shared = path is not None and (graph.calls(path) > 1 or not graph.together(layer, path))
        found.append(FollowingActivation(layer, chain.activation, path, shared))
    return tuple(found)
