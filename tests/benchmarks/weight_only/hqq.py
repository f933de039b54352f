"""hqq: half-quadratic, zero points in float, by its authors. Its scales are rounded to float16."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.weight_only.package import Grid, Offer, Package, by_weight


def _quantized(hqq: Any, weight: Tensor, grid: Grid) -> Callable[[], Tensor]:
    codes, meta = hqq.Quantizer.quantize(
        weight, nbits=grid.bits, group_size=grid.group, axis=1, bitpack=False, device="cpu"
    )

    def read() -> Tensor:
        scale, zero = (meta[name].to(torch.float16).to(torch.float32) for name in ("scale", "zero"))
        values: Tensor = (codes.reshape(-1, grid.group).to(torch.float32) - zero) * scale
        return values.reshape(weight.shape)

    return read


PACKAGE = Package(
    "hqq 0.2.8.post1",
    ("hqq==0.2.8.post1",),
    {"HQQ": Offer(by_weight("hqq.core.quantize", _quantized, lambda grid: grid.size(32)))},
)
