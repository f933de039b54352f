"""Speed of each kernel over the float layer, by setting and batch, with cold weights."""

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import cycle, repeat

import torch
from torch import Tensor, nn
from torch.nn import functional

from mono_quant import QuantizedLayer, Quantizer, Rotate, kernels
from mono_quant.base import KernelSpec
from mono_quant.kernels import store
from mono_quant.operations import MatrixProduct
from tests.benchmarks.measure import least_seconds, one_thread, print_table

SIZE = 4096
BATCHES = (1, 8, 64, 512)
REPEATS = {1: 40, 8: 25, 64: 13, 512: 7}
_COLD = 256e6  # bytes of weights that take turns, so that each comes from memory
_MOST = 12

CONVOLUTIONS = {
    "3x3, 64 to 64 of 56x56": (64, 64, 56, 3),
    "3x3, 128 to 128 of 28x28": (128, 128, 28, 3),
    "3x3, 256 to 256 of 14x14": (256, 256, 14, 3),
    "3x3, 512 to 512 of 7x7": (512, 512, 7, 3),
    "1x1, 256 to 64 of 56x56": (256, 64, 56, 1),
    "1x1, 96 to 576 of 14x14": (96, 576, 14, 1),
}
IMAGES = (1, 8)
TURNS, SMALL_TURNS = 9, 99

SMALL = ((10, 1024), (64, 64), (256, 128))
"""Rows and columns of weights that only kernels of few calls gain from."""

TURNED = (1024, 4096)
"""Rows and columns of layers whose inputs are turned."""

SETTINGS = {
    "INT8, dynamic asymmetric inputs": Quantizer(),
    "INT8, dynamic symmetric inputs": Quantizer().activations("dynamic", symmetric=True),
    "INT8, dynamic inputs of 7 bits": Quantizer().activations("dynamic", bits=7),
    "INT8, static inputs": Quantizer().activations("static"),
    "INT8, float inputs": Quantizer().activations(None),
    "INT4 g64, float inputs": Quantizer().bits(4),
    "INT4 g64, dynamic inputs": Quantizer().bits(4).activations("dynamic"),
    "INT3 g64, float inputs": Quantizer().bits(3),
    "FP16": Quantizer().bits(16),
}
"""What is measured; of each weight there is one copy."""


def main() -> None:
    """Print how many times faster than float each kernel is."""
    print(f"Linear of {SIZE} x {SIZE}, ratio over the float32 layer by processor time: least of")
    print(
        "interleaved runs, weights from memory. 'chosen' is what a first call here picks, 'of two"
    )
    print("orders' what it picks otherwise where memory is double.")
    print(f"Findings on this machine: {store.machine()}\n")
    columns = ("setting", "kernel", *(f"M={batch}" for batch in BATCHES))
    with torch.no_grad(), one_thread():
        print_table(columns, _rows())
    print("Small Linear layers, ratio over the float32 layer, weights in the cache:\n")
    columns = ("rows x columns", "setting", "kernel", *(f"M={batch}" for batch in BATCHES))
    with torch.no_grad(), one_thread():
        print_table(columns, _small())
    print("Square Linear layers whose inputs are turned by Rotate(), time over that of the same")
    print("layers without, weights in the cache:\n")
    columns = ("size", "setting", *(f"M={batch}" for batch in BATCHES))
    with torch.no_grad(), one_thread():
        print_table(columns, _turned())
    print("Conv2d with static inputs, channels last, ratio over the float32 layer in that order:\n")
    columns = ("convolution", "kernel", *(f"N={count}" for count in IMAGES))
    with torch.no_grad(), one_thread():
        print_table(columns, _convolutions())


