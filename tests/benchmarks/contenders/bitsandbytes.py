"""bitsandbytes: LLM.int8() and NF4."""

import importlib
from copy import deepcopy
from typing import Any

from torch import nn

from tests.benchmarks.contenders.contender import Made, Package, Task, saved_bytes


def _with(task: Task, kind: str) -> Made:
    modules: Any = importlib.import_module("bitsandbytes.nn")
    model = deepcopy(task.model)
    layers = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear)}
    for name, layer in layers.items():
        bias = layer.bias is not None
        weight = layer.weight.detach().clone()
        replaced: Any
        if kind == "int8":
            replaced = modules.Linear8bitLt(
                layer.in_features, layer.out_features, bias, has_fp16_weights=False
            )
            replaced.weight = modules.Int8Params(
                weight, requires_grad=False, has_fp16_weights=False
            )
        else:
            replaced = modules.Linear4bit(
                layer.in_features, layer.out_features, bias, quant_type=kind
            )
            replaced.weight = modules.Params4bit(weight, requires_grad=False, quant_type=kind)
        model.set_submodule(name, replaced.to("cpu"))
    return Made(model, saved_bytes(model))


PACKAGE = Package(
    "bitsandbytes",
    ("bitsandbytes==0.50.2",),
    decoders={
        "LLM.int8()": lambda task: _with(task, "int8"),
        "NF4 g64, weights alone": lambda task: _with(task, "nf4"),
    },
)
