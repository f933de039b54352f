"""One call for the common cases, each a thin line over the builder."""

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import cast, overload

from torch import Tensor, nn

from mono_quant.base import LayerQuantizer, RangeEstimator, Serializer
from mono_quant.calibration import CalibrationData, Forward
from mono_quant.checkpoint import (
    ModelT,
    check_quantized,
    copy_structure,
    dequantized,
    rebuild,
    to_checkpoint,
)
from mono_quant.configurable import Kinds
from mono_quant.errors import InputError
from mono_quant.modules import BareModule
from mono_quant.numerics.granularity import Granularity
from mono_quant.numerics.values import QTensor
from mono_quant.quantizer import Quantizer
from mono_quant.result import QuantizationResult, Validation, validate
from mono_quant.selection import Selector
from mono_quant.serializers import read_state_dict, serializer_for

Path_ = str | PathLike[str]


@overload
def quantize(
    model: ModelT,
    bits: int = 8,
    *,
    dynamic: bool = False,
    data: object = None,
    samples: int = 150,
    forward: Forward | None = None,
    symmetric: bool | None = None,
    granularity: Granularity | str | None = None,
    group_size: int | None = None,
    observer: RangeEstimator | str | None = None,
    skip: tuple[Selector, ...] | list[Selector] = (),
    only: tuple[Selector, ...] | list[Selector] = (),
) -> QuantizationResult[ModelT]: ...
@overload
def quantize(
    model: Mapping[str, Tensor] | Path_,
    bits: int = 8,
    *,
    dynamic: bool = False,
    data: object = None,
    samples: int = 150,
    forward: Forward | None = None,
    symmetric: bool | None = None,
    granularity: Granularity | str | None = None,
    group_size: int | None = None,
    observer: RangeEstimator | str | None = None,
    skip: tuple[Selector, ...] | list[Selector] = (),
    only: tuple[Selector, ...] | list[Selector] = (),
) -> QuantizationResult[BareModule]: ...
def quantize(
    model: ModelT | Mapping[str, Tensor] | Path_,
    bits: int = 8,
    *,
    dynamic: bool = False,
    data: object = None,
    samples: int = 150,
    forward: Forward | None = None,
    symmetric: bool | None = None,
    granularity: Granularity | str | None = None,
    group_size: int | None = None,
    observer: RangeEstimator | str | None = None,
    skip: tuple[Selector, ...] | list[Selector] = (),
    only: tuple[Selector, ...] | list[Selector] = (),
) -> QuantizationResult[ModelT] | QuantizationResult[BareModule]:
    """Return a quantized model with the evidence; the given one is not changed.

    Args:
        model: a module, a state dict, or the path of a float checkpoint (.safetensors, .pt, .pth).
        bits: 2 to 8, or 16 for a cast.
        dynamic: quantize the inputs of layers as they come, at any width; data then only measures.
        data: batches to calibrate and measure on, as `Quantizer.fit` takes them.
        samples: how many samples of the data to use.
        forward: calls the model with a batch.
        symmetric: by default, symmetric at 8 bits and asymmetric below.
        granularity: "tensor", "channel", "group" or an object.
        group_size: values that share one scale.
        observer: how the range of weights is found; an object, or a name as in `create_observer`.
        skip: layers to leave in float.
        only: if not empty, the only layers to quantize.

    Raises:
        InputError: the model or the data cannot be used.
        ConfigurationError: the settings contradict each other.
    """
    quantizer = Quantizer().bits(bits).skip(*skip).only(*only)
    if dynamic:
        quantizer = quantizer.activations("dynamic")
    if symmetric is not None:
        quantizer = quantizer.symmetric(symmetric)
    if granularity is not None:
        quantizer = quantizer.granularity(granularity)
    if group_size is not None:
        quantizer = quantizer.group_size(group_size)
    if observer is not None:
        quantizer = quantizer.observer(observer)
    if data is not None:
        quantizer = quantizer.fit(data, samples=samples, forward=forward)
    if isinstance(model, str | PathLike):
        result = quantizer.apply(read_state_dict(Path(model)))
        for parameter in result.model.parameters():
            parameter.data = parameter.data.clone()  # else it would stay in the mapped file
        return result
    if isinstance(model, nn.Module):
        return quantizer.apply(model)
    return quantizer.apply(model)


