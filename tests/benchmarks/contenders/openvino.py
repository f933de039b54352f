"""OpenVINO on one thread, its models compressed or quantized by nncf."""

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.contenders.contender import Made, Package, Task

Change = Callable[[Any, Any, Task], Any]
"""Returns what nncf makes of a model."""


def _made(task: Task, change: Change | None, *, exact: bool = False) -> Made:
    openvino: Any = importlib.import_module("openvino")
    (example, *_) = max(task.workloads.values(), key=lambda args: args[0].numel())
    model = openvino.convert_model(task.model, example_input=example)
    shape = [-1, -1] if example.dim() == 2 else [-1, *example.shape[1:]]
    model.reshape(shape)
    if change is not None:
        model = change(importlib.import_module("nncf"), model, task)
    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    if exact:
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    program = openvino.Core().compile_model(model, "CPU", settings)
    precision = program.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    with tempfile.TemporaryDirectory(prefix="mono_quant_") as folder:
        path = Path(folder) / "model.xml"
        openvino.save_model(model, path, compress_to_fp16=False)
        size = path.with_suffix(".bin").stat().st_size
    output = program.output(0)

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(program([x.contiguous().numpy()])[output])

    return Made(run, size, note=f"floats are {precision}", most_arguments=1)


def _compressed(mode: str, **options: object) -> Change:
    def change(nncf: Any, model: Any, _: Task) -> Any:
        return nncf.compress_weights(model, mode=getattr(nncf.CompressWeightsMode, mode), **options)

    return change


def _calibrated(nncf: Any, model: Any, task: Task) -> Any:
    batches = [batch.contiguous().numpy() for batch in task.calibration]
    return nncf.quantize(model, nncf.Dataset(batches))


def _with(change: Change | None, *, exact: bool = False) -> Callable[[Task], Made]:
    return lambda task: _made(task, change, exact=exact)


PACKAGE = Package(
    "openvino",
    ("openvino==2026.4.1", "nncf==3.4.0"),
    decoders={
        "fp32": _with(None, exact=True),
        "INT8": _with(_compressed("INT8_SYM"), exact=True),
        "INT4 g64": _with(_compressed("INT4_ASYM", group_size=64, ratio=1.0), exact=True),
        "INT8, its default floats": _with(_compressed("INT8_SYM")),
        "INT4 g64, its default floats": _with(_compressed("INT4_ASYM", group_size=64, ratio=1.0)),
    },
    convolutions={
        "fp32": _with(None, exact=True),
        "INT8 static": _with(_calibrated, exact=True),
        "INT8 static, its default floats": _with(_calibrated),
    },
)
