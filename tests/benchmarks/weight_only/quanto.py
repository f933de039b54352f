"""optimum-quanto: to the nearest of its grid, and its HQQ; scales and shifts count as float16."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.weight_only.package import GRIDS, Grid, Offer, Package, by_weight


def _quantized(quanto: Any, weight: Tensor, grid: Grid, optimizer: str) -> Callable[[], Tensor]:
    qtype = getattr(quanto, f"qint{grid.bits}")
    found = getattr(quanto, optimizer)()(weight, qtype=qtype, axis=0, group_size=grid.group)
    scale, shift = (one.to(torch.float16).to(torch.float32) for one in found)
    codes = quanto.quantize_weight(
        weight,
        qtype=qtype,
        axis=0,
        scale=scale,
        shift=shift,
        group_size=grid.group,
        optimized=False,
    )

    def read() -> Tensor:
        values: Tensor = codes.dequantize()
        return values

    return read


def _way(optimizer: str) -> Offer:
    quantized = partial(_quantized, optimizer=optimizer)
    way = by_weight("optimum.quanto", quantized, lambda grid: grid.size(32))
    return Offer(way, [grid for grid in GRIDS if grid.bits in (2, 4)])


PACKAGE = Package(
    "optimum-quanto 0.2.7",
    ("optimum-quanto==0.2.7",),
    {"to nearest": _way("MaxOptimizer"), "HQQ": _way("HqqOptimizer")},
)