def dynamic_quantize(model: ModelT) -> QuantizationResult[ModelT]:
    """Return the model at 8 bits, the inputs of its layers quantized on the fly, row by row."""
    return quantize(model, 8, dynamic=True)


def static_quantize(
    model: ModelT, data: object, *, samples: int = 150, forward: Forward | None = None
) -> QuantizationResult[ModelT]:
    """Return the model at 8 bits, the inputs of its layers quantized on ranges of `data`."""
    if data is None:
        raise InputError("static_quantize calibrates on data, and None was given")
    return quantize(model, 8, data=data, samples=samples, forward=forward)


def dequantize_model(model: ModelT) -> ModelT:
    """Return a float copy of a quantized model, its weights on the grid."""
    check_quantized(model)
    return dequantized(copy_structure(model))


def save_model(model: nn.Module, path: Path_, *, serializer: Serializer | None = None) -> Path:
    """Write a quantized model to a file, whose suffix chooses the format, and return its path.

    `QuantizationResult.save` also writes the quantizer's configuration and the report's figures.
    """
    check_quantized(model)
    path = Path(path)
    (serializer or serializer_for(path)).save(to_checkpoint(model), path)
    return path


@overload
def load_model(
    path: Path_,
    model: ModelT,
    *,
    kinds: Kinds | None = None,
    layers: tuple[LayerQuantizer, ...] = (),
    serializer: Serializer | None = None,
) -> ModelT: ...
@overload
def load_model(
    path: Path_,
    model: Callable[[], ModelT],
    *,
    kinds: Kinds | None = None,
    layers: tuple[LayerQuantizer, ...] = (),
    serializer: Serializer | None = None,
) -> ModelT: ...
@overload
def load_model(
    path: Path_,
    model: None = None,
    *,
    kinds: Kinds | None = None,
    layers: tuple[LayerQuantizer, ...] = (),
    serializer: Serializer | None = None,
) -> dict[str, QTensor | Tensor]: ...
def load_model(
    path: Path_,
    model: ModelT | Callable[[], ModelT] | None = None,
    *,
    kinds: Kinds | None = None,
    layers: tuple[LayerQuantizer, ...] = (),
    serializer: Serializer | None = None,
) -> ModelT | dict[str, QTensor | Tensor]:
    """Return the quantized model of a file, bit for bit as it was saved.

    Args:
        path: the file; its suffix says the format.
        model: a float model of the architecture, filled and turned into the quantized one in place
            (it may be on the meta device, so that no float weight ever exists; otherwise the result
            lies where the float model did); or a function that makes one; or nothing, for a
            dictionary of quantized and float tensors by name.
        kinds: classes of your own that the file names, by their kind.
        layers: further layer quantizers to ask.
        serializer: a format of your own.

    Raises:
        CheckpointError: the file is not whole, not ours, too new, or does not fit the model.
        UnsupportedLayerError: no layer quantizer knows a layer of the model.
    """
    path = Path(path)
    checkpoint = (serializer or serializer_for(path)).load(path, kinds=kinds)
    if model is None:
        quantized = {key: record.weight.unpack() for key, record in checkpoint.records.items()}
        return {**checkpoint.tensors, **quantized}
    if isinstance(model, nn.Module):
        skeleton = cast("ModelT", model)  # mypy keeps "a module that is also a factory" in mind
        return rebuild(skeleton, checkpoint, layers=layers, kinds=kinds)
    if not callable(model):
        raise InputError(
            f"a {type(model).__name__} is no model: give a torch.nn.Module or a function that "
            "makes one"
        )
    made = model()
    if not isinstance(made, nn.Module):
        raise InputError(f"the factory returned a {type(made).__name__}, where a module was meant")
    return rebuild(made, checkpoint, layers=layers, kinds=kinds)


def validate_quantization(model: nn.Module, example: object = None) -> Validation:
    """Save a quantized model, load it into a fresh one, run both on `example`, and compare.

    Args:
        model: a quantized model, or the `model` of a result.
        example: a batch, as `Quantizer.fit` takes them; without one the answer is at best
            "reloaded, not run".
    """
    data = CalibrationData.example(example) if example is not None else None
    return validate(model, data)
