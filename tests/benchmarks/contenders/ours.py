"""This package's own ways."""

from collections.abc import Callable

import torch
from torch import nn

from mono_quant import Quantizer, kernel_bytes
from mono_quant.flow import integer_flow
from tests.benchmarks.contenders.contender import Made, Package, Task, compiled, saved_bytes

Way = Callable[[Task], Made]

_WIDTHS = {
    "INT8, dynamic": Quantizer().activations("dynamic"),
    "INT8, dynamic symmetric": Quantizer().activations("dynamic", symmetric=True),
    "INT8, dynamic of 7 bits": Quantizer().activations("dynamic", bits=7),
    "INT8, weights alone": Quantizer().activations(None),
    "INT4 g64, weights alone": Quantizer().bits(4).group_size(64),
    "INT4 g64, dynamic": Quantizer().bits(4).group_size(64).activations("dynamic"),
    "FP16": Quantizer().bits(16),
}


def _made(model: nn.Module, *, compile_it: bool = False) -> Made:
    size = saved_bytes(model)
    run = compiled(model) if compile_it else model

    def called(*args: torch.Tensor) -> torch.Tensor:
        result = run(*args)
        assert isinstance(result, torch.Tensor)
        return result

    beside = kernel_bytes(model)
    return Made(called, size + beside)


def _decoder(quantizer: Quantizer, *, compile_it: bool) -> Way:
    def make(task: Task) -> Made:
        chosen = quantizer.only(nn.Linear, *_tied(task.model))
        model = chosen.apply(task.model, progress=False).model
        return _made(model, compile_it=compile_it)

    return make


def _tied(model: nn.Module) -> list[nn.Module]:
    """Return embeddings whose weight is an output layer's, which stays float without them."""
    heads = {id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Linear)}
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, nn.Embedding) and id(layer.weight) in heads
    ]


def _floats(task: Task) -> Made:
    return _made(task.model, compile_it=True)


def _static(*, symmetric: bool = True, graph: bool = False, reference: bool = False) -> Way:
    def make(task: Task) -> Made:
        quantizer = Quantizer().symmetric(symmetric).activations("static")
        fitted = quantizer.fit(list(task.calibration))
        if graph and not reference:
            return _made(fitted.graph().apply(task.model, progress=False).model)
        kept = fitted.apply(task.model, progress=False).model
        return _made(integer_flow(kept, reference=True).model if reference else kept)

    return make


PACKAGE = Package(
    "mono_quant",
    (),
    decoders={
        "fp32, compiled": _floats,
        **{
            f"{title}{', compiled' * compile_it}": _decoder(quantizer, compile_it=compile_it)
            for title, quantizer in _WIDTHS.items()
            for compile_it in (False, True)
        },
    },
    convolutions={
        "INT8 static, class kept": _static(),
        "INT8 static, .graph()": _static(graph=True),
        "asymmetric weights, class kept": _static(symmetric=False),
        "asymmetric weights, .graph()": _static(symmetric=False, graph=True),
        "asymmetric weights, .graph(), products in float": _static(
            symmetric=False, graph=True, reference=True
        ),
    },
)
