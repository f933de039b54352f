"""What the quantizers of layers that are turned into a `QuantizedLayer` share."""

from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from mono_quant.base import Activation, LayerQuantizer, PackedTensor, QuantizedModule, Scheme
from mono_quant.modules import QuantizedLayer, convert, taken_name


class ConvertingQuantizer(LayerQuantizer):
    """Knows float classes of layers, and turns an object of one into a quantized one in place."""

    float_classes: ClassVar[Mapping[type[nn.Module], type[QuantizedLayer]]]
    """The float classes that are known, and what they become."""

    def matches(self, layer: nn.Module) -> bool:
        """Return whether `layer` is of a known class or a subclass, and still float."""
        return isinstance(layer, tuple(self.float_classes)) and not isinstance(
            layer, QuantizedModule
        )

    def refuse(self, layer: nn.Module, scheme: Scheme) -> str | None:
        """Return that the layer has an attribute that a quantized one needs, or None."""
        return taken_name(layer)

    def replace(
        self,
        layer: nn.Module,
        weights: Mapping[str, PackedTensor],
        activations: Mapping[str, Activation],
    ) -> QuantizedModule:
        """Return `layer` itself, converted."""
        return convert(layer, weights, activations, self._classes(layer)[1])

    def _classes(self, layer: nn.Module) -> tuple[type[nn.Module], type[QuantizedLayer]]:
        """Return the known class of a layer, and what it becomes."""
        return next(pair for pair in self.float_classes.items() if isinstance(layer, pair[0]))
