"""What is understood of the steps between layers: which of them need not leave codes.

Three kinds. What *moves* values or picks the largest commutes with rounding to a grid, so it is
done on codes and changes nothing. What *adds* or *averages* can start from codes, since it only
needs their values. Everything else is computed in float.
"""

import operator
from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import fx, nn
from torch.nn import functional

from mono_quant.transforms import activation
from mono_quant.transforms.graph import IDLE
from mono_quant.transforms.nodes import hooked

Pair = tuple[int, int]


@attrs.frozen
class Step:
    """How a step treats codes.

    Attributes:
        kind: ``move`` (works on codes as it is), ``idle`` (returns its input), ``clamp``, ``pad``,
            ``pool`` (the largest of a window), ``concat``, ``add``, ``average``, ``ask`` (for a
            shape) or ``float``.
        inputs: the nodes whose codes it takes.
        low: of a clamp, its low end.
        high: of a clamp, its high end.
        around: of a pad, how much, as `torch.nn.functional.pad` takes it.
        pool: of a pool of two dimensions, kernel, stride, padding and dilation.
    """

    kind: str
    inputs: tuple[fx.Node, ...] = ()
    low: float | None = None
    high: float | None = None
    around: object = None
    pool: tuple[Pair, Pair, Pair, Pair] | None = None

    @property
    def commutes(self) -> bool:
        """Whether rounding to a grid before it is as good as after it."""
        return self.kind in ("move", "idle", "clamp", "pad", "pool", "concat")

    @property
    def tolerates(self) -> bool:
        """Whether it takes codes of any grid."""
        return self.kind in ("add", "average")


_FLOAT = Step("float")
_QUESTIONS = {"shape", "ndim", "device", "size", "dim"}

_MOVING_MODULES = (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle)
_AVERAGING_MODULES = (
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
_ZERO_PADS = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
_CONSTANT_PADS = (*_ZERO_PADS, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)

_MOVING = {
    *(torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze),
    *(torch.unsqueeze, torch.movedim, functional.pixel_shuffle, functional.pixel_unshuffle),
    *("flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze"),
    *("contiguous", "movedim", "clone", "detach"),
}
_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_POOLING = {torch.max_pool2d, functional.max_pool2d}
_DROPPING = {functional.dropout, functional.dropout2d, functional.dropout3d}
_JOINING = {torch.cat, torch.concat, torch.concatenate}
_ADDING = {operator.add, operator.iadd, torch.add, "add", "add_"}
_AVERAGING = {
    *(torch.mean, "mean", functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d),
    *(functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d),
    functional.adaptive_avg_pool3d,
}


def step_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> Step:
    """Return what is understood of a node; ``float`` for whatever is not."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    if node.op == "call_module":
        module = modules[str(node.target)]
        inner = isinstance(first, fx.Node) and len(node.all_input_nodes) == 1
        return _of_module(module, first) if inner and not hooked(module) else _FLOAT
    if node.op not in ("call_function", "call_method"):
        return _FLOAT
    if isinstance(first, fx.Node):
        return _of_call(node, first)
    return _of_join(node, node.args[0] if node.args else node.kwargs.get("tensors"))


def mutates(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether a node writes into its first input."""
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op == "call_method" and name.endswith("_") and not name.endswith("__"):
        return True
    if node.op == "call_function":
        own = getattr(node.target, "__module__", None) in ("_operator", "operator")
        if own and name.startswith("i") and hasattr(operator, f"__{name}__"):
            return name not in ("is_", "is_not", "index", "inv", "invert", "indexOf")
        if name.endswith("_") and not name.endswith("__") and not own:
            return True
    return node.kwargs.get("inplace") is True or node.kwargs.get("out") is not None


def _of_module(module: nn.Module, x: object) -> Step:
    assert isinstance(x, fx.Node)  # the caller has seen to it; this is for the type checker
    kind = type(module)
    if kind in IDLE:
        return Step("idle", (x,))
    if kind in _MOVING_MODULES:
        return Step("move", (x,))
    if isinstance(module, nn.MaxPool2d) and kind is nn.MaxPool2d:
        return _of_pool(x, {name: getattr(module, name) for name in _POOL})
    if kind in _AVERAGING_MODULES:
        return Step("average", (x,))
    if isinstance(module, _CONSTANT_PADS) and kind in _CONSTANT_PADS:
        zero = kind in _ZERO_PADS or module.value == 0
        return Step("pad", (x,), around=tuple(module.padding)) if zero else _FLOAT
    return _of_activation(activation.of_module(module), x)


def _of_call(node: fx.Node, x: fx.Node) -> Step:
    target, rest = node.target, node.args[1:]
    if target in _MOVING and not any(isinstance(one, torch.dtype) for one in rest):
        return Step("move", (x,))
    if target in _POOLING:
        return _of_pool(x, dict(zip(_POOL, rest, strict=False)) | dict(node.kwargs))
    if target in _QUESTIONS or (target is getattr and rest[:1] and rest[0] in _QUESTIONS):
        return Step("ask", (x,))
    if target in _DROPPING:
        trains = node.kwargs.get("training", rest[1] if len(rest) > 1 else True)
        return Step("idle", (x,)) if trains is False else _FLOAT
    if target is functional.pad:
        given = dict(zip(("pad", "mode", "value"), rest, strict=False)) | dict(node.kwargs)
        zero = given.get("value") in (None, 0) and given.get("mode", "constant") == "constant"
        return Step("pad", (x,), around=given.get("pad")) if zero else _FLOAT
    if target in _ADDING:
        other = rest[0] if rest else node.kwargs.get("other")
        if isinstance(other, fx.Node) and len(rest) < 2 and set(node.kwargs) <= {"other"}:
            return Step("add", (x, other))
        return _FLOAT
    if target in _AVERAGING:
        return Step("average", (x,))
    return _of_activation(activation.of_call(target, node.args, node.kwargs), x)


def _of_pool(x: fx.Node, given: Mapping[str, object]) -> Step:
    if given.get("ceil_mode") or given.get("return_indices"):
        return _FLOAT
    kernel = _pair(given.get("kernel_size"))
    stride = kernel if given.get("stride") in (None, (), []) else _pair(given["stride"])
    padding, dilation = _pair(given.get("padding", 0)), _pair(given.get("dilation", 1))
    if kernel is None or stride is None or padding is None or dilation is None:
        return _FLOAT
    return Step("pool", (x,), pool=(kernel, stride, padding, dilation))


def _pair(value: object) -> Pair | None:
    match value:
        case int():
            return value, value
        case (int(one), int(other)):
            return one, other
    return None


def _of_join(node: fx.Node, tensors: object) -> Step:
    if node.target not in _JOINING or not isinstance(tensors, Sequence):
        return _FLOAT
    parts = tuple(one for one in tensors if isinstance(one, fx.Node))
    whole = len(parts) == len(tensors) and set(node.all_input_nodes) == set(parts)
    return Step("concat", parts) if whole else _FLOAT


def _of_activation(found: activation.Nonlinearity | None, x: fx.Node) -> Step:
    if found is None or found.kind not in ("relu", "relu6", "clamp"):
        return _FLOAT
    ends = found.arguments if found.kind == "clamp" else (0.0, 6.0 if found.kind[4:] else None)
    low, high = (float(end) if isinstance(end, int | float) else None for end in ends)
    return Step("clamp", (x,), low, high)
