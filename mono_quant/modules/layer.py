"""What all quantized layers share: conversion in place, kernels, and the way back."""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from mono_quant.base import (
    Activation,
    Arranged,
    ArrangingKernel,
    Kernel,
    KernelSpec,
    Operation,
    PackedTensor,
    QuantizedModule,
)
from mono_quant.kernels import (
    REFERENCE,
    Site,
    for_many,
    most_rows,
    row_of,
    select,
)
from mono_quant.kernels.ops import is_exported, untraced
from mono_quant.modules.weight import QuantizedInput, QuantizedWeight, Short
from mono_quant.operations import MatrixProduct

_SITES = "_sites"
"""Where a layer keeps what was chosen for its products, by weight."""

_NOT_COPIED = ("_compiled_call_impl", _SITES)  # the first as nn.Module leaves it out of its pickles

_PARAMETERS = "_float_parameters"
"""Where a layer keeps the names of its float parameters in their order, and which were trained."""

_THEN = "then"
"""Where a layer keeps the activation that it computes on its results, a child of it."""

_PLACE = "_place_of_then"
"""Where it keeps the module that stands where that activation stood, and whether that was in place.
"""

_OWN_CODE = ("forward", "_conv_forward")

HOLDERS = ("quantized_weights", "quantized_inputs")
"""Attributes of every quantized layer, which a float layer must not have."""


class SlowPathWarning(UserWarning):
    """Something works, at the speed of decoding a whole weight each time."""