def _convolutions() -> Iterator[tuple[str, ...]]:
    for title, (channels, filters, side, size) in CONVOLUTIONS.items():
        source = nn.Conv2d(channels, filters, size, padding=size // 2)
        source.weight.data = source.weight.data.contiguous(memory_format=torch.channels_last)
        data = torch.randn(max(IMAGES), channels, side, side)
        data = data.contiguous(memory_format=torch.channels_last)
        layer = Quantizer().activations("static").fit(data).apply(source, progress=False).model
        layers = {name: copy.deepcopy(layer) for name in ("onednn", "integer", "reference")}
        ratios: dict[str, list[str]] = {}
        for count in IMAGES:
            x = data[:count]
            found = {name: _of_kernel(one, name, x) for name, one in layers.items()}
            calls = [partial(_run, name, repeat(one), x) for name, one in layers.items()]
            calls.append(partial(_run, None, repeat(source), x))
            *taken, base = least_seconds(calls, TURNS)
            chosen = _of_kernel(layer, None, x)
            for (name, result), seconds in zip(found.items(), taken, strict=True):
                mark = " chosen" if torch.equal(result, chosen) else ""
                ratios.setdefault(name, []).append(f"{base / seconds:.2f}{mark}")
        for name, cells in ratios.items():
            yield (title, name, *cells)


def _of_kernel(layer: nn.Module, name: str | None, x: Tensor) -> Tensor:
    with kernels.use(name):
        result = layer(x)
    assert isinstance(result, Tensor)
    return result


def _rows() -> Iterator[tuple[str, ...]]:
    source = nn.Linear(SIZE, SIZE)
    weight = source.weight.detach()
    floats = [weight.clone() for _ in range(_copies([weight]))]
    for title, quantizer in SETTINGS.items():
        fitted = quantizer.fit(torch.randn(64, SIZE)) if "static" in title else quantizer
        layer = fitted.apply(source, progress=False).model
        assert isinstance(layer, QuantizedLayer)
        known = {kernel.name for kernel in kernels.KERNELS if _can(layer, kernel.name)}
        copies = {  # of each kernel its own: some want the codes in an order of theirs
            name: [copy.deepcopy(layer) for _ in range(_copies(layer.buffers()))] for name in known
        }
        for name, layers in copies.items():
            for one in layers:  # what is found out or changed once for each weight
                _run(name, iter([one]), torch.ones(1, SIZE))
        ratios: dict[str, list[str]] = {}
        for batch in BATCHES:
            x = torch.randn(batch, SIZE)
            names = [
                name for name in dict.fromkeys(k.name for k in kernels.KERNELS) if name in known
            ]
            turns = [cycle(copies[name]) for name in names]
            calls: list[Callable[[], object]] = [
                partial(_run, name, turn, x) for name, turn in zip(names, turns, strict=True)
            ]
            calls.append(partial(_float, cycle(floats), x, source.bias))
            for call in calls:
                call()
            *taken, base = least_seconds(calls, REPEATS[batch])
            chosen = _selected(layer, batch)
            with kernels.memory("double"):
                of_two = _selected(layer, batch)
            for name, seconds in zip(names, taken, strict=True):
                marks = " chosen" * (name == chosen) + ", of two orders" * (
                    of_two == name != chosen
                )
                ratios.setdefault(name, []).append(f"{base / seconds:.2f}{marks}")
        for name, cells in ratios.items():
            yield (title, name, *cells)


def _small() -> Iterator[tuple[str, ...]]:
    for out, length in SMALL:
        source = nn.Linear(length, out)
        for title in (
            "INT8, dynamic asymmetric inputs",
            "INT8, float inputs",
            "INT4 g64, float inputs",
        ):
            layer = SETTINGS[title].apply(source, progress=False).model
            assert isinstance(layer, QuantizedLayer)
            names = dict.fromkeys((_selected(layer, 1), "reference"))
            ratios: dict[str, list[str]] = {name: [] for name in names}
            for batch in BATCHES:
                x = torch.randn(batch, length)
                copies = {name: copy.deepcopy(layer) for name in names}
                calls = [partial(_run, name, repeat(one), x) for name, one in copies.items()]
                calls.append(partial(_run, None, repeat(source), x))
                *taken, base = least_seconds(calls, SMALL_TURNS)
                for name, seconds in zip(names, taken, strict=True):
                    ratios[name].append(f"{base / seconds:.2f}")
            for name, cells in ratios.items():
                yield (f"{out} x {length}", title, name, *cells)


def _turned() -> Iterator[tuple[str, ...]]:
    for size in TURNED:
        source = nn.Sequential(nn.Linear(size, size))
        for title in ("INT8, dynamic asymmetric inputs", "INT4 g64, float inputs"):
            quantizers = (SETTINGS[title], SETTINGS[title].transform(Rotate()))
            layers = [one.apply(source, progress=False).model for one in quantizers]
            cells = []
            for batch in BATCHES:
                x = torch.randn(batch, size)
                calls = [partial(_run, None, repeat(one), x) for one in layers]
                plain, turned = least_seconds(calls, REPEATS[batch])
                cells.append(f"{turned / plain:.2f}")
            yield (str(size), title, *cells)


def _can(layer: QuantizedLayer, name: str) -> bool:
    return _selected(layer, 1, name) == name


def _selected(layer: QuantizedLayer, batch: int, name: str | None = None) -> str:
    """Return the name of the kernel that computes a layer when the one of that name is in use."""
    weight = layer.packed_weights()["weight"]
    activation = layer.activations().get("weight")
    spec = KernelSpec(MatrixProduct(), weight.scheme, weight.layout, activation)
    with kernels.use(name):
        cpu = torch.device("cpu")
        return kernels.select(spec, cpu, torch.float32, batch, arrange=lambda: True).name


def _copies(tensors: Iterable[Tensor]) -> int:
    """Return how many copies of a layer fill the memory that is read in turn."""
    return max(2, min(_MOST, round(_COLD / sum(tensor.nbytes for tensor in tensors))))


def _run(name: str | None, layers: Iterator[nn.Module], x: Tensor) -> None:
    with kernels.use(name):
        next(layers)(x)


def _float(weights: Iterator[Tensor], x: Tensor, bias: Tensor) -> None:
    functional.linear(x, next(weights), bias)
