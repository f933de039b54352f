"""Weights of a state dict whose model is not known."""

from typing import ClassVar, cast

import attrs
from torch import Tensor, nn

from mono_quant.base import Scheme
from mono_quant.configurable import register
from mono_quant.layers.single import SingleWeightQuantizer
from mono_quant.modules import BareModule, QuantizedBareModule
from mono_quant.numerics.values import Layout

_EMBEDDINGS = ("emb", "wte", "wpe")


@register
@attrs.frozen
class BareWeightQuantizer(SingleWeightQuantizer):
    """A tensor named ``weight`` of 2 to 5 dimensions in a state dict: a matrix or a convolution.

    Rows run along the first dimension, which is the output channel of all but transposed
    convolutions; those keep right values, on scales shared across their input channels.
    """

    kind: ClassVar[str] = "bare"
    float_classes: ClassVar = {BareModule: QuantizedBareModule}

    def matches(self, layer: nn.Module) -> bool:
        """Return whether `layer` is a place in a state dict with such a tensor."""
        if not SingleWeightQuantizer.matches(self, layer):
            return False
        weight = layer._parameters.get("weight")
        return weight is not None and 2 <= weight.dim() <= 5

    def refuse(self, layer: nn.Module, scheme: Scheme) -> str | None:
        """Return None: a tensor is a tensor."""
        return None

    def discourage(self, layer: nn.Module, name: str) -> str | None:
        """Return that the tensor's name looks like an embedding's, or None."""
        looks = any(part in name.lower() for part in _EMBEDDINGS)
        return "by its name an embedding: float below 8 bits unless asked for" if looks else None

    def refuse_activation(self, layer: nn.Module, name: str, mode: str) -> str | None:
        """Return that nobody knows what the inputs are."""
        return "a state dict does not say what reads it"

    def layout(self, layer: nn.Module) -> Layout:
        """Return ``[1, first dimension, the rest]``."""
        return Layout.grouped(tuple(cast("Tensor", layer.weight).shape))
