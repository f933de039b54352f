"""Weights of a state dict whose model is not known."""

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import ClassVar

import attrs
from torch import nn

from mono_quant.base import Scheme
from mono_quant.configurable import register
from mono_quant.errors import ConfigurationError
from mono_quant.layers.converting import ConvertingQuantizer
from mono_quant.modules import BareModule, QuantizedBareModule
from mono_quant.numerics.values import Layout

_EMBEDDINGS = ("emb", "wte", "wpe")
_WEIGHTS = re.compile(r"weight|(in|[qkv])_proj_weight|weight_(ih|hh|hr)(_l\d+(_reverse)?)?")
"""What torch's layers call their matrices: products, attention, recurrent layers and cells."""


def _as_names(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(names)


@register
@attrs.frozen
class BareWeightQuantizer(ConvertingQuantizer):
    """Tensors of 2 to 5 dimensions in a state dict that are called as torch's layers call weights.

    That is ``weight``, the projections of attention (``in_proj_weight``, ...) and the weights of
    recurrent layers (``weight_ih_l0``, ...). A matrix or a convolution, by its dimensions.

    Rows run along the first dimension, which is the output channel of all but transposed
    convolutions; those keep right values, on scales shared across their input channels.

    Attributes:
        also: patterns (``*`` and ``?`` match) of further tensors' own names, the last part of those
            in the state dict, for models that call their matrices otherwise.
    """

    kind: ClassVar[str] = "bare"
    takes_children: ClassVar[bool] = False
    float_classes: ClassVar = {BareModule: QuantizedBareModule}
    also: tuple[str, ...] = attrs.field(default=(), converter=_as_names)

    @also.validator
    def _check_also(self, _: object, patterns: tuple[object, ...]) -> None:
        if not all(isinstance(pattern, str) and pattern for pattern in patterns):
            raise ConfigurationError(f"also holds patterns of names, not {patterns!r}")

    def matches(self, layer: nn.Module) -> bool:
        """Return whether `layer` is a place in a state dict with such a tensor."""
        return ConvertingQuantizer.matches(self, layer) and bool(self.layouts(layer))

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

    def layouts(self, layer: nn.Module) -> Mapping[str, Layout]:
        """Return ``[1, first dimension, the rest]`` of each."""
        return {
            name: Layout.grouped(tuple(tensor.shape))
            for name, tensor in layer._parameters.items()
            if tensor is not None and self._named(name) and 2 <= tensor.dim() <= 5
        }

    def _named(self, name: str) -> bool:
        known = _WEIGHTS.fullmatch(name) is not None
        return known or any(fnmatchcase(name, pattern) for pattern in self.also)
