"""Lookups."""

from typing import ClassVar, cast

import attrs
from torch import nn

from mono_quant.base import Scheme
from mono_quant.configurable import register
from mono_quant.layers.single import SingleWeightQuantizer, weight_shape
from mono_quant.modules import QuantizedEmbedding, QuantizedEmbeddingBag
from mono_quant.numerics.values import Layout


@register
@attrs.frozen
class EmbeddingQuantizer(SingleWeightQuantizer):
    """`torch.nn.Embedding` and `torch.nn.EmbeddingBag`: a row of the matrix is one entry."""

    kind: ClassVar[str] = "embedding"
    looks_up: ClassVar[bool] = True
    float_classes: ClassVar = {
        nn.Embedding: QuantizedEmbedding,
        nn.EmbeddingBag: QuantizedEmbeddingBag,
    }

    def refuse(self, layer: nn.Module, scheme: Scheme) -> str | None:
        """Return that the layer rewrites its weight or its forward, or None."""
        table = cast("nn.Embedding | nn.EmbeddingBag", layer)  # `matches` has seen to it
        if table.max_norm is not None:
            return "max_norm rewrites the weight at each call"
        if type(layer).forward not in (nn.Embedding.forward, nn.EmbeddingBag.forward):
            return f"{type(layer).__name__} has a forward of its own"
        return SingleWeightQuantizer.refuse(self, layer, scheme)

    def discourage(self, layer: nn.Module, name: str) -> str | None:
        """Return that embeddings suffer most at low widths."""
        return "embeddings stay float below 8 bits unless asked for"

    def refuse_activation(self, layer: nn.Module, name: str, mode: str) -> str | None:
        """Return that there is nothing to quantize."""
        return "its inputs are indices"

    def layout(self, layer: nn.Module) -> Layout:
        """Return ``[1, num_embeddings, embedding_dim]``."""
        table = cast("nn.Embedding | nn.EmbeddingBag", layer)
        return Layout.grouped(weight_shape(layer, (table.num_embeddings, table.embedding_dim)))
