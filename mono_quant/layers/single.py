"""What the quantizers of layers with one weight share."""

import itertools
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import cast

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from mono_quant.base import Scheme
from mono_quant.layers.converting import ConvertingQuantizer
from mono_quant.layers.reaching import is_stock, reaching, reads_weight
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

    def _keeps_own_forward(self, layer: nn.Module) -> bool:
        known, into = self._classes(layer)
        return into.keeps_forward and not is_stock(layer, known)
