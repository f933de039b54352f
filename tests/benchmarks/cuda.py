"""On a CUDA device: each kernel for it beside bfloat16 and float32 layers, and a decoder.

Ratios over the float layer or model of the same dtype, medians of interleaved calls that wait for
the device; weights come from memory. "graph" is the same call recorded as a CUDA graph, in which
Python has no part, "compiled" both models under `torch.compile(mode="reduce-overhead")`, in
bfloat16. "SQNR" is that of the output.
"""

import copy
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from mono_quant import Float8, QuantizedLayer, Quantizer, kernels
from mono_quant.speed import timed
from tests.benchmarks.contenders.llama import VOCABULARY, Llama
from tests.benchmarks.measure import print_table, sqnr

SIZE = 4096
BATCHES = (1, 16, 128, 2048)
SHAPES = ((1, 1), (1, 256), (4, 256))
DTYPES = (torch.float32, torch.bfloat16)
_REPEATS = 20
_COLD = 512e6  # bytes of weights that take turns

E4M3 = torch.float8_e4m3fn
SETTINGS: Mapping[str, Quantizer] = {
    "INT8 dynamic": Quantizer(),
    "INT8 dynamic, symmetric": Quantizer().activations("dynamic", symmetric=True),
    "FP8 dynamic": Quantizer().scheme(Float8()).activations("dynamic", dtype=E4M3),
    "INT8 weight-only": Quantizer().activations(None),
    "FP8 weight-only": Quantizer().scheme(Float8()),
    "INT4 g64": Quantizer().bits(4),
}
COMPILED = ("FP8 dynamic", "INT8 dynamic, symmetric", "INT4 g64")
FAST_SHAPES = (SHAPES[0], SHAPES[2])  # torch compiles one forward eight times, and not again


def main() -> None:
    """Print both tables, or that there is no device."""
    if not torch.cuda.is_available():
        print("skipped: there is no CUDA device\n")
        return
    print(f"{__doc__}\n{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}\n")
    with torch.no_grad():
        print(f"Linear of {SIZE} x {SIZE}: eager / graph\n")
        columns = ("setting", "dtype", "kernel", *(f"M={batch}" for batch in BATCHES), "SQNR, dB")
        print_table(columns, _linear())
        print("Decoder of 8 blocks of 1024: eager / graph\n")
        tokens = ("1 token", "256 tokens", "4 x 256")
        print_table(("setting", "dtype", "MB", *tokens, "SQNR, dB"), _decoder())
        print("The same, compiled\n")
        print_table(("setting", tokens[0], tokens[2], "SQNR, dB"), _compiled())


def _linear() -> Iterator[tuple[str, ...]]:
    for dtype in DTYPES:
        torch.manual_seed(0)
        source = nn.Linear(SIZE, SIZE, dtype=dtype, device="cuda")
        batches = [torch.randn(batch, SIZE, dtype=dtype, device="cuda") for batch in BATCHES]
        floats = _copies(source)
        for title, quantizer in SETTINGS.items():
            layer = quantizer.only("*").apply(source, progress=False).model
            assert isinstance(layer, QuantizedLayer)
            for name in _names(layer, batches[1]):
                layers = _copies(layer)
                with kernels.use(name):
                    cells = [_ratios(floats, layers, x) for x in batches]
                    error = sqnr([source(batches[2]).float()], [layers[0](batches[2]).float()])
                yield (title, _short(dtype), name or "fastest", *cells, f"{error:.2f}")


def _names(layer: QuantizedLayer, x: Tensor) -> tuple[str | None, ...]:
    """Return what may be asked for: the fastest, and each kernel that computes otherwise."""
    found = [None, "reference"]
    plain = _with("reference", layer, x)
    for kernel in kernels.KERNELS:
        if kernel.name.startswith("cuda") and not torch.equal(_with(kernel.name, layer, x), plain):
            found.append(kernel.name)
    return tuple(found)


