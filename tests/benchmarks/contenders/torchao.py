"""torchao: dynamic, weights alone, and pt2e through inductor."""

import importlib
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from tests.benchmarks.contenders.contender import Made, Package, Task, compiled, saved_bytes
from tests.benchmarks.contenders.plain import apart

_GROUP = 64


def _dynamic(quantization: Any) -> object:
    config: object = quantization.Int8DynamicActivationInt8WeightConfig()
    return config


def _int8(quantization: Any) -> object:
    config: object = quantization.Int8WeightOnlyConfig()
    return config


def _int4(quantization: Any) -> object:
    config: object = quantization.IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, "int4"),  # noqa: B009  # not in torch's own stubs
        granularity=quantization.PerGroup(_GROUP),
        mapping_type=quantization.MappingType.ASYMMETRIC,
    )
    return config


def _prototype(name: str) -> Callable[[Any], object]:
    def config(_: Any) -> object:
        prototype: Any = importlib.import_module(
            "torchao.prototype.quantization.int4.inference_workflow"
        )
        found: object = getattr(prototype, name)(group_size=_GROUP)
        return found

    return config


class _InHalf(nn.Module):
    """A Linear layer in bfloat16 between floats: some kernels know nothing else."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.to(torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(x.to(torch.bfloat16))
        return result.to(x.dtype)


def _decoder(
    config: Callable[[Any], object], *, compile_it: bool, in_half: bool
) -> Callable[[Task], Made]:
    def make(task: Task) -> Made:
        quantization: Any = importlib.import_module("torchao.quantization")
        model = deepcopy(task.model)
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear):
                layer.weight = nn.Parameter(layer.weight.detach())  # where tied, by itself
                if in_half:
                    model.set_submodule(name, _InHalf(layer))
        quantization.quantize_(model, config(quantization))
        return Made(compiled(model) if compile_it else model, saved_bytes(model))

    return make


def _pt2e(task: Task) -> Made:
    pt2e: Any = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
    x86: Any = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    dynamic = ({0: torch.export.Dim.AUTO},)
    example = (task.calibration[0][:2],)
    captured = torch.export.export(apart(task.model), example, dynamic_shapes=dynamic).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = pt2e.prepare_pt2e(captured, quantizer)
    for batch in task.calibration:
        prepared(batch)
    model = pt2e.convert_pt2e(prepared)
    inductor: Any = importlib.import_module("torch._inductor.config")
    inductor.freezing = True  # its lowering to integer operators wants constants
    state = model.state_dict()  # with the floats that it no longer reads
    read = {str(node.target) for node in model.graph.nodes if node.op == "get_attr"}
    return Made(compiled(model), sum(state[name].nbytes for name in read & set(state)))


PACKAGE = Package(
    "torchao",
    ("torchao==0.18.0",),
    decoders={
        f"{title}{', compiled' * compile_it}": _decoder(
            config, compile_it=compile_it, in_half=in_half
        )
        for title, config, in_half in (
            ("INT8, dynamic", _dynamic, False),
            ("INT8, weights alone", _int8, False),
            ("INT4 g64, weights alone", _int4, False),
            (
                "INT4 g64, weights alone, prototype, bf16",
                _prototype("PrototypeInt4WeightOnlyConfig"),
                True,
            ),
            (
                "INT4 g64, INT8 dynamic inputs, prototype",
                _prototype("Int8DynamicActivationInt4WeightConfig"),
                False,
            ),
        )
        for compile_it in (False, True)
    },
    convolutions={"pt2e static, inductor, frozen": _pt2e},
)
