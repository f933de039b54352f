"""What is done to the float model before it is quantized."""

from mono_quant.transforms.activation import Nonlinearity
from mono_quant.transforms.bias import BiasCorrection
from mono_quant.transforms.edits import repeat
from mono_quant.transforms.equalize import EqualizeLayers
from mono_quant.transforms.fold import FoldBatchNorm
from mono_quant.transforms.following import FollowingActivation, activations
from mono_quant.transforms.graph import Chain, Graph
from mono_quant.transforms.tracing import trace

__all__ = [
    "BiasCorrection",
    "Chain",
    "EqualizeLayers",
    "FoldBatchNorm",
    "FollowingActivation",
    "Graph",
    "Nonlinearity",
    "activations",
    "repeat",
    "trace",
]