class QuantizedLayer(QuantizedModule):
    """A float layer that was turned into a quantized one, in place.

    The object stays the same and only its class and weights change, so that whoever holds a
    reference to the layer (a list, a hook, a second parent) still holds the right one, and its
    bias, hooks, buffers and attributes are untouched. A subclass of a float layer becomes a
    subclass of both, so that it keeps its own forward (see `quantized_class`).
    """

    float_class: ClassVar[type[nn.Module]]
    keeps_forward: ClassVar[bool] = True
    """Whether a subclass of the float layer goes on running its own forward."""

    quantized_weights: nn.ModuleDict
    quantized_inputs: nn.ModuleDict

    def packed_weights(self) -> Mapping[str, PackedTensor]:
        """Return the weights by name."""
        return {name: self._holder(name).packed for name in self.quantized_weights}

    def activations(self) -> Mapping[str, Activation]:
        """Return how inputs are quantized, by the name of the weight that they meet."""
        found = {name: self._activation(name) for name in self.quantized_inputs}
        return {name: one for name, one in found.items() if one is not None}

    def dequantize(self) -> nn.Module:
        """Turn this object back into the float layer, its weights on the grid."""
        weights = {name: packed.dequantize() for name, packed in self.packed_weights().items()}
        self.give_back()
        for holder in HOLDERS:
            del self._modules[holder]
        for kept in ("made_by", _SITES):
            self.__dict__.pop(kept, None)
        self.__class__ = float_class_of(type(self))  # type: ignore[assignment]  # that is the point
        for name, trained in self.__dict__.pop(_PARAMETERS).items():
            if name in weights:
                self.register_parameter(name, nn.Parameter(weights[name], requires_grad=trained))
            else:
                self._parameters[name] = self._parameters.pop(name)
        return self

    def refuse_then(self) -> str | None:
        """Return why this layer cannot compute an activation on its results, or None."""
        into = quantized_base(type(self))
        if hasattr(self, _THEN):
            return f"it has an attribute called {_THEN!r} already"
        own = (
            name in vars(self) or getattr(type(self), name, None) is not getattr(into, name, None)
            for name in _OWN_CODE
        )
        return "it has a forward of its own" if any(own) else None

    def take_over(self, activation: nn.Module) -> nn.Identity:
        """Compute an activation on each result from now on, in the result's own memory.

        Args:
            activation: with an attribute ``inplace``; stays as it is.

        Returns:
            what is to stand where it stood, until `give_back`.
        """
        then, stand_in = copy.deepcopy(activation), nn.Identity().train(activation.training)
        self._modules[_THEN] = then
        self.__dict__[_PLACE] = (stand_in, then.inplace)
        then.__dict__["inplace"] = True
        return stand_in

    def give_back(self) -> None:
        """Turn what stands where an activation stood into that activation, if there is one."""
        then = self._modules.pop(_THEN, None)
        if then is not None:
            stand_in, in_place = self.__dict__.pop(_PLACE)
            stand_in.__class__ = type(then)
            own = {**vars(then), "inplace": in_place}
            vars(stand_in).update({**own, **vars(stand_in)})  # hooks given to it since stay

    @property
    def stand_in(self) -> nn.Module | None:
        """What stands where the activation stood that this layer computes since `take_over`."""
        place: tuple[nn.Module, bool] | None = self.__dict__.get(_PLACE)
        return place[0] if place is not None else None

    def run(
        self, operation: Operation, x: Tensor, bias: Tensor | None, name: str = "weight"
    ) -> Tensor:
        """Return `operation` on `x` and the weight of that name, by the kernel chosen for it."""
        result = None if torch.compiler.is_compiling() else self._of_row(operation, x, bias, name)
        if result is None:
            result = self._result(operation, x, bias, name)
        then = self._modules.get(_THEN)
        return result if then is None else cast("Tensor", then(result))  # as every activation's

    def _of_row(
        self, operation: Operation, x: Tensor, bias: Tensor | None, name: str
    ) -> Tensor | None:
        """Return the result by the shorter way that an earlier call found, if it is for this."""
        held = self._holder(name)
        short = held.short
        if short is None or _LISTENING or short.operation is not operation:
            return None
        inputs = self._input(name)
        if inputs is None or inputs is not short.inputs or not inputs.is_held(short.activation):
            return None
        return short.row(x, held.held_codes, held.held_grid, bias)

    def _result(self, operation: Operation, x: Tensor, bias: Tensor | None, name: str) -> Tensor:
        if torch.compiler.is_compiling():
            return self._traced(operation, x, bias, name)
        held = self._holder(name)
        site = self._site(operation, held, name)
        spec, rows = site.spec, operation.count(x)
        kernel = site.kernel(x.device, x.dtype, rows, (x, bias), held.is_arrangeable)
        self.note(name, kernel)
        if kernel is REFERENCE:
            return kernel(spec, x, held.pin() if operation.reads_rows else held.peek(), bias)
        if isinstance(kernel, ArrangingKernel):
            arranged = held.arranged(kernel, spec)
            if rows == 1:
                self._shorten(kernel, spec, arranged, held, name)
            return kernel.product(spec, x, arranged, bias)
        weight = held.read()
        if rows == 1:
            self._shorten(kernel, spec, weight, held, name)
        return kernel(spec, x, weight, bias)

    def _traced(self, operation: Operation, x: Tensor, bias: Tensor | None, name: str) -> Tensor:
        """Return the result as a trace computes it."""
        held = self._holder(name)
        if not is_exported():
            held.sum_up()
        spec, rows = self._spec(operation, name), operation.count(x)
        kernel = select(spec, x.device, x.dtype, rows, x, bias)
        if isinstance(kernel, ArrangingKernel):
            arranged = held.laid_out()
            if not isinstance(arranged, kernel.arrangement):
                return REFERENCE(spec, x, held.peek(), bias)
            many = rows > self._most_rows(name, x.device, x.dtype)
            kernel = for_many(spec, x.device) if many else kernel
            return kernel.product(spec, x, arranged, bias)
        return kernel(spec, x, held.peek() if kernel is REFERENCE else held.summed(), bias)

    @untraced
    def _most_rows(self, name: str, device: torch.device, dtype: torch.dtype) -> int:
        """Return what `most_rows` does; called while a trace is made, and no part of it."""
        return most_rows(self._spec(MatrixProduct(), name), device, dtype)

    def _shorten(
        self,
        kernel: Kernel,
        spec: KernelSpec,
        weight: PackedTensor | Arranged,
        held: QuantizedWeight,
        name: str,
    ) -> None:
        """Keep the shorter way to this product for later rows, if there is one."""
        inputs, activation = self._input(name), spec.activation
        if inputs is None or activation is None:
            return
        row = row_of(kernel, spec, weight)
        if row is not None:
            held.shorten(Short(row, spec.operation, inputs, activation), weight)

    def _site(self, operation: Operation, held: QuantizedWeight, name: str) -> Site:
        """Return where a weight meets its inputs; another one if what is asked has changed."""
        site = cast("Site | None", self.__dict__.setdefault(_SITES, {}).get(name))
        if site is not None:
            spec = site.spec
            same = spec.scheme is held.scheme and spec.layout is held.layout
            same = same and (spec.operation is operation or spec.operation == operation)
            if same and self._is_met_by(spec.activation, name):
                return site
        site = self.__dict__[_SITES][name] = Site(self._spec(operation, name))
        return site

    def _spec(self, operation: Operation, name: str) -> KernelSpec:
        held = self._holder(name)
        return KernelSpec(operation, held.scheme, held.layout, self._activation(name))

    def note(self, name: str, kernel: Kernel) -> None:
        """Tell those who listen which kernel computes with the weight of that name."""
        if not torch.compiler.is_compiling():
            for ran in _LISTENING:
                ran[self, name] = kernel.name

    def float_weight(self, name: str = "weight") -> Tensor:
        """Return a float copy of a weight, for code that reads it by attribute; warns."""
        warnings.warn(
            f"the weight of a {type(self).__name__} was read by attribute, which decodes all of it "
            "each time; if this happens in a forward, leave the layer in float with skip(...)",
            SlowPathWarning,
            stacklevel=3,
        )
        return self.packed_weights()[name].dequantize()

    def _holder(self, name: str) -> QuantizedWeight:
        return cast("QuantizedWeight", self._child("quantized_weights", name))

    def _input(self, name: str) -> QuantizedInput | None:
        return cast("QuantizedInput | None", self._child("quantized_inputs", name))

    def _child(self, holder: str, name: str) -> nn.Module | None:
        held = cast("nn.ModuleDict", self._modules[holder])
        return held._modules.get(name)  # less of a detour than by attribute and by its own lookup

    def _activation(self, name: str) -> Activation | None:
        found = self._input(name)
        if found is None:
            return None
        return found.activation.sparing(self._holder(name).columns_apart)

    def _is_met_by(self, activation: Activation | None, name: str) -> bool:
        """Return whether this one, which `_activation` once returned, still holds."""
        found = self._input(name)
        if found is None or activation is None:
            return found is None and activation is None
        apart = self._holder(name).columns_apart if activation.scale is None else None
        return found.is_held(activation) and activation.apart is apart

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        """Pickle and copy by the two classes that made this one, which may have no name."""
        made_of = (float_class_of(type(self)), quantized_base(type(self)))
        state = {key: value for key, value in self.__dict__.items() if key not in _NOT_COPIED}
        return (_blank, made_of, state)


