"""What the quantizers of layers with one weight share."""

import itertools
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar, cast

import attrs
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from mono_quant.base import Activation, LayerQuantizer, PackedTensor, QuantizedModule, Scheme
from mono_quant.modules import QuantizedLayer, convert, taken_name
from mono_quant.numerics.values import Layout


def weight_shape(layer: nn.Module, expected: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the weight: its own, where it is a parameter, and else the expected one.

    A pruned or resized layer may say another in its attributes.
    """
    weight = layer._parameters.get("weight")
    return tuple(weight.shape) if weight is not None else expected


def first_tensor(
    args: tuple[object, ...], kwargs: Mapping[str, object]
) -> Iterable[tuple[str, Tensor]]:
    """Return the first tensor of a call as the input of ``weight``: `LayerQuantizer.inputs`."""
    found = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return [("weight", x) for x in itertools.islice(found, 1)]


@attrs.frozen
class SingleWeightQuantizer(LayerQuantizer):
    """A layer whose one weight is called ``weight`` and that is turned into a `QuantizedLayer`."""

    float_classes: ClassVar[Mapping[type[nn.Module], type[QuantizedLayer]]]
    """The float classes that are known, and what they become."""

    @abstractmethod
    def layout(self, layer: nn.Module) -> Layout:
        """Return the layout of the weight."""

    def matches(self, layer: nn.Module) -> bool:
        """Return whether `layer` is of a known class or a subclass, and still float."""
        return isinstance(layer, tuple(self.float_classes)) and not isinstance(
            layer, QuantizedModule
        )

    def refuse(self, layer: nn.Module, scheme: Scheme) -> str | None:
        """Return why the weight cannot be taken over, or None."""
        if reason := taken_name(layer):
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

    def replace(
        self,
        layer: nn.Module,
        weights: Mapping[str, PackedTensor],
        activations: Mapping[str, Activation],
    ) -> QuantizedModule:
        """Return `layer` itself, converted."""
        return convert(layer, weights, activations, self._quantized_class(layer))

    def _quantized_class(self, layer: nn.Module) -> type[QuantizedLayer]:
        return next(
            quantized
            for float_class, quantized in self.float_classes.items()
            if isinstance(layer, float_class)
        )
