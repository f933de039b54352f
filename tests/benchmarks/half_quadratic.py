"""HQQ beside the package of its authors on the Linears of MiniLM, where that is installed.

It needs no more than `pip install --no-deps hqq termcolor`. Both quantize the same weights at equal
settings, by turns, and their scales and zero points are stored as float16.
"""

import copy
import importlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import metadata

import torch
from torch import Tensor, nn

from mono_quant import HQQ, Affine, Grid, MinMax, PerGroup, Rounding, RoundToNearest, Statistics
from tests.benchmarks.measure import median_seconds, print_table
from tests.benchmarks.minilm import figures, linears, original

SETTINGS = ((4, 32), (4, 64), (4, 128), (3, 64), (2, 64))
_REPEATS = 3

Quantize = Callable[[Tensor], Tensor]
TheirQuantize = Callable[..., tuple[Tensor, Mapping[str, Tensor]]]


def main() -> None:
    """Print the error that both leave, and the time of this one as a share of the other's."""
    print("Of 36 weights; SQNR in dB; times as a share of the package's.\n")
    columns = ("weights", "by", "bits/weight", "weight SQNR", "output SQNR", "time")
    print_table(columns, _rows())


def _rows() -> Iterator[tuple[str, ...]]:
    for bits, group in SETTINGS:
        scheme = Affine(bits, False, PerGroup(group), float_zero_point=True)
        ways: dict[str, Quantize] = {
            "round to nearest": partial(_ours, scheme, RoundToNearest()),
            "HQQ": partial(_ours, scheme, HQQ()),
        }
        title = f"INT{bits} g{group}, float zero points"
        try:
            package = importlib.import_module("hqq.core.quantize")
        except ImportError as reason:
            yield (title, f"hqq, skipped: {reason}", *[""] * 4)
        else:
            ways[f"hqq {metadata.version('hqq')}"] = partial(
                _theirs, package.Quantizer.quantize, bits, group
            )
        weights = {name: layer.weight.detach() for name, layer in linears(original()).items()}
        runs = [partial(_all, way, weights) for way in ways.values()]
        seconds = median_seconds(runs, _REPEATS)
        for (name, way), taken in zip(ways.items(), seconds, strict=True):
            found = _figures(way, weights, 32 / group + bits)
            share = f"{taken / seconds[-1]:.2f}" if len(ways) > 2 else ""
            yield (title, name, *found, share)


def _figures(way: Quantize, weights: Mapping[str, Tensor], size: float) -> tuple[str, str, str]:
    model = copy.deepcopy(original())
    values = _all(way, weights)
    for name, layer in linears(model).items():
        layer.weight = nn.Parameter(values[name])
    bits, weight, output, _ = figures(model, values, size)
    return f"{bits:.2f}", f"{weight:.2f}", f"{output:.2f}"


def _all(way: Quantize, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: way(weight) for name, weight in weights.items()}


def _ours(scheme: Affine, rounding: Rounding, weight: Tensor) -> Tensor:
    q = rounding.round(weight[None], Grid(scheme, MinMax()), Statistics())
    return scheme.dequantize(q)[0]


def _theirs(quantize: TheirQuantize, bits: int, group: int, weight: Tensor) -> Tensor:
    codes, meta = quantize(
        weight, nbits=bits, group_size=group, axis=1, optimize=True, bitpack=False, device="cpu"
    )
    scale, zero = (meta[name].to(torch.float16).to(torch.float32) for name in ("scale", "zero"))
    values = (codes.reshape(-1, group).to(torch.float32) - zero) * scale
    return values.reshape(weight.shape)
