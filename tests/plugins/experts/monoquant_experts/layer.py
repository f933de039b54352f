"""Experts: a stack of matrices, of which each input uses one."""

from collections.abc import Iterator, Mapping
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from mono_quant import (
    Activation,
    LayerQuantizer,
    Layout,
    PackedTensor,
    QuantizedLayer,
    register,
)
from mono_quant.modules import convert


class Experts(nn.Module):
    """Each row of inputs meets the matrix that its router likes best."""

    def __init__(self, count: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(count, inputs))
        self.matrices = nn.Parameter(torch.randn(count, outputs, inputs) / inputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x @ self.router.T).argmax(-1)
        return torch.einsum("ni,noi->no", x, self.matrices[chosen])


class QuantizedExperts(QuantizedLayer, Experts):
    """The same, with the matrices decoded at each call."""

    float_class = Experts

    @property
    def matrices(self) -> Tensor:  # type: ignore[override]  # a parameter there, computed here
        return self.packed_weights()["matrices"].dequantize()


@register
@attrs.frozen
class ExpertsQuantizer(LayerQuantizer):
    """Knows the layer."""

    kind: ClassVar[str] = "experts"

    def matches(self, layer: nn.Module) -> bool:
        return isinstance(layer, Experts) and not isinstance(layer, QuantizedLayer)

    def layouts(self, layer: nn.Module) -> Mapping[str, Layout]:
        shape = tuple(layer.get_parameter("matrices").shape)  # already [experts, out, in]
        return {"matrices": Layout(native=shape, split=shape, order=(0, 1, 2), stack=shape)}

    def inputs(
        self, layer: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> Iterator[tuple[str, Tensor]]:
        for x in args:
            if isinstance(x, Tensor):
                yield "matrices", x

    def replace(
        self,
        layer: nn.Module,
        weights: Mapping[str, PackedTensor],
        activations: Mapping[str, Activation],
    ) -> QuantizedLayer:
        return convert(layer, weights, activations, QuantizedExperts)
