"""Elementwise functions that a kernel can compute on a layer's result, by any of their names."""

from collections.abc import Callable, Mapping, Sequence

import attrs
import torch
from torch import nn
from torch.nn import functional

Argument = float | str | None


@attrs.frozen
class Nonlinearity:
    """An elementwise function.

    Attributes:
        kind: ``relu``, ``relu6``, ``clamp``, ``leaky_relu``, ``silu``, ``gelu``, ``hardswish``,
            ``tanh`` or ``sigmoid``. A clamp that is a relu or a relu6 is called so.
        arguments: of a clamp its low and high end, each a number or None; of a leaky_relu the slope
            below zero; of a gelu ``"none"`` or ``"tanh"``.
    """

    kind: str
    arguments: tuple[Argument, ...] = ()

    @property
    def homogeneous(self) -> bool:
        """Whether ``f(s * x) = s * f(x)`` for every ``s > 0``."""
        return self.kind in ("relu", "leaky_relu")

    def __str__(self) -> str:
        """Return it as a call: clamp(-1, 1)."""
        shown = ", ".join(
            f"{one:g}" if isinstance(one, float) else str(one) for one in self.arguments
        )
        return f"{self.kind}({shown})" if self.arguments else self.kind


def of_module(module: nn.Module) -> Nonlinearity | None:
    """Return the activation that a module computes, or None; subclasses may compute anything."""
    match module:
        case nn.Hardtanh() if type(module) in (nn.Hardtanh, nn.ReLU6):
            return _clamp(float(module.min_val), float(module.max_val))
        case nn.LeakyReLU() if type(module) is nn.LeakyReLU:
            return Nonlinearity("leaky_relu", (float(module.negative_slope),))
        case nn.GELU() if type(module) is nn.GELU:
            return Nonlinearity("gelu", (str(module.approximate),))
    kind = _MODULES.get(type(module))
    return Nonlinearity(kind) if kind is not None else None


def computes_in_place(module: nn.Module) -> bool:
    """Return whether a module is an activation that torch also computes in its input's memory.

    With the same result and gradient: it has none for a leaky ReLU of a negative slope.
    """
    found = of_module(module)
    if found is None or not isinstance(getattr(module, "inplace", None), bool):
        return False
    slopes = [one for one in found.arguments if found.kind == "leaky_relu"]
    return "forward" not in vars(module) and all(isinstance(s, float) and s >= 0 for s in slopes)


def of_call(
    target: object, args: Sequence[object], kwargs: Mapping[str, object]
) -> Nonlinearity | None:
    """Return the activation that a call computes, or None.

    Args:
        target: a function, or the name of a method of tensors.
        args: its positional arguments, the tensor first.
        kwargs: its keyword arguments.
    """
    signature = _METHODS.get(target) if isinstance(target, str) else _FUNCTIONS.get(target)
    if signature is None:
        return None
    given = {**dict(zip(signature.names, args[1:], strict=False)), **kwargs}
    given.pop("inplace", None)  # who else sees the tensor is for the graph to say
    given.pop("input", None)
    values: list[Argument] = []
    for name, default in zip(signature.names, signature.defaults, strict=True):
        value = given.pop(name, default)
        if name == "inplace":
            continue
        if isinstance(value, int | float):
            value = float(value)
        if not (value is None or isinstance(value, str | float)):
            return None  # an end that is a tensor
        values.append(value)
    return signature.make(*values) if not given else None


@attrs.frozen
class _Signature:
    """Parameters after the tensor, and what they make."""

    make: Callable[..., Nonlinearity]
    names: tuple[str, ...] = ()
    defaults: tuple[object, ...] = ()


def _clamp(low: Argument, high: Argument) -> Nonlinearity:
    if low == 0 and high is None:
        return Nonlinearity("relu")
    if low == 0 and high == 6:
        return Nonlinearity("relu6")
    return Nonlinearity("clamp", (low, high))


def _plain(kind: str) -> _Signature:
    return _Signature(lambda: Nonlinearity(kind), ("inplace",), (False,))


_CLAMP = _Signature(_clamp, ("min", "max"), (None, None))
_AT_LEAST = _Signature(lambda low: _clamp(low, None), ("min",), (None,))
_AT_MOST = _Signature(lambda high: _clamp(None, high), ("max",), (None,))
_HARDTANH = _Signature(_clamp, ("min_val", "max_val", "inplace"), (-1.0, 1.0, False))
_LEAKY = _Signature(
    lambda slope: Nonlinearity("leaky_relu", (slope,)), ("negative_slope", "inplace"), (0.01, False)
)
_GELU = _Signature(lambda how: Nonlinearity("gelu", (how,)), ("approximate",), ("none",))

_MODULES: Mapping[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
}

_FUNCTIONS: Mapping[object, _Signature] = {
    torch.relu: _plain("relu"),
    torch.relu_: _plain("relu"),
    functional.relu: _plain("relu"),
    functional.relu_: _plain("relu"),
    functional.relu6: _plain("relu6"),
    functional.silu: _plain("silu"),
    functional.hardswish: _plain("hardswish"),
    torch.tanh: _plain("tanh"),
    functional.tanh: _plain("tanh"),
    torch.sigmoid: _plain("sigmoid"),
    functional.sigmoid: _plain("sigmoid"),
    functional.hardtanh: _HARDTANH,
    functional.hardtanh_: _HARDTANH,
    functional.leaky_relu: _LEAKY,
    functional.leaky_relu_: _LEAKY,
    functional.gelu: _GELU,
    torch.clamp: _CLAMP,
    torch.clip: _CLAMP,
    torch.clamp_min: _AT_LEAST,
    torch.clamp_max: _AT_MOST,
}

_METHODS: Mapping[str, _Signature] = {
    name + ending: signature
    for ending in ("", "_")
    for name, signature in {
        "relu": _plain("relu"),
        "tanh": _plain("tanh"),
        "sigmoid": _plain("sigmoid"),
        "clamp": _CLAMP,
        "clip": _CLAMP,
        "clamp_min": _AT_LEAST,
        "clamp_max": _AT_MOST,
    }.items()
}
