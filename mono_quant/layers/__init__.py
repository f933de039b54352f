"""How each kind of layer is read and replaced."""

from mono_quant.base import Container, LayerQuantizer
from mono_quant.layers.attention import AttentionQuantizer
from mono_quant.layers.bare import BareWeightQuantizer
from mono_quant.layers.containers import MultiheadAttentionContainer, TransformerEncoderContainer
from mono_quant.layers.conv import ConvQuantizer, ConvTransposeQuantizer
from mono_quant.layers.embedding import EmbeddingQuantizer
from mono_quant.layers.linear import BilinearQuantizer, LinearLikeQuantizer, LinearQuantizer
from mono_quant.layers.recurrent import RecurrentCellQuantizer, RecurrentQuantizer
from mono_quant.layers.single import SingleWeightQuantizer

BUILT_IN_LAYERS: tuple[LayerQuantizer, ...] = (
    LinearQuantizer(),
    BilinearQuantizer(),
    ConvQuantizer(),
    ConvTransposeQuantizer(),
    EmbeddingQuantizer(),
    AttentionQuantizer(),
    LinearLikeQuantizer("transformers.pytorch_utils.Conv1D", transposed=True),
    RecurrentQuantizer(),
    RecurrentCellQuantizer(),
    BareWeightQuantizer(),
)
"""The kinds of layer that are known without being told, asked in this order."""

BUILT_IN_CONTAINERS: tuple[Container, ...] = (
    MultiheadAttentionContainer(),
    TransformerEncoderContainer(),
)
"""The containers that are known without being told."""

__all__ = [
    "BUILT_IN_CONTAINERS",
    "BUILT_IN_LAYERS",
    "AttentionQuantizer",
    "BareWeightQuantizer",
    "BilinearQuantizer",
    "ConvQuantizer",
    "ConvTransposeQuantizer",
    "EmbeddingQuantizer",
    "LinearLikeQuantizer",
    "LinearQuantizer",
    "MultiheadAttentionContainer",
    "RecurrentCellQuantizer",
    "RecurrentQuantizer",
    "SingleWeightQuantizer",
    "TransformerEncoderContainer",
]
