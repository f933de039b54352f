"""Subclasses with a wrong signature; an error is expected where a comment says so."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from mono_quant import (
    Change,
    Checkpoint,
    Grid,
    LayerQuantizer,
    Layout,
    Observer,
    PackedTensor,
    QParams,
    QTensor,
    QuantizedModule,
    RangeEstimator,
    Rounding,
    Scheme,
    Serializer,
    Statistic,
    Statistics,
    Transform,
    TransformContext,
)


@attrs.frozen
class NoBlockSize(Scheme):
    kind: ClassVar[str] = "no_block_size"

    def calculate_qparams(self, min_val: Tensor, max_val: Tensor) -> QParams:  # E: override
        return QParams(None, None, (1,))

    def quantize(self, x: Tensor, qparams: QParams) -> Tensor:  # E: override
        return x

    def dequantize(self, q: Tensor) -> Tensor:  # E: override
        return q


@attrs.frozen
class Unfinished(Scheme):
    kind: ClassVar[str] = "unfinished"


Unfinished()  # E: abstract


@attrs.frozen
class NoScheme(RangeEstimator):
    kind: ClassVar[str] = "no_scheme"

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:  # E: override
        return x.amin(), x.amax()


@attrs.frozen
class OneEnd(Observer[Tensor]):
    kind: ClassVar[str] = "one_end"

    def observe(self, x: Tensor) -> float:  # E: override
        return float(x.max())

    def merge(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.maximum(left, right)

    def calculate_range(self, state: Tensor, scheme: Scheme) -> Tensor:  # E: override
        return state

    def range_of(
        self, x: Tensor, scheme: Scheme, block_size: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        return x.amin(), x.amax()


@attrs.frozen
class Mean(Statistic[Tensor]):
    kind: ClassVar[str] = "mean"

    def observe(self, x: Tensor) -> Tensor:
        return x.mean(0)

    def merge(self, left: Tensor, right: int) -> Tensor:  # E: override
        return left


@attrs.frozen
class Reader(Rounding):
    kind: ClassVar[str] = "reader"

    @property
    def needs(self) -> tuple[Mean]:
        return (Mean(),)

    def round(self, weight: Tensor, grid: Grid, statistics: Statistics) -> QTensor:
        state: int = statistics.state(Mean())  # E: assignment
        return grid.scheme.quantize(weight + state, grid.qparams(weight))


@attrs.frozen
class NoStatistics(Rounding):
    kind: ClassVar[str] = "no_statistics"

    def round(self, weight: Tensor, grid: Grid) -> QTensor:  # E: override
        return grid.scheme.quantize(weight, grid.qparams(weight))


@attrs.frozen
class TwoArguments(LayerQuantizer):
    kind: ClassVar[str] = "two_arguments"

    def matches(self, layer: nn.Linear) -> bool:  # E: override
        return True

    def layouts(self, layer: nn.Module) -> Mapping[str, Layout]:
        return {}

    def replace(  # E: override
        self, layer: nn.Module, weights: Mapping[str, PackedTensor]
    ) -> QuantizedModule:
        raise NotImplementedError


class Reversed(Serializer):
    format = "reversed"
    suffixes = (".rev",)

    def save(self, path: Path, checkpoint: Checkpoint) -> None:  # E: override
        pass

    def load(self, path: Path) -> Checkpoint:  # E: override
        return Checkpoint({}, {})


@attrs.frozen
class Silent(Transform):
    kind: ClassVar[str] = "silent"

    def apply(self, model: nn.Module, context: TransformContext) -> Change:  # E: override
        return Change("", "")
