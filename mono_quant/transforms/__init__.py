"""What is done to the float model before it is quantized."""

from mono_quant.transforms.activation import Activation
from mono_quant.transforms.edits import repeat
from mono_quant.transforms.fold import FoldBatchNorm
from mono_quant.transforms.graph import Chain, Graph
from mono_quant.transforms.tracing import trace

__all__ = [
    "Activation",
    "Chain",
    "FoldBatchNorm",
    "Graph",
    "repeat",
    "trace",
]
