"""Inputs of layers turned, so that no channel of a block stands out."""

from collections.abc import Iterator, Sequence
from typing import ClassVar

import attrs
import torch
from torch import nn

from mono_quant.base import WITHOUT_DATA, Change, Edit, Transform, TransformContext
from mono_quant.configurable import register
from mono_quant.numerics.rotation import block_of, rotated
from mono_quant.transforms.edits import ROTATE
from mono_quant.transforms.graph import Graph
from mono_quant.transforms.rescaling import refuse
from mono_quant.transforms.rotated import RotatedLinear, refuse_rotation
from mono_quant.transforms.tracing import trace
from mono_quant.transforms.watching import agree, outputs_of, seen


@register
@attrs.frozen
class Rotate(Transform):
    """Turns the inputs of Linear layers, and the rows of their weights, by a Hadamard matrix.

    A product is the same if both factors are turned by an orthogonal matrix. Each value of a turned
    block is a sum of all of its values with signs, so that large ones are spread over the block:
    weights come near a normal distribution, which grids of few bits are good at, and so do inputs,
    whose loud channels otherwise leave few steps to the others. It works on blocks of 128 channels,
    or of the largest power of two from 16 on that divides them. A layer turns its inputs itself at
    each call, which costs as much as 128 outputs more; nothing else of the model changes, so that
    the layers may stand anywhere, and norms and residuals stay as they are.

    Of a layer that is going to be quantized, everything follows from what its product is given:
    ranges of inputs, roundings that look at them, and the report. It stays a Linear: of a class of
    its own, `RotatedLinear`. With data, the model's outputs are compared with those before. Layers
    whose weight is read by somebody else are left alone, and so are all where nothing shows who
    calls them: a model that cannot be traced, without data.

    Sources: Ashkboos et al. 2024, "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs",
    https://arxiv.org/abs/2404.00456; Chee et al. 2023, "QuIP", https://arxiv.org/abs/2307.13304,
    on why it helps weights.
    """

    kind: ClassVar[str] = "rotate"
    slows: ClassVar[bool] = True

    def apply(
        self, model: nn.Module, context: TransformContext = WITHOUT_DATA
    ) -> tuple[Change, ...]:
        """Turn what can be, in place; return a change for each Linear, done or refused."""
        paths = list(_linears(model, context))
        graph = trace(model)
        if graph.reason is not None:
            graph = seen(model, context, graph.reason, 1)
        refused = {path: why for path in paths if (why := _unfit(model, graph, path)) is not None}
        todo = [path for path in paths if path not in refused]
        before = outputs_of(model, context, 1)
        floats = [_turn(model.get_submodule(path)) for path in todo]
        if todo and before and not agree(before, outputs_of(model, context, 1)):
            _turn_back(model, todo, floats)
            refused |= dict.fromkeys(todo, "it changes the model's outputs on the data")
        return tuple(
            Change(path, f"the inputs of {path!r} are not turned: {refused[path]}", done=False)
            if path in refused
            else _done(model, path)
            for path in paths
        )


def _linears(model: nn.Module, context: TransformContext) -> Iterator[str]:
    """Yield the paths of Linears, of those that are going to be quantized where that is known."""
    for path, module in model.named_modules():
        key = f"{path}.weight" if path else "weight"
        if isinstance(module, nn.Linear) and (not context.targets or key in context.targets):
            yield path


def _unfit(model: nn.Module, graph: Graph, path: str) -> str | None:
    """Return why a layer cannot be turned, or None."""
    layer = model.get_submodule(path)
    if not path:
        return "it is the whole model"
    if isinstance(layer, RotatedLinear):
        return "they are turned already"
    reason = refuse_rotation(layer) or refuse(model, path, path)
    if reason is not None:
        return reason
    if not graph.views:
        return graph.reason
    misused = (view.misused[path] for view in graph.views if path in view.misused)
    reason = next(misused, None)
    if reason is None and not graph.calls(path):
        reason = "the model does not call it"
    return reason


@torch.no_grad()
def _turn(layer: nn.Module) -> nn.Parameter:
    """Make a Linear a `RotatedLinear`, and return the weight that it had."""
    old = layer.get_parameter("weight")
    turned = rotated(old.to(torch.float64)).to(old.dtype)
    layer.register_parameter("weight", nn.Parameter(turned, requires_grad=old.requires_grad))
    layer.__class__ = RotatedLinear
    return old


def _turn_back(model: nn.Module, paths: Sequence[str], floats: Sequence[nn.Parameter]) -> None:
    for path, weight in zip(paths, floats, strict=True):
        layer = model.get_submodule(path)
        layer.__class__ = nn.Linear
        layer.register_parameter("weight", weight)


def _done(model: nn.Module, path: str) -> Change:
    size = block_of(model.get_submodule(path).get_parameter("weight").shape[1])
    text = f"the inputs of {path!r} are turned in blocks of {size}"
    return Change(path, text, edits=(Edit(ROTATE, path),))
