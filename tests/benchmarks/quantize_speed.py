"""Throughput of quantizing, saving and loading, as a share of what copying memory reaches."""

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn

from mono_quant import MSE, MinMax, Quantizer, RangeEstimator, load_model
from tests.benchmarks.measure import median_seconds, print_table

GB = 1e9
REPEATS = 5
_LAYERS, _OUT, _IN = 4, 4096, 2048
_SEARCHED = 1


def main() -> None:
    """Print the speed of quantizing by setting, then that of files."""
    size = _LAYERS * _OUT * _IN * 4 / 1e6
    print(f"{_LAYERS} Linears of {_OUT} x {_IN}, {size:.0f} MB in float32; {REPEATS} repeats.")
    print("GB/s of float bytes, by processor time; a copy takes its turn before each.\n")
    print_table(
        ("quantizing", "GB/s", "copy GB/s", "share of a copy", "MB/s of weights"), _speeds()
    )
    columns = ("file", "MB", "save GB/s", "of it computing", "load GB/s", "copy GB/s")
    print("GB/s of file bytes, by the clock; saving syncs to the disk.\n")
    print_table((*columns, "load, share of a copy"), _files())


def network(layers: int = _LAYERS) -> nn.Sequential:
    """Return a float model."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(_IN, _OUT) for _ in range(layers))).eval()


def _speeds() -> Iterator[tuple[str, ...]]:
    for title, bits, observer, layers, repeats in (
        ("INT8 per channel", 8, MinMax(), _LAYERS, REPEATS),
        ("INT4 g64", 4, MinMax(), _LAYERS, REPEATS),
        ("INT3 g64", 3, MinMax(), _LAYERS, REPEATS),
        ("INT4 g64, MSE", 4, MSE(), _SEARCHED, 1),
        ("FP16", 16, None, _LAYERS, REPEATS),
    ):
        model = network(layers)
        quantizer = _quantizer(bits, observer)
        size = 4 * sum(layer.weight.numel() for layer in model if isinstance(layer, nn.Linear))
        copied, taken = median_seconds(
            [_copying(size), partial(quantizer.apply, model, progress=False)], repeats
        )
        speed, copy = size / taken / GB, size / copied / GB
        cells = (f"{speed:.3f}", f"{copy:.2f}", f"{speed / copy:.1%}", f"{speed * 250:.0f}")
        yield (title, *cells)


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
                f"{copied / loaded:.1%}",
            )


def _quantizer(bits: int, observer: RangeEstimator | None) -> Quantizer:
    quantizer = Quantizer().bits(bits)
    return quantizer.observer(observer) if observer is not None else quantizer


def _copying(size: int) -> Callable[[], object]:
    source, target = (torch.ones(size // 4) for _ in range(2))
    return lambda: target.copy_(source)
