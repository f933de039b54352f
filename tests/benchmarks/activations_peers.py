"""Static W8A8 of EfficientNet-Lite0 by torch.ao FX, torchao's pt2e and ONNX Runtime."""

import importlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.benchmarks.activations_vision import (
    BATCH,
    calibration_images,
    logits,
    network,
    score,
)
from tests.benchmarks.contenders.plain import plain
from tests.benchmarks.measure import print_table

_OPSET = 17

Run = Callable[[Tensor], Tensor]


class Peer(NamedTuple):
    """One way of another package to calibrate and quantize a float model.

    Attributes:
        distribution: of the package.
        title: in the table.
        packages: that have to be importable.
        quantize: returns what runs in place of the model.
    """

    distribution: str
    title: str
    packages: tuple[str, ...]
    quantize: Callable[[nn.Module], Run]


def main() -> None:
    """Print how near each package comes to the float model."""
    columns = ("package", "setting", "SQNR, dB", "agreement")
    print_table(columns, _rows())


def _rows() -> Iterator[tuple[str, ...]]:
    model = plain(network(), calibration_images()[:1])
    for peer in PEERS:
        try:
            for package in peer.packages:
                importlib.import_module(package)
        except ImportError as reason:
            yield (peer.distribution, peer.title, f"skipped: {reason}", "")
            continue
        package = f"{peer.distribution} {metadata.version(peer.distribution)}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what other packages call themselves
            found = score(logits(peer.quantize(deepcopy(model))))
        yield (package, peer.title, *found.cells)


@torch.no_grad()
def _calibrate(model: Callable[[Tensor], object]) -> None:
    for batch in torch.split(calibration_images(), BATCH):
        model(batch)


def _fx(observer: str | None) -> Callable[[nn.Module], Run]:
    def quantize(model: nn.Module) -> Run:
        ao: Any = importlib.import_module("torch.ao.quantization")
        fx: Any = importlib.import_module("torch.ao.quantization.quantize_fx")
        mapping = ao.get_default_qconfig_mapping("x86")
        if observer is not None:
            config = ao.QConfig(
                activation=getattr(ao, observer).with_args(dtype=torch.quint8),
                weight=ao.default_per_channel_weight_observer,
            )
            mapping = mapping.set_global(config)
        prepared = fx.prepare_fx(model, mapping, (calibration_images()[:1],))
        _calibrate(prepared)
        converted: Run = fx.convert_fx(prepared)
        return converted

    return quantize


def _pt2e(model: nn.Module) -> Run:
    pt2e: Any = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
    x86: Any = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    dynamic = ({0: torch.export.Dim.AUTO},)
    example = (calibration_images()[:2],)
    captured = torch.export.export(model, example, dynamic_shapes=dynamic).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = pt2e.prepare_pt2e(captured, quantizer)
    _calibrate(prepared)
    converted: Run = pt2e.convert_pt2e(prepared)
    return converted


def _onnxruntime(method: str, **options: object) -> Callable[[nn.Module], Run]:
    def quantize(model: nn.Module) -> Run:
        runtime: Any = importlib.import_module("onnxruntime")
        tools: Any = importlib.import_module("onnxruntime.quantization")
        shapes: Any = importlib.import_module("onnxruntime.quantization.shape_inference")
        with tempfile.TemporaryDirectory(prefix="mono_quant_") as folder:
            path, ready, small = (str(Path(folder) / f"{name}.onnx") for name in "abc")
            torch.onnx.export(
                model,
                (calibration_images()[:2],),
                path,
                dynamo=False,
                opset_version=_OPSET,
                input_names=["images"],
                dynamic_axes={"images": {0: "batch"}},
            )
            shapes.quant_pre_process(path, ready)
            tools.quantize_static(
                ready,
                small,
                _reader(tools.CalibrationDataReader),
                calibrate_method=getattr(tools.CalibrationMethod, method),
                **options,
            )
            session = runtime.InferenceSession(small, providers=["CPUExecutionProvider"])

        def run(images: Tensor) -> Tensor:
            (found,) = session.run(None, {"images": images.numpy()})
            return torch.from_numpy(found)

        return run

    return quantize


def _reader(base: Any) -> object:
    """Return what hands ONNX Runtime one batch after the other, as a subclass of its class."""
    batches = iter(torch.split(calibration_images(), BATCH))

    def get_next(_: object) -> Mapping[str, object] | None:
        batch = next(batches, None)
        return None if batch is None else {"images": batch.numpy()}

    reader: object = type("Reader", (base,), {"get_next": get_next})()
    return reader


_ORT = ("onnx", "onnxruntime.quantization")
PEERS = (
    Peer("torch", "torch.ao FX, x86 defaults", ("torch.ao.quantization",), _fx(None)),
    Peer("torch", "torch.ao FX, MinMax", ("torch.ao.quantization",), _fx("MinMaxObserver")),
    Peer("torchao", "pt2e, X86InductorQuantizer", ("torchao.quantization.pt2e",), _pt2e),
    *(
        Peer(
            "onnxruntime",
            f"QDQ by channel, {method}",
            _ORT,
            _onnxruntime(method, per_channel=True),
        )
        for method in ("MinMax", "Percentile")
    ),
)
