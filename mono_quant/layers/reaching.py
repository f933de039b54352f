"""What reaches the product of a layer whose class has a forward of its own."""

import inspect
from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

_SEEN = "_seen_by_mono_quant"


def is_stock(layer: nn.Module, known: type[nn.Module]) -> bool:
    """Return whether a layer of a known class, or of a subclass, computes as that class does."""
    return all(
        getattr(type(layer), name, None) is getattr(known, name, None)
        for name in ("forward", "_conv_forward")
    )


def reads_weight(layer: nn.Module) -> bool:
    """Return whether the layer's own forward reads its weight and hands nothing to its parent's."""
    forward = inspect.unwrap(type(layer).forward)
    code = getattr(forward, "__code__", None)
    names = set(code.co_names) if code is not None else set()
    return "weight" in names and not names & {"super", "_conv_forward"}


def reaching(
    layer: nn.Module,
    known: type[nn.Module],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
) -> list[Tensor]:
    """Return what a call of a layer hands to the product of the known class: padded, scaled, ...

    The layer's own forward runs once more, without hooks.
    """
    seen: list[Tensor] = []
    cls = _watched(type(layer), known)
    twin = cls.__new__(cls)
    vars(twin).update(vars(layer))  # the same tensors
    vars(twin)[_SEEN] = seen
    twin.forward(*args, **kwargs)
    return seen


class _Forward(nn.Module):
    """Notes what the known class's forward is given."""

    def forward(self, input: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Return what the known class returns."""
        cast("list[Tensor]", vars(self)[_SEEN]).append(input)
        return cast("Tensor", super().forward(input, *args, **kwargs))


class _ConvForward(nn.modules.conv._ConvNd):
    """Notes what a convolution is given with the layer's weight; with another, it stays float."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if is_parametrized(self) or weight is self.weight:
            cast("list[Tensor]", vars(self)[_SEEN]).append(input)
        return super()._conv_forward(input, weight, bias)


_MADE: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def _watched(cls: type[nn.Module], known: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass whose ``super().forward`` finds one that notes its input."""
    if (cls, known) in _MADE:
        return _MADE[cls, known]
    notes: type[nn.Module] = _ConvForward if "_conv_forward" in vars(known) else _Forward
    noting = type(f"Noting{known.__name__}", (notes, known), {})
    _MADE[cls, known] = type(f"Noting{cls.__name__}", (cls, noting), {})
    return _MADE[cls, known]
