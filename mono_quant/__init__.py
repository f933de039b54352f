"""Post-training quantization for PyTorch: smaller models, with the damage known.

Example:
    ``result = Quantizer().bits(4).skip("head").fit(data).apply(model)``
"""

from mono_quant.api import (
    create_observer,
    dequantize_model,
    dynamic_quantize,
    load_model,
    quantize,
    save_model,
    static_quantize,
    validate_quantization,
)
from mono_quant.base import (
    Activation,
    Checkpoint,
    Container,
    Grid,
    Kernel,
    KernelSpec,
    LayerQuantizer,
    Observer,
    Operation,
    PackedTensor,
    QuantizedModule,
    RangeEstimator,
    Rounding,
    Scheme,
    Serializer,
    Statistic,
    Statistics,
    Transform,
    WeightRecord,
)
from mono_quant.configurable import Configurable, register
from mono_quant.errors import (
    CalibrationError,
    CheckpointError,
    ConfigurationError,
    CorruptCheckpointError,
    FormatVersionError,
    InputError,
    MonoQuantError,
    UnknownKindError,
    UnsupportedLayerError,
)
from mono_quant.layers import (
    BareWeightQuantizer,
    ConvQuantizer,
    ConvTransposeQuantizer,
    EmbeddingQuantizer,
    LinearLikeQuantizer,
    LinearQuantizer,
    RecurrentCellQuantizer,
    RecurrentQuantizer,
)
from mono_quant.modules import QuantizedLayer, SlowPathWarning
from mono_quant.numerics.granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from mono_quant.numerics.metrics import sqnr_db
from mono_quant.numerics.values import Layout, QParams, QTensor, WeightView
from mono_quant.observers import MSE, MinMax
from mono_quant.plan import Plan
from mono_quant.quantizer import Quantizer
from mono_quant.report import LayerReport, Report
from mono_quant.result import Outline, QuantizationResult, Validation
from mono_quant.rounding import RoundToNearest
from mono_quant.schemes import Affine, FloatCast
from mono_quant.serializers import SafetensorsSerializer, TorchSerializer, read_state_dict
from mono_quant.settings import Activations
from mono_quant.version import __version__

__all__ = [
    "MSE",
    "Activation",
    "Activations",
    "Affine",
    "BareWeightQuantizer",
    "CalibrationError",
    "Checkpoint",
    "CheckpointError",
    "Configurable",
    "ConfigurationError",
    "Container",
    "ConvQuantizer",
    "ConvTransposeQuantizer",
    "CorruptCheckpointError",
    "EmbeddingQuantizer",
    "FloatCast",
    "FormatVersionError",
    "Granularity",
    "Grid",
    "InputError",
    "Kernel",
    "KernelSpec",
    "LayerQuantizer",
    "LayerReport",
    "Layout",
    "LinearLikeQuantizer",
    "LinearQuantizer",
    "MinMax",
    "MonoQuantError",
    "Observer",
    "Operation",
    "Outline",
    "PackedTensor",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "Plan",
    "QParams",
    "QTensor",
    "QuantizationResult",
    "QuantizedLayer",
    "QuantizedModule",
    "Quantizer",
    "RangeEstimator",
    "RecurrentCellQuantizer",
    "RecurrentQuantizer",
    "Report",
    "RoundToNearest",
    "Rounding",
    "SafetensorsSerializer",
    "Scheme",
    "Serializer",
    "SlowPathWarning",
    "Statistic",
    "Statistics",
    "TorchSerializer",
    "Transform",
    "UnknownKindError",
    "UnsupportedLayerError",
    "Validation",
    "WeightRecord",
    "WeightView",
    "__version__",
    "create_observer",
    "dequantize_model",
    "dynamic_quantize",
    "load_model",
    "quantize",
    "read_state_dict",
    "register",
    "save_model",
    "sqnr_db",
    "static_quantize",
    "validate_quantization",
]
