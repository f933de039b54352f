"""What reaches the product of a layer whose class has a forward of its own."""

import dis
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import CodeType
from typing import cast

import torch
from torch import Tensor, nn

_SEEN = "_seen_by_mono_quant"
_STOPS = "_stops_for_mono_quant"
_ONCE = "_once_for_mono_quant"
_WEIGHT = "_weight_by_mono_quant"
_CHANGE = "_change_by_mono_quant"
_COMPUTING = ("forward", "_conv_forward")


def is_stock(layer: nn.Module, known: type[nn.Module]) -> bool:
    """Return whether a layer of a known class, or of a subclass, computes as that class does."""
    return not any(_overrides(type(layer), known, name) for name in _COMPUTING)


def reads_weight(layer: nn.Module) -> bool:
    """Return whether the layer's own forward reads its weight and hands nothing to its parent's."""
    names = _named(layer)
    return "weight" in names and not names & {"super", "_conv_forward"}


def gives_weight(layer: nn.Module, known: type[nn.Module]) -> bool:
    """Return whether the layer's own code says which weight a convolution is done with."""
    own = _overrides(type(layer), known, "_conv_forward")
    return own or "_conv_forward" in _named(layer)


def meets_weight(layer: nn.Module, known: type[nn.Module], x: Tensor, weight: Tensor) -> bool:
    """Return whether the layer's own code has the known class multiply by the weight it is given.

    The code runs once in eval mode on copies of buffers, those of modules inside the layer too,
    whatever the values of `x` and `weight`.
    """
    seen: list[Tensor] = []
    twin = _twin(layer, known, weight, seen)
    _set_apart(twin)
    with torch.no_grad():
        twin.forward(x)
    return bool(seen)


def reaching(
    layer: nn.Module,
    known: type[nn.Module],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
) -> list[Tensor]:
    """Return what a call of a layer hands to the product of the known class: padded, scaled, ...

    The layer's own forward runs once more, without hooks, and where its code shows that there is
    one product, only as far as that.
    """
    seen: list[Tensor] = []
    twin = _twin(layer, known, cast("Tensor", layer.weight), seen)
    vars(twin)[_STOPS] = getattr(twin, _ONCE)
    with suppress(_Enough):
        twin.forward(*args, **kwargs)
    return seen


