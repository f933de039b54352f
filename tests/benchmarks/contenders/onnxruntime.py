"""ONNX Runtime on one thread: dynamic INT8, MatMulNBits, and static QDQ."""

import importlib
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.contenders.contender import Made, Package, Task

_OPSET = 17
_INPUT = "input"

Change = Callable[[str, str, Task], None]
"""Reads the model of the first file and writes that of the second."""


def _made(task: Task, change: Change | None) -> Made:
    runtime: Any = importlib.import_module("onnxruntime")
    (example, *_) = max(task.workloads.values(), key=lambda args: args[0].numel())
    axes = {_INPUT: {0: "batch", 1: "tokens"} if example.dim() == 2 else {0: "batch"}}
    with tempfile.TemporaryDirectory(prefix="mono_quant_") as folder:
        path, small = (str(Path(folder) / name) for name in ("float.onnx", "small.onnx"))
        torch.onnx.export(
            task.model,
            (example,),
            path,
            dynamo=False,
            opset_version=_OPSET,
            input_names=[_INPUT],
            dynamic_axes=axes,
        )
        if change is None:
            small = path
        else:
            change(path, small, task)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = runtime.InferenceSession(small, options, providers=["CPUExecutionProvider"])
        size = sum(one.stat().st_size for one in Path(folder).glob(f"{Path(small).name}*"))

    def run(x: Tensor) -> Tensor:
        (found,) = session.run(None, {_INPUT: x.contiguous().numpy()})
        return torch.from_numpy(found)

    return Made(run, size, most_arguments=1)


def _dynamic(path: str, small: str, _: Task, *, per_channel: bool) -> None:
    tools: Any = importlib.import_module("onnxruntime.quantization")
    tools.quantize_dynamic(path, small, per_channel=per_channel, weight_type=tools.QuantType.QInt8)


def _four_bits(path: str, small: str, _: Task, *, accuracy: int) -> None:
    onnx: Any = importlib.import_module("onnx")
    nbits: Any = importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer")
    quantizer = nbits.MatMulNBitsQuantizer(
        onnx.load(path), bits=4, block_size=64, is_symmetric=False, accuracy_level=accuracy
    )
    quantizer.process()
    quantizer.model.save_model_to_file(small, use_external_data_format=False)


def _static(path: str, small: str, task: Task) -> None:
    tools: Any = importlib.import_module("onnxruntime.quantization")
    shapes: Any = importlib.import_module("onnxruntime.quantization.shape_inference")
    ready = f"{path}.ready"
    shapes.quant_pre_process(path, ready)
    batches = iter(task.calibration)

    def get_next(_: object) -> Mapping[str, object] | None:
        batch = next(batches, None)
        return None if batch is None else {_INPUT: batch.contiguous().numpy()}

    reader = type("Reader", (tools.CalibrationDataReader,), {"get_next": get_next})()
    unsigned = tools.QuantType.QUInt8  # what its fast products take on x86
    tools.quantize_static(ready, small, reader, per_channel=True, activation_type=unsigned)


def _with(change: Change | None) -> Callable[[Task], Made]:
    return lambda task: _made(task, change)


PACKAGE = Package(
    "onnxruntime",
    ("onnxruntime==1.31.1", "onnx==1.23.2", "onnx_ir==1.1.0"),
    decoders={
        "fp32": _with(None),
        "INT8, dynamic": _with(partial(_dynamic, per_channel=False)),
        "INT8, dynamic by channel": _with(partial(_dynamic, per_channel=True)),
        "INT4 g64, MatMulNBits, accuracy 4": _with(partial(_four_bits, accuracy=4)),
        "INT4 g64, MatMulNBits, accuracy 1": _with(partial(_four_bits, accuracy=1)),
    },
    convolutions={"fp32": _with(None), "INT8 static, QDQ by channel": _with(_static)},
)
