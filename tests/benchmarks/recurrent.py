"""Speed and SQNR of LSTMs and GRUs over the float layer, beside torch.ao's dynamic ones."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from mono_quant import Quantizer, kernels
from mono_quant.modules import kernels_run
from tests.benchmarks.measure import median_seconds, one_thread, print_table, sqnr

LAYERS: dict[str, tuple[type[nn.LSTM | nn.GRU], int, int, int]] = {
    "LSTM 256, B=1, T=32": (nn.LSTM, 256, 1, 32),
    "LSTM 256, B=1, T=256": (nn.LSTM, 256, 1, 256),
    "LSTM 512, B=8, T=64": (nn.LSTM, 512, 8, 64),
    "LSTM 1024, B=1, T=32": (nn.LSTM, 1024, 1, 32),
    "GRU 512, B=8, T=64": (nn.GRU, 512, 8, 64),
    "GRU 1024, B=1, T=32": (nn.GRU, 1024, 1, 32),
}
"""Class, units and width of inputs, samples, steps."""

OURS = {
    "INT8, static inputs": Quantizer().activations("static"),
    "INT8, dynamic inputs": Quantizer().activations("dynamic"),
    "INT8, float inputs": Quantizer().activations(None),
    "FP16": Quantizer().bits(16),
}
PEERS = {"torch.ao INT8 dynamic": torch.qint8, "torch.ao FP16 dynamic": torch.float16}
TURNS = 15


def main() -> None:
    """Print how many times faster than float each setting is, and how close."""
    print("Ratios over the float32 layer by processor time: medians over turns. 'steps' is the")
    print("kernel that multiplies h, as a first call here picks it.\n")
    columns = ("setting", *LAYERS)
    with torch.no_grad(), one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao says that it will move
        print_table(columns, _rows())


def _rows() -> Iterator[tuple[str, ...]]:
    cells: dict[str, list[str]] = {}
    for make, units, samples, steps in LAYERS.values():
        torch.manual_seed(0)
        source = make(units, units)
        x = torch.randn(steps, samples, units)
        models = {title: _ours(quantizer, source, x) for title, quantizer in OURS.items()}
        models |= {title: _peer(source, dtype) for title, dtype in PEERS.items()}
        ran = {title: _steps(model, x) for title, model in models.items()}
        calls: list[Callable[[], object]] = [partial(one, x) for one in (source, *models.values())]
        for call in calls:
            call()
        base, *taken = median_seconds(calls, TURNS)
        for (title, model), seconds in zip(models.items(), taken, strict=True):
            decibels = sqnr([_output(source, x)], [_output(model, x)])
            told = f"{base / seconds:.2f} at {decibels:.0f} dB{ran[title]}"
            cells.setdefault(title, []).append(told)
    for title, row in cells.items():
        yield (title, *row)


def _ours(quantizer: Quantizer, source: nn.RNNBase, x: Tensor) -> nn.Module:
    fitted = quantizer.fit([x]) if quantizer is OURS["INT8, static inputs"] else quantizer
    return fitted.apply(source, progress=False).model


def _peer(source: nn.RNNBase, dtype: torch.dtype) -> nn.Module:
    model: nn.Sequential = torch.ao.quantization.quantize_dynamic(  # type: ignore[no-untyped-call]  # torch leaves it untyped
        nn.Sequential(source), {type(source)}, dtype=dtype
    )
    return model[0]


def _steps(model: nn.Module, x: Tensor) -> str:
    with kernels.use(None), kernels_run() as ran:
        model(x)
    names = [name for (_, weight), name in ran.items() if weight == "weight_hh_l0"]
    return f", {names[0]}" if names else ""


def _output(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)[0]
    assert isinstance(output, Tensor)
    return output
