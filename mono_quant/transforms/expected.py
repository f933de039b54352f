"""The mean of a layer's inputs without data, where a batch normalization before it tells."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mono_quant.numerics.normal import clipped_mean
from mono_quant.transforms.activation import Nonlinearity
from mono_quant.transforms.graph import NORMS, Graph
from mono_quant.transforms.norms import outputs_of, rescaling_of, unfit
from mono_quant.transforms.rescaling import TRANSPOSED, kind_of, widths
from mono_quant.transforms.tracing import trace


def expected_inputs(
    original: nn.Module, floats: nn.Module, paths: Sequence[str]
) -> Mapping[str, Tensor | str]:
    """Return the mean of each channel of the input of some layers, or why it is not known.

    A batch normalization puts out, as far as its running statistics are those of its inputs, its
    bias for the mean and its weight for the standard deviation. A layer behind it, directly or
    through a clamp, then sees the mean of a clipped normal distribution. Zeros that padding adds
    are not looked at.

    Args:
        original: the model as it was written.
        floats: the same after transforms, of which the layers' inputs are asked. Where something
            else than folding the normalization changed the layer before it, nothing is known.
        paths: dotted names of the layers.

    Returns:
        by those names, float64 ``[in]`` or a reason.
    """
    graph = trace(original)
    if graph.reason is not None:
        return dict.fromkeys(paths, f"without data, the model's code has to tell: {graph.reason}")
    norms = [path for path, one in original.named_modules() if isinstance(one, NORMS)]
    ahead = {
        chain.then: (path, chain.activation)
        for path in norms
        if (chain := graph.chain(path)).then is not None
    }
    found: dict[str, Tensor | str] = {}
    for path in paths:
        source = graph.source(path)
        norm, activation = ahead.get(path, (source.path, None))
        if norm not in norms:
            found[path] = f"without data, its inputs are not known: {source.text}"
        else:
            found[path] = _mean(original, floats, graph, norm, activation, path)
    return found


def _mean(
    original: nn.Module,
    floats: nn.Module,
    graph: Graph,
    path: str,
    activation: Nonlinearity | None,
    to: str,
) -> Tensor | str:
    layer, norm = original.get_submodule(to), original.get_submodule(path)
    if kind_of(layer) is None or isinstance(layer, TRANSPOSED):
        return f"without data, nothing is known of what a {type(layer).__name__} makes of its input"
    if layer._parameters.get("weight") is None:
        return "its weight is computed from other parameters"
    if (reason := unfit(norm)) is not None:
        return f"of {path!r}: {reason}"
    if not _as_it_was(original, floats, graph, path):
        return f"something else than folding {path!r} changed what it puts out"
    ends = _ends(activation)
    if ends is None:
        return f"behind {path!r} is {activation}, which does not clip"
    mean, std = outputs_of(norm)
    if widths(layer)[0] != mean.numel():
        return f"it does not take the {mean.numel()} channels of {path!r}"
    return clipped_mean(mean, std, *ends)


def _ends(activation: Nonlinearity | None) -> tuple[float, float] | None:
    """Return the ends that an activation clips at, or None where it does something else."""
    if activation is None:
        return -math.inf, math.inf
    match activation.kind, activation.arguments:
        case "relu", _:
            return 0.0, math.inf
        case "relu6", _:
            return 0.0, 6.0
        case "clamp", (float() | None as low, float() | None as high):
            return -math.inf if low is None else low, math.inf if high is None else high
    return None


def _as_it_was(original: nn.Module, floats: nn.Module, graph: Graph, path: str) -> bool:
    """Return whether a normalization, or the layer that it was folded into, still puts out that."""
    before, after = original.get_submodule(path), floats.get_submodule(path)
    if isinstance(after, NORMS):
        return _same(_tensors(before), _tensors(after))
    source = graph.source(path).path
    if source is None or kind_of(original.get_submodule(source)) is None:
        return False
    layer, folded = (one.get_submodule(source) for one in (original, floats))
    dtype = layer.get_parameter("weight").dtype
    made = [one.to(dtype) for one in rescaling_of(before).parameters(layer) if one is not None]
    return _same(made, [folded.get_parameter(name) for name in ("weight", "bias")])


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _same(ones: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(ones) == len(others) and all(map(torch.equal, ones, others))
