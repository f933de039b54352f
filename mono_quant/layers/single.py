"""What the quantizers of layers with one weight share."""

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import cast

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from mono_quant.base import Activation, Scheme
from mono_quant.layers.converting import ConvertingQuantizer
from mono_quant.layers.reaching import exchanging, is_stock, reaching, reads_weight
from mono_quant.numerics.values import Layout


def weight_shape(layer: nn.Module, expected: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the weight: its own, where it is a parameter, and else the expected one.

    A pruned or resized layer may say another in its attributes.
    """
    weight = layer._parameters.get("weight")
    return tuple(weight.shape) if weight is not None else expected


class SingleWeightQuantizer(ConvertingQuantizer):
    """A layer whose one weight is called ``weight`` and that is turned into a `QuantizedLayer`."""

    @abstractmethod
    def layout(self, layer: nn.Module) -> Layout:
        """Return the layout of the weight."""

    def refuse(self, layer: nn.Module, scheme: Scheme) -> str | None:
        """Return why the weight cannot be taken over, or None."""
        if reason := ConvertingQuantizer.refuse(self, layer, scheme):
            return reason
        if is_parametrized(layer):
            others = set(cast("nn.ModuleDict", layer.parametrizations)) - {"weight"}
            if others:
                return f"it also has a parametrized {min(others)}"
            return None
        if "weight" not in layer._parameters:
            return (
                "its weight is made by a hook (old-style weight_norm, spectral_norm or pruning): "
                "remove that, or use torch.nn.utils.parametrizations"
            )
        return None

    def layouts(self, layer: nn.Module) -> Mapping[str, Layout]:
        """Return the layout of ``weight``."""
        return {"weight": self.layout(layer)}


class ProductQuantizer(SingleWeightQuantizer):
    """A layer that multiplies its first tensor by its weight: any grid of inputs will do."""

    def inputs(
        self, layer: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> Iterable[tuple[str, Tensor]]:
        """Return the first tensor; what padding may add to it, zeros, lies on any grid.

        Of a subclass that keeps its own forward, what that hands to the product.
        """
        if self._keeps_own_forward(layer):
            found = reaching(layer, self._classes(layer)[0], args, kwargs)
            return [("weight", x) for x in found]
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return [("weight", x) for x in itertools.islice(tensors, 1)]

    def refuse_activation(self, layer: nn.Module, name: str, mode: str) -> str | None:
        """Return that a subclass multiplies by the weight itself; any other product takes any."""
        if self._keeps_own_forward(layer) and reads_weight(layer):
            return f"the forward of {type(layer).__name__} reads the weight and multiplies itself"
        return None

    def quantizing_inputs(
        self, layer: nn.Module, activations: Mapping[str, Activation]
    ) -> AbstractContextManager[None] | None:
        """Return what exchanges the first tensor, or what a forward of its own makes of that."""
        activation = activations.get("weight")
        if activation is None:
            return nullcontext()
        change = partial(self._on_grid, layer, activation)
        if not self._keeps_own_forward(layer):
            return _exchanging_first(layer, change)
        if is_parametrized(layer):  # such a weight is another tensor each time it is read
            return None
        return exchanging(layer, self._classes(layer)[0], change)

    def sharing_range(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return an input in rows that have a range each where that is found as they come."""
        return x

    def _on_grid(self, layer: nn.Module, activation: Activation, x: Tensor) -> Tensor:
        rows = x if activation.mode == "static" else self.sharing_range(layer, x)
        return activation.fake_quantize(rows).reshape(x.shape).to(x.dtype)

    def _keeps_own_forward(self, layer: nn.Module) -> bool:
        known, into = self._classes(layer)
        return into.keeps_forward and not is_stock(layer, known)


@contextmanager
def _exchanging_first(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Have a layer take something else for the first tensor that its calls are given."""

    def exchange(
        _: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        for place, value in enumerate(args):
            if isinstance(value, Tensor):
                return (*args[:place], change(value), *args[place + 1 :]), kwargs
        for name, value in kwargs.items():
            if isinstance(value, Tensor):
                return args, {**kwargs, name: change(value)}
        return args, kwargs

    handle = layer.register_forward_pre_hook(exchange, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
