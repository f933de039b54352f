"""Throughput of quantizing, saving and loading, as a share of what copying memory reaches."""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from mono_quant import (
    MSE,
    Affine,
    Grid,
    MinMax,
    PerGroup,
    Quantizer,
    RangeEstimator,
    RoundToNearest,
    Statistics,
    load_model,
)
from mono_quant.numerics.blocks import AT_ONCE
from tests.benchmarks.contenders import llama
from tests.benchmarks.measure import (
    MB,
    fresh,
    median_seconds,
    memory,
    one_thread,
    print_table,
    reset_peak,
)

GB = 1e9
REPEATS = 5
_LAYERS, _OUT, _IN = 4, 4096, 2048
_MANY = 24
_SEARCHED = 1
_COPIED = 256e6  # bytes
_BYTE, _GROUP = 8, 64

_FRESH = {"INT8 per channel": 8, "INT4 g64, packed": 4}


def main() -> None:
    """Print the speed of quantizing by setting, then that of a first call, then that of files."""
    size = _OUT * _IN * 4 / MB
    print(f"Linears of {_OUT} x {_IN}, {size:.0f} MB each in float32; medians of {REPEATS}.")
    print("GB/s of float bytes, by processor time; a copy takes its turn before each. 'alone':")
    print("grid points without the report's evidence and without packing.\n")
    print_table(
        ("quantizing", "layers", "GB/s", "copy GB/s", "share of a copy", "alone"), _speeds()
    )
    floats = sum(parameter.nbytes for parameter in llama.load().parameters()) / MB
    print(f"A decoder of {floats:.0f} MB, apply's first call in a fresh process, by the clock:\n")
    print_table(("quantizing", "s", "GB/s", "copy GB/s", "share of a copy"), _first_calls())
    if Path("/proc/self/status").exists():
        print("Peak of memory while a Linear is quantized, less the float layer and the result;")
        print(f"a chunk of {AT_ONCE} values is {4 * AT_ONCE / MB:.1f} MB in float32.\n")
        print_table(("quantizing", "layer MB", "result MB", "beyond MB", "chunks"), _transient())
    columns = ("file", "MB", "save GB/s", "of it computing", "load GB/s", "copy GB/s")
    print("GB/s of file bytes, by the clock, again and again in one process; saving syncs to the")
    print("disk.\n")
    print_table(columns, _files())
    print(f"A file's first load in a fresh process, medians of {REPEATS} by turns, by the clock.")
    print("Beside it load_file of safetensors: what it maps is read when it is used, so here it is")
    print("copied as well, or it reads (pread). The file is in the system's cache.\n")
    others = ("/ load_file, copied", "/ load_file, pread")
    print_table(("file", "MB", "load_model, ms", *others), _first_loads())


