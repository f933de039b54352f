"""Three values for each weight."""

import math
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from mono_quant import Granularity, InputError, PerChannel, QParams, QTensor, Scheme, register
from mono_quant.numerics.blocks import block_counts, meet
from mono_quant.numerics.packing import packed_length

_LEVELS = (-1.0, 0.0, 1.0, math.nan)
"""Of each code; two bits have one more than there are values."""


@register
@attrs.frozen
class Ternary(Scheme):
    """-s, 0 or s, with a float32 scale s for each block."""

    kind: ClassVar[str] = "ternary"
    granularity: Granularity = attrs.field(factory=PerChannel)

    @property
    def code_bits(self) -> int:
        return 2

    def nbytes(self, shape: tuple[int, ...]) -> int:
        groups, rows, length = shape
        blocks = torch.Size(block_counts(shape, self.granularity.block_size(shape))).numel()
        return groups * rows * packed_length(length, 2) + 4 * blocks

    def calculate_qparams(
        self, min_val: Tensor, max_val: Tensor, *, block_size: tuple[int, ...]
    ) -> QParams:
        scale = torch.maximum(min_val.abs(), max_val.abs()).to(torch.float32)
        if not torch.isfinite(scale).all():
            raise InputError("a range is not finite: the tensor holds NaN or infinity")
        return QParams(scale, None, block_size)

    def quantize(self, x: Tensor, qparams: QParams) -> QTensor:
        values, scale = meet(x.to(torch.float32), qparams.block_size, self._scale(qparams))
        signs = torch.where(values.abs() > scale / 2, values.sign(), 0)
        return QTensor((signs + 1).to(torch.uint8).reshape(x.shape), qparams, x.dtype)

    def dequantize(self, q: QTensor) -> Tensor:
        levels = torch.tensor(_LEVELS, device=q.codes.device)[q.codes.to(torch.int64)]
        values, scale = meet(levels, q.qparams.block_size, self._scale(q.qparams))
        return (values * scale).reshape(q.shape)

    def describe(self) -> str:
        return f"ternary {self.granularity.describe()}"

    def _scale(self, qparams: QParams) -> Tensor:
        if qparams.scale is None:
            raise InputError("Ternary needs a scale")
        return qparams.scale