@contextmanager
def exchanging(
    layer: nn.Module, known: type[nn.Module], change: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Have the product of the known class take something else than reaches it, in a layer's calls.

    Args:
        layer: whose class is another one meanwhile, with the same forward.
        known: whose product it is.
        change: returns what the product is to take for what reaches it.
    """
    cls, own = type(layer), vars(layer)
    own[_CHANGE] = change
    layer.__class__ = _exchanging_class(cls, known)
    try:
        yield
    finally:
        layer.__class__ = cls
        del own[_CHANGE]


def _has_one_product(cls: type[nn.Module], known: type[nn.Module]) -> bool:
    """Return whether the code of a class's own forward calls the known class once at most.

    So it does where it has no loop and names the parent's product once, and the methods of its own
    that it calls name none.
    """
    code = _code_of(cls.forward)
    if code is None or not _overrides(cls, known, "forward"):
        return False
    if _overrides(cls, known, "_conv_forward"):
        return False
    steps = list(dis.get_instructions(code))
    named = [step.argval for step in steps if step.opname.startswith("LOAD_")]
    looped = any(step.opname.startswith("JUMP_BACKWARD") for step in steps)
    once = max(named.count("super"), named.count("_conv_forward")) == 1
    return once and not looped and not _others(cls, known, code, {"forward"}) & _PRODUCTS


_PRODUCTS = {"super", *_COMPUTING}


def _others(
    cls: type[nn.Module], known: type[nn.Module], code: CodeType, met: set[str]
) -> set[str]:
    """Return the names in the methods of a class's own that some code of it may call."""
    found: set[str] = set()
    for name in set(code.co_names) - met:
        own = _code_of(getattr(cls, name, None))
        if own is not None and _overrides(cls, known, name):
            met.add(name)
            found |= {*own.co_names, *_others(cls, known, own, met)}
    return found


def _overrides(cls: type[nn.Module], known: type[nn.Module], name: str) -> bool:
    """Return whether a class has a method of its own in place of the known class's."""
    return getattr(cls, name, None) is not getattr(known, name, None)


def _code_of(method: object) -> CodeType | None:
    """Return what a method is compiled to; None for what is not written in Python."""
    if not callable(method):
        return None
    return cast("CodeType | None", getattr(inspect.unwrap(method), "__code__", None))


class _Enough(Exception):
    """What reaches the product is known, and nothing more is asked."""


def _named(layer: nn.Module) -> set[str]:
    """Return the names that the code of the layer's forward reads."""
    code = _code_of(type(layer).forward)
    return set(code.co_names) if code is not None else set()


def _twin(
    layer: nn.Module, known: type[nn.Module], weight: Tensor, seen: list[Tensor]
) -> nn.Module:
    """Return a layer that shares all but the weight, and notes what meets that."""
    cls = _watched(type(layer), known)
    twin = cls.__new__(cls)
    vars(twin).update(vars(layer))  # the same tensors
    vars(twin).update({_SEEN: seen, _WEIGHT: weight, _STOPS: False})
    return twin


def _note(twin: nn.Module, x: Tensor) -> None:
    """Note what reaches the product; go no further where that is all."""
    cast("list[Tensor]", vars(twin)[_SEEN]).append(x)
    if vars(twin)[_STOPS]:
        raise _Enough


def _set_apart(twin: nn.Module) -> None:
    """Put a copy of a module, as it shares its parts, in eval mode with buffers of its own."""
    buffers = {name: None if one is None else one.clone() for name, one in twin._buffers.items()}
    inner = dict(twin._modules)
    for name, one in inner.items():
        if one is not None:
            inner[name] = own = type(one).__new__(type(one))
            vars(own).update(vars(one))
            _set_apart(own)
    vars(twin).update(training=False, _buffers=buffers, _modules=inner)


class _Forward(nn.Module):
    """Notes what the known class's forward is given."""

    def forward(self, input: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Return what the known class returns."""
        _note(self, input)
        return cast("Tensor", super().forward(input, *args, **kwargs))


class _ConvForward(nn.modules.conv._ConvNd):
    """Notes what a convolution is given with the layer's weight; with another, it stays float."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if weight is self.weight:
            _note(self, input)
        return super()._conv_forward(input, weight, bias)


_KEPT = property(lambda layer: vars(layer)[_WEIGHT])
"""The weight as one object, however often it is asked for."""


class _ExchangingForward(nn.Module):
    """Gives the known class's forward something else than it was given."""

    def forward(self, input: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Return what the known class returns for that."""
        change = cast("Callable[[Tensor], Tensor]", vars(self)[_CHANGE])
        return cast("Tensor", super().forward(change(input), *args, **kwargs))


class _ExchangingConvForward(nn.modules.conv._ConvNd):
    """Gives a convolution with the layer's weight something else; one with another stays."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        change = cast("Callable[[Tensor], Tensor]", vars(self)[_CHANGE])
        given = change(input) if weight is self.weight else input
        return super()._conv_forward(given, weight, bias)


_Classes = dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]]
_MADE: _Classes = {}
_EXCHANGING: _Classes = {}


def _exchanging_class(cls: type[nn.Module], known: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass whose ``super().forward`` finds one that exchanges its input."""
    if (cls, known) not in _EXCHANGING:
        convolves = "_conv_forward" in vars(known)
        changes: type[nn.Module] = _ExchangingConvForward if convolves else _ExchangingForward
        inner = type(f"Exchanging{known.__name__}", (changes, known), {})
        _EXCHANGING[cls, known] = type(f"Exchanging{cls.__name__}", (cls, inner), {})
    return _EXCHANGING[cls, known]


def _watched(cls: type[nn.Module], known: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass whose ``super().forward`` finds one that notes its input."""
    if (cls, known) in _MADE:
        return _MADE[cls, known]
    notes: type[nn.Module] = _ConvForward if "_conv_forward" in vars(known) else _Forward
    noting = type(f"Noting{known.__name__}", (notes, known), {})
    own = {"weight": _KEPT, _ONCE: _has_one_product(cls, known)}
    _MADE[cls, known] = type(f"Noting{cls.__name__}", (cls, noting), own)
    return _MADE[cls, known]
