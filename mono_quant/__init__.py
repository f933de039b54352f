"""Post-training quantization for PyTorch: smaller models, with the damage known.

Example:
    ``result = Quantizer().bits(4).skip("head").fit(data).apply(model)``
"""

import gc

_COLLECTING = gc.isenabled()
gc.disable()  # a full collection would walk all that torch holds, for as long as the imports take
try:
    from mono_quant.api import (
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
        Change,
        Checkpoint,
        Container,
        Correction,
        CorrectionContext,
        Edit,
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
        Target,
        Transform,
        TransformContext,
        WeightRecord,
    )
    from mono_quant.configurable import Configurable, register
    from mono_quant.errors import (
        CalibrationError,
        CheckpointError,
        ConfigurationError,
        CorruptCheckpointError,
        DamageError,
        FormatVersionError,
        InputError,
        MonoQuantError,
        UnknownKindError,
        UnsupportedLayerError,
    )
    from mono_quant.flow import Flow, integer_flow
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
    from mono_quant.modules import QuantizedLayer, SlowPathWarning, kernel_bytes
    from mono_quant.numerics.granularity import (
        Granularity,
        PerChannel,
        PerGroup,
        PerTensor,
        PerToken,
    )
    from mono_quant.numerics.metrics import sqnr_db
    from mono_quant.numerics.values import Layout, QParams, QTensor, WeightView
    from mono_quant.observers import (
        MSE,
        Auto,
        Entropy,
        Histogram,
        MinMax,
        MovingAverage,
        Percentile,
        create_observer,
    )
    from mono_quant.plan import GraphPlan, GraphResult, Plan
    from mono_quant.quantizer import GraphQuantizer, Quantizer
    from mono_quant.report import InputReport, LayerReport, Report
    from mono_quant.result import Outline, QuantizationResult, Validation
    from mono_quant.rounding import RoundToNearest
    from mono_quant.schemes import Affine, FloatCast
    from mono_quant.serializers import SafetensorsSerializer, TorchSerializer, read_state_dict
    from mono_quant.settings import Activations
    from mono_quant.speed import LayerSpeed, Speed
    from mono_quant.transforms import (
        AWQ,
        BiasCorrection,
        EqualizeLayers,
        FoldBatchNorm,
        SmoothQuant,
    )
    from mono_quant.version import __version__
finally:
    if _COLLECTING:
        gc.enable()

__all__ = [
    "AWQ",
    "MSE",
    "Activation",
    "Activations",
    "Affine",
    "Auto",
    "BareWeightQuantizer",
    "BiasCorrection",
    "CalibrationError",
    "Change",
    "Checkpoint",
    "CheckpointError",
    "Configurable",
    "ConfigurationError",
    "Container",
    "ConvQuantizer",
    "ConvTransposeQuantizer",
    "Correction",
    "CorrectionContext",
    "CorruptCheckpointError",
    "DamageError",
    "Edit",
    "EmbeddingQuantizer",
    "Entropy",
    "EqualizeLayers",
    "FloatCast",
    "Flow",
    "FoldBatchNorm",
    "FormatVersionError",
    "Granularity",
    "GraphPlan",
    "GraphQuantizer",
    "GraphResult",
    "Grid",
    "Histogram",
    "InputError",
    "InputReport",
    "Kernel",
    "KernelSpec",
    "LayerQuantizer",
    "LayerReport",
    "LayerSpeed",
    "Layout",
    "LinearLikeQuantizer",
    "LinearQuantizer",
    "MinMax",
    "MonoQuantError",
    "MovingAverage",
    "Observer",
    "Operation",
    "Outline",
    "PackedTensor",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "Percentile",
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
    "SmoothQuant",
    "Speed",
    "Statistic",
    "Statistics",
    "Target",
    "TorchSerializer",
    "Transform",
    "TransformContext",
    "UnknownKindError",
    "UnsupportedLayerError",
    "Validation",
    "WeightRecord",
    "WeightView",
    "__version__",
    "create_observer",
    "dequantize_model",
    "dynamic_quantize",
    "integer_flow",
    "kernel_bytes",
    "load_model",
    "quantize",
    "read_state_dict",
    "register",
    "save_model",
    "sqnr_db",
    "static_quantize",
    "validate_quantization",
]
