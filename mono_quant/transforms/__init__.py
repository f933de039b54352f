"""What is done to the float model before it is quantized."""

from mono_quant.transforms.activation import Nonlinearity
from mono_quant.transforms.awq import AWQ
from mono_quant.transforms.bias import BiasCorrection
from mono_quant.transforms.edits import repeat
from mono_quant.transforms.equalize import EqualizeLayers
from mono_quant.transforms.fold import FoldBatchNorm
from mono_quant.transforms.following import FollowingActivation, activations
from mono_quant.transforms.graph import Chain, Graph, Reach
from mono_quant.transforms.groups import Group
from mono_quant.transforms.objective import Consumer
from mono_quant.transforms.rotate import Rotate
from mono_quant.transforms.scaling import InputScaling
from mono_quant.transforms.smooth import SmoothQuant
from mono_quant.transforms.tracing import trace
from mono_quant.transforms.tune import TuneScales

__all__ = [
    "AWQ",
    "BiasCorrection",
    "Chain",
    "Consumer",
    "EqualizeLayers",
    "FoldBatchNorm",
    "FollowingActivation",
    "Graph",
    "Group",
    "InputScaling",
    "Nonlinearity",
    "Reach",
    "Rotate",
    "SmoothQuant",
    "TuneScales",
    "activations",
    "repeat",
    "trace",
]
