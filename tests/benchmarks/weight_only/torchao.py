"""torchao: its HQQ, with zero points and scales in float16."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.weight_only.package import Grid, Offer, Package, by_weight


def _quantized(primitives: Any, weight: Tensor, grid: Grid) -> Callable[[], Tensor]:
    codes, scale, zero, _ = primitives._choose_qparams_and_quantize_affine_hqq(
        weight,
        nbits=grid.bits,
        group_size=grid.group,
        compute_dtype=torch.float16,
        device="cpu",
        raw_output=True,
    )

    def read() -> Tensor:
        grouped = codes.to(torch.float32).reshape(weight.shape[0], -1, grid.group)
        values: Tensor = (grouped - zero.float().unsqueeze(2)) * scale.float().unsqueeze(2)
        return values.reshape(weight.shape)

    return read


PACKAGE = Package(
    "torchao 0.18.0",
    ("torchao==0.18.0",),
    {
        "HQQ": Offer(
            by_weight(
                "torchao.quantization.quant_primitives", _quantized, lambda grid: grid.size(32)
            )
        )
    },
)
