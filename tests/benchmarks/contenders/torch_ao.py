"""torch's own deprecated `torch.ao.quantization`: dynamic and FX."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from tests.benchmarks.contenders.contender import Made, Package, Task, saved_bytes
from tests.benchmarks.dynamic_peers import torch_dynamic

_ENGINES = ("x86", "onednn")


@contextmanager
def _engine(name: str) -> Iterator[None]:
    """Pack weights for one of torch's integer kernels; a packed layer stays with it."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def _dynamic(engine: str, *, per_channel: bool) -> Callable[[Task], Made]:
    def make(task: Task) -> Made:
        names = [name for name, layer in task.model.named_modules() if isinstance(layer, nn.Linear)]
        with _engine(engine):
            model = torch_dynamic(deepcopy(task.model), names, per_channel=per_channel)
        return Made(model, saved_bytes(model))

    return make


def _fx(engine: str) -> Callable[[Task], Made]:
    def make(task: Task) -> Made:
        ao: Any = importlib.import_module("torch.ao.quantization")
        fx: Any = importlib.import_module("torch.ao.quantization.quantize_fx")
        with _engine(engine):
            mapping = ao.get_default_qconfig_mapping(engine)
            prepared = fx.prepare_fx(deepcopy(task.model), mapping, (task.calibration[0],))
            for batch in task.calibration:
                prepared(batch)
            model = fx.convert_fx(prepared)
        return Made(model, saved_bytes(model))

    return make


PACKAGE = Package(
    "torch.ao",
    (),
    decoders={
        f"quantize_dynamic{' by channel' * per_channel}, {engine}": _dynamic(
            engine, per_channel=per_channel
        )
        for per_channel in (False, True)
        for engine in _ENGINES
    },
    convolutions={f"FX static, {engine}": _fx(engine) for engine in _ENGINES},
)
