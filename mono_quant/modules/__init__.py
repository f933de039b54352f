"""Layers with quantized weights: subclasses of the float layers they stand for."""

from mono_quant.modules.attention import CallingMultiheadAttention, QuantizedMultiheadAttention
from mono_quant.modules.bare import BareModule, QuantizedBareModule, tree_of
from mono_quant.modules.conv import (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvTranspose1d,
    QuantizedConvTranspose2d,
    QuantizedConvTranspose3d,
)
from mono_quant.modules.embedding import QuantizedEmbedding, QuantizedEmbeddingBag
from mono_quant.modules.layer import (
    QuantizedLayer,
    SlowPathWarning,
    convert,
    kernels_run,
    taken_name,
    tie,
)
from mono_quant.modules.linear import QuantizedBilinear, QuantizedLinear, QuantizedLinearLike
from mono_quant.modules.recurrent import (
    QuantizedGRU,
    QuantizedLSTM,
    QuantizedRecurrent,
    QuantizedRNN,
)
from mono_quant.modules.recurrent_cell import (
    QuantizedGRUCell,
    QuantizedLSTMCell,
    QuantizedRNNCell,
)
from mono_quant.modules.weight import QuantizedInput, QuantizedWeight, kernel_bytes

__all__ = [
    "BareModule",
    "CallingMultiheadAttention",
    "QuantizedBareModule",
    "QuantizedBilinear",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedConv3d",
    "QuantizedConvTranspose1d",
    "QuantizedConvTranspose2d",
    "QuantizedConvTranspose3d",
    "QuantizedEmbedding",
    "QuantizedEmbeddingBag",
    "QuantizedGRU",
    "QuantizedGRUCell",
    "QuantizedInput",
    "QuantizedLSTM",
    "QuantizedLSTMCell",
    "QuantizedLayer",
    "QuantizedLinear",
    "QuantizedLinearLike",
    "QuantizedMultiheadAttention",
    "QuantizedRNN",
    "QuantizedRNNCell",
    "QuantizedRecurrent",
    "QuantizedWeight",
    "SlowPathWarning",
    "convert",
    "kernel_bytes",
    "kernels_run",
    "taken_name",
    "tie",
    "tree_of",
]