def network(layers: int = _LAYERS, width: int | None = None) -> nn.Sequential:
    """Return a float model."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width or _IN, width or _OUT) for _ in range(layers))).eval()


def child(what: str, given: str) -> None:
    """Print what a first call takes, in a process of its own.

    Args:
        what: "call" for the time of quantizing, "peak" for its memory, or a way to load a file.
        given: bits, or the file.
    """
    if what in _LOADS:
        _print_load(_LOADS[what], Path(given))
        return
    quantizer = Quantizer().bits(int(given))
    if what == "peak":
        _print_peak(quantizer)
        return
    with one_thread():
        model = llama.load()
        copying = _copying(int(_COPIED))
        copying()
        start = time.perf_counter()
        copying()
        copied = time.perf_counter() - start
        start = time.perf_counter()
        quantizer.apply(model, progress=False)
        taken = time.perf_counter() - start
    print(json.dumps({"seconds": taken, "copy": _COPIED / copied}))


def _print_load(load: Callable[[Path, nn.Module], object], path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="mono_quant_") as folder:  # what a first use loads
        small = Path(folder) / "small.safetensors"
        Quantizer().apply(network(1, 64), progress=False).save(small)
        for one in _LOADS.values():
            one(small, network(1, 64))
    with torch.device("meta"):
        skeleton = network(int(path.stem.rpartition("-")[2]))
    start = time.perf_counter()
    kept = load(path, skeleton)
    print(json.dumps({"seconds": time.perf_counter() - start}))
    del kept


def _print_peak(quantizer: Quantizer) -> None:
    quantizer.apply(nn.Sequential(nn.Linear(64, 64)), progress=False)  # what a first use loads
    model = network(1)
    before = memory("RssAnon")
    reset_peak()
    begun = memory("VmHWM")
    result = quantizer.apply(model, progress=False)
    peak = memory("VmHWM") - begun
    kept = memory("RssAnon") - before
    print(json.dumps({"peak": peak, "kept": kept, "result": result.report.bytes}))


def _first_calls() -> Iterator[tuple[str, ...]]:
    size = sum(parameter.nbytes for parameter in llama.load().parameters())
    for title, bits in _FRESH.items():
        found, _ = fresh("quantize_speed", "call", bits)
        speed = size / found["seconds"]
        cells = (f"{speed / GB:.3f}", f"{found['copy'] / GB:.2f}", f"{speed / found['copy']:.1%}")
        yield (title, f"{found['seconds']:.2f}", *cells)


def _transient() -> Iterator[tuple[str, ...]]:
    for title, bits in _FRESH.items():
        found, _ = fresh("quantize_speed", "peak", bits)
        beyond = found["peak"] - found["result"]
        cells = (f"{found['result'] / MB:.1f}", f"{beyond / MB:.1f}")
        yield (title, f"{4 * _OUT * _IN / MB:.1f}", *cells, f"{beyond / (4 * AT_ONCE):.1f}")


def _speeds() -> Iterator[tuple[str, ...]]:
    for title, bits, observer, layers, repeats in (
        ("INT8 per channel", 8, MinMax(), 1, REPEATS),
        ("INT4 g64, packed", 4, MinMax(), 1, REPEATS),
        ("INT8 per channel", 8, MinMax(), _LAYERS, REPEATS),
        ("INT4 g64, packed", 4, MinMax(), _LAYERS, REPEATS),
        ("INT3 g64", 3, MinMax(), _LAYERS, REPEATS),
        ("INT4 g64, MSE", 4, MSE(), _SEARCHED, 1),
        ("FP16", 16, None, _LAYERS, REPEATS),
    ):
        model = network(layers)
        quantizer = _quantizer(bits, observer)
        size = 4 * sum(layer.weight.numel() for layer in model if isinstance(layer, nn.Linear))
        quantizer.apply(model, progress=False)  # what only a first call does is told below
        calls: list[Callable[[], object]] = [
            _copying(size),
            partial(quantizer.apply, model, progress=False),
        ]
        if layers == 1 and observer is not None and not isinstance(observer, MSE):
            calls.append(_rounding(model, bits, observer))
        copied, taken, *rounding = median_seconds(calls, repeats)
        cells = (f"{size / taken / GB:.3f}", f"{size / copied / GB:.2f}", f"{copied / taken:.1%}")
        alone = f"{copied / rounding[0]:.1%}" if rounding else ""
        yield (title, str(layers), *cells, alone)


def _files() -> Iterator[tuple[str, ...]]:
    for suffix in (".safetensors", ".pt"):
        for bits in (8, 4):
            result = Quantizer().bits(bits).apply(network(), progress=False)
            with tempfile.TemporaryDirectory(prefix="mono_quant_") as folder:
                path = Path(folder) / f"model{suffix}"
                result.save(path)
                size = path.stat().st_size

                def load(path: Path = path) -> None:
                    with torch.device("meta"):
                        skeleton = network()
                    load_model(path, skeleton)

                def save(path: Path = path) -> None:
                    result.save(path)  # noqa: B023  # called within this turn of the loop

                actions: list[Callable[[], object]] = [_copying(size), load, save]
                copied, loaded, saved = median_seconds(actions, REPEATS, time.perf_counter)
                (computing,) = median_seconds([save], REPEATS)
            yield (
                f"{suffix}, {bits} bits",
                f"{size / 1e6:.1f}",
                f"{size / saved / GB:.2f}",
                f"{computing / saved:.0%}",
                f"{size / loaded / GB:.2f}",
                f"{size / copied / GB:.2f}",
            )


def _first_loads() -> Iterator[tuple[str, ...]]:
    for bits, layers in ((8, _LAYERS), (8, _MANY), (4, _LAYERS), (4, _MANY)):
        with tempfile.TemporaryDirectory(prefix="mono_quant_") as folder:
            path = Path(folder) / f"model-{bits}-{layers}.safetensors"
            Quantizer().bits(bits).apply(network(layers), progress=False).save(path)
            taken: dict[str, list[float]] = {name: [] for name in _LOADS}
            for _ in range(REPEATS):
                for name, seconds in taken.items():
                    seconds.append(fresh("quantize_speed", name, path)[0]["seconds"])
            ours, *others = (statistics.median(seconds) for seconds in taken.values())
            size = f"{path.stat().st_size / MB:.0f}"
        ratios = (f"{ours / other:.2f}" for other in others)
        yield (f"{bits} bits, {layers} layers", size, f"{1e3 * ours:.0f}", *ratios)


def _quantizer(bits: int, observer: RangeEstimator | None) -> Quantizer:
    quantizer = Quantizer().bits(bits)
    return quantizer.observer(observer) if observer is not None else quantizer


def _rounding(model: nn.Module, bits: int, observer: RangeEstimator) -> Callable[[], object]:
    """Return what finds a layer's grid and puts its weight there, and nothing else."""
    (layer,) = (one for one in model.modules() if isinstance(one, nn.Linear))
    scheme = (
        Affine()
        if bits == _BYTE
        else Affine(bits=bits, symmetric=False, granularity=PerGroup(_GROUP))
    )
    grid, stack = Grid(scheme, observer), layer.weight.detach()[None]
    return lambda: RoundToNearest().round(stack, grid, Statistics())


def _copied(path: Path, _: nn.Module) -> object:
    return [tensor.clone() for tensor in load_file(path).values()]


def _read(path: Path, _: nn.Module) -> object:
    return load_file(path, backend="pread")


_LOADS: Mapping[str, Callable[[Path, nn.Module], object]] = {
    "load_model": load_model,
    "copied": _copied,
    "pread": _read,
}


def _copying(size: int) -> Callable[[], object]:
    source, target = (torch.ones(size // 4) for _ in range(2))
    return lambda: target.copy_(source)


if __name__ == "__main__":
    child(*sys.argv[1:])
