"""bitsandbytes: NF4, with scales in float32 or, "double", in 8 bits with one for each 256."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from tests.benchmarks.weight_only.package import GRIDS, Grid, Offer, Package, by_weight


def _quantized(functional: Any, weight: Tensor, grid: Grid, double: bool) -> Callable[[], Tensor]:
    codes, state = functional.quantize_4bit(
        weight, blocksize=grid.group, quant_type="nf4", compress_statistics=double
    )

    def read() -> Tensor:
        values: Tensor = functional.dequantize_4bit(codes, state)
        return values

    return read


def _way(double: bool, beside: float) -> Offer:
    quantized = partial(_quantized, double=double)
    way = by_weight("bitsandbytes.functional", quantized, lambda grid: grid.size(beside))
    return Offer(way, [grid for grid in GRIDS if grid.bits == 4])


PACKAGE = Package(
    "bitsandbytes 0.50.2",
    ("bitsandbytes==0.50.2",),
    {"NF4": _way(False, 32), "NF4, double quantized": _way(True, 8 + 32 / 256)},
)