def _with(name: str, layer: nn.Module, x: Tensor) -> Tensor:
    with kernels.use(name):
        result = copy.deepcopy(layer)(x)
    assert isinstance(result, Tensor)
    return result


def _decoder() -> Iterator[tuple[str, ...]]:
    for dtype in DTYPES:
        source = _source(dtype)
        batches = [torch.randint(VOCABULARY, shape, device="cuda") for shape in SHAPES]
        size = sum(one.nbytes for one in source.state_dict().values())
        yield ("float", _short(dtype), f"{size / 1e6:.0f}", *["1 / 1"] * 3, "")
        for title, quantizer in SETTINGS.items():
            model = quantizer.apply(source, progress=False).model
            cells = [_ratios([source], [model], tokens) for tokens in batches]
            error = sqnr([source(batches[1]).float()], [model(batches[1]).float()])
            size = sum(one.nbytes for one in model.state_dict().values())
            yield (title, _short(dtype), f"{size / 1e6:.0f}", *cells, f"{error:.2f}")


def _compiled() -> Iterator[tuple[str, ...]]:
    source = _source(torch.bfloat16)
    fast = _fast(source)
    for title in COMPILED:
        model = SETTINGS[title].apply(source, progress=False).model
        quantized, cells, error = _fast(model), list[str](), 0.0
        for shape in FAST_SHAPES:
            tokens = torch.randint(VOCABULARY, shape, device="cuda")
            calls = [_calls([one], tokens) for one in (fast, quantized)]
            for call in calls * 3:
                call()
            cells.append(f"{_ratio(*calls):.2f}")
            error = sqnr([source(tokens).float()], [quantized(tokens).float()])
        yield (title, *cells, f"{error:.2f}")


def _fast(model: nn.Module) -> Callable[[Tensor], Tensor]:
    compiled: Callable[[Tensor], Tensor] = torch.compile(
        model, mode="reduce-overhead", dynamic=False
    )
    return compiled


def _source(dtype: torch.dtype) -> Llama:
    torch.manual_seed(0)
    return Llama().eval().to("cuda", dtype)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _copies(layer: nn.Module) -> Sequence[nn.Module]:
    """Return so many copies that the device's cache holds none of them when its turn comes."""
    size = sum(tensor.nbytes for tensor in layer.state_dict().values())
    return [copy.deepcopy(layer) for _ in range(max(2, round(_COLD / size)))]


def _ratios(floats: Sequence[nn.Module], quantized: Sequence[nn.Module], x: Tensor) -> str:
    for model in (*floats, *quantized):
        model(x)  # what is found out or changed once
    eager = [_calls(floats, x), _calls(quantized, x)]
    return f"{_ratio(*eager):.2f} / {_recorded(floats, quantized, x)}"


def _calls(models: Sequence[Callable[[Tensor], object]], x: Tensor) -> Callable[[], object]:
    turn = itertools.cycle(models)
    return lambda: next(turn)(x)


def _recorded(floats: Sequence[nn.Module], quantized: Sequence[nn.Module], x: Tensor) -> str:
    """Return the ratio of graphs that call every copy once, or why there is none."""
    try:
        graphs = [_graph(models, x) for models in (floats, quantized)]
    except RuntimeError as reason:
        torch.cuda.synchronize()
        return f"none ({str(reason).splitlines()[0][:40]})"
    each = len(quantized) / len(floats)
    return f"{each * _ratio(graphs[0].replay, graphs[1].replay):.2f}"


def _graph(models: Sequence[nn.Module], x: Tensor) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for model in models:
            model(x)
    return graph


def _ratio(base: Callable[[], object], other: Callable[[], object]) -> float:
    """Return the median of the first one's time by the other's."""
    device = torch.device("cuda")
    ratios = [timed(base, device) / timed(other, device) for _ in range(_REPEATS)]
    return statistics.median(ratios)