_LISTENING: list[dict[tuple[nn.Module, str], str]] = []


@contextmanager
def kernels_run() -> Iterator[Mapping[tuple[nn.Module, str], str]]:
    """Collect which kernel computes with each weight, by layer and name, until the end."""
    ran: dict[tuple[nn.Module, str], str] = {}
    _LISTENING.append(ran)
    try:
        yield ran
    finally:
        _LISTENING[:] = [one for one in _LISTENING if one is not ran]


def convert(
    layer: nn.Module,
    weights: Mapping[str, PackedTensor],
    activations: Mapping[str, Activation],
    into: type[QuantizedLayer],
) -> QuantizedLayer:
    """Turn `layer`, a working copy, into a quantized one in place and return it."""
    base = type_before_parametrizations(layer)
    order = dict.fromkeys([*layer._parameters, *weights])  # a parametrized weight comes last
    layer.__dict__[_PARAMETERS] = {name: _is_trained(layer, name) for name in order}
    layer._modules.pop("parametrizations", None)
    for name in weights:
        layer._parameters.pop(name, None)
    layer.__class__ = quantized_class(base, into)
    converted = cast("QuantizedLayer", layer)  # its class was changed in the line above
    converted.quantized_weights = nn.ModuleDict(
        {name: QuantizedWeight(packed) for name, packed in weights.items()}
    )
    converted.quantized_inputs = nn.ModuleDict(
        {name: QuantizedInput(activation) for name, activation in activations.items()}
    )
    return converted


def _is_trained(layer: nn.Module, name: str) -> bool:
    parameter = layer._parameters.get(name)
    return parameter.requires_grad if parameter is not None else True


def taken_name(layer: nn.Module) -> str | None:
    """Return why a layer cannot be converted: it uses a name that a quantized one needs."""
    taken = [name for name in HOLDERS if hasattr(layer, name)]
    return (
        f"it has an attribute called {taken[0]}, which a quantized layer needs" if taken else None
    )


def tie(first: nn.Module, first_name: str, second: nn.Module, second_name: str) -> None:
    """Let two quantized layers share one weight, for good: when moved, copied and saved."""
    if isinstance(first, QuantizedLayer) and isinstance(second, QuantizedLayer):
        second.quantized_weights[second_name] = first.quantized_weights[first_name]


def quantized_class(base: type[nn.Module], into: type[QuantizedLayer]) -> type[QuantizedLayer]:
    """Return the class of a quantized `base`.

    `into` itself for the float layer that it stands for; for a subclass of that, a class that is
    both. Its own forward comes first where the quantized class keeps it: its ``super().forward``
    then finds the quantized one.
    """
    if base is into.float_class:
        return into
    if (base, into) not in _MADE:
        parents = (base, into) if into.keeps_forward else (into, base)
        made = type(f"Quantized{base.__name__}", parents, {})
        _MADE[base, into] = cast("type[QuantizedLayer]", made)  # `into` is among its parents
    return _MADE[base, into]


_MADE: dict[tuple[type[nn.Module], type[QuantizedLayer]], type[QuantizedLayer]] = {}


def quantized_base(cls: type[nn.Module]) -> type[QuantizedLayer]:
    """Return the quantized class that `cls` is, or was made of."""
    for parent in cls.__mro__:
        if "float_class" in vars(parent) and issubclass(parent, QuantizedLayer):
            return parent
    raise TypeError(f"{cls.__name__} is not a quantized layer")


def float_class_of(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the float class that `cls` was made of."""
    into = quantized_base(cls)
    if cls is into:
        return into.float_class
    return next(parent for parent in cls.__bases__ if parent is not into)


def _blank(base: type[nn.Module], into: type[QuantizedLayer]) -> QuantizedLayer:
    cls = quantized_class(base, into)
    return cls.__new__(cls)
