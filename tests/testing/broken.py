"""Strategies, each of which is wrong in one way: grids, ranges, statistics, roundings."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from mono_quant import (
    Affine,
    BlockCall,
    BlockRounding,
    BlockWeight,
    FittedBlock,
    Granularity,
    Grid,
    MinMax,
    Observer,
    PerTensor,
    QParams,
    QTensor,
    RangeEstimator,
    Rounding,
    RoundToNearest,
    Scheme,
    Statistic,
    Statistics,
)
from mono_quant.configurable import Config
from mono_quant.errors import InputError
from mono_quant.numerics.blocks import block_range
from mono_quant.numerics.columns import ByColumn
from mono_quant.numerics.granularity import Shape

# --- values --------------------------------------------------------------------------------------


@attrs.frozen
class Pathlike(MinMax):
    kind: ClassVar[str] = "tests/pathlike"


@attrs.frozen
class Forgetful(MinMax):
    kind: ClassVar[str] = "tests.forgetful"
    share: float = 0.5

    def to_config(self) -> Config:
        return {"kind": self.kind}


@attrs.frozen
class Careless(MinMax):
    kind: ClassVar[str] = "tests.careless"
    share: float = attrs.field(default=0.5, eq=False)


@attrs.define(unsafe_hash=True)
class Changeable(RangeEstimator):
    kind: ClassVar[str] = "tests.changeable"
    share: float = 0.5

    def range_of(self, x: Tensor, scheme: Scheme, block_size: Shape) -> tuple[Tensor, Tensor]:
        return block_range(x, block_size)


@attrs.define(eq=True, frozen=False, unsafe_hash=False)
class Unhashable(RangeEstimator):
    kind: ClassVar[str] = "tests.unhashable"

    def range_of(self, x: Tensor, scheme: Scheme, block_size: Shape) -> tuple[Tensor, Tensor]:
        return block_range(x, block_size)


def _quarters(value: float) -> float:
    return round(2 * value) / 4


@attrs.frozen
class Rounded(MinMax):
    kind: ClassVar[str] = "tests.rounded"
    share: float = attrs.field(default=0.55, converter=_quarters)


# --- schemes -------------------------------------------------------------------------------------


@attrs.frozen
class Shifted(Affine):
    kind: ClassVar[str] = "tests.shifted"

    def quantize(self, x: Tensor, qparams: QParams) -> QTensor:
        q = Affine.quantize(self, x, qparams)
        return attrs_evolve(q, (q.codes.to(torch.int16) + 1).clamp(max=self.quant_max))


@attrs.frozen
class Overflowing(Affine):
    kind: ClassVar[str] = "tests.overflowing"

    def quantize(self, x: Tensor, qparams: QParams) -> QTensor:
        q = Affine.quantize(self, x, qparams)
        return attrs_evolve(q, q.codes.to(torch.int16) * 2)


@attrs.frozen
class Narrow(Affine):
    kind: ClassVar[str] = "tests.narrow"

    def calculate_qparams(self, min_val: Tensor, max_val: Tensor, *, block_size: Shape) -> QParams:
        return Affine.calculate_qparams(self, min_val / 9, max_val / 9, block_size=block_size)


@attrs.frozen
class Dithered(Affine):
    kind: ClassVar[str] = "tests.dithered"

    def quantize(self, x: Tensor, qparams: QParams) -> QTensor:
        assert qparams.scale is not None
        return Affine.quantize(self, x + torch.rand_like(x) * float(qparams.scale.max()), qparams)


@attrs.frozen
class Writing(Affine):
    kind: ClassVar[str] = "tests.writing"

    def quantize(self, x: Tensor, qparams: QParams) -> QTensor:
        return Affine.quantize(self, x.mul_(0.999), qparams)


@attrs.frozen
class Stingy(Affine):
    kind: ClassVar[str] = "tests.stingy"

    def nbytes(self, shape: Shape) -> int:
        return torch.Size(shape).numel()


@attrs.frozen
class Trusting(Affine):
    kind: ClassVar[str] = "tests.trusting"

    def calculate_qparams(self, min_val: Tensor, max_val: Tensor, *, block_size: Shape) -> QParams:
        low, high = (torch.nan_to_num(end, posinf=1.0, neginf=-1.0) for end in (min_val, max_val))
        return Affine.calculate_qparams(self, low, high, block_size=block_size)


@attrs.frozen
class Numb(Affine):
    kind: ClassVar[str] = "tests.numb"

    def quantize(self, x: Tensor, qparams: QParams) -> QTensor:
        return Affine.quantize(self, x.to(torch.float32), qparams)


@attrs.frozen
class Halved(Affine):
    kind: ClassVar[str] = "tests.halved"
    decodes_rows: ClassVar[bool] = True

    def dequantize(self, q: QTensor) -> Tensor:
        return Affine.dequantize(self, q) * (q.shape[1] / 3)  # the rows of the whole


@attrs.frozen
class Skimming(Affine):
    kind: ClassVar[str] = "tests.skimming"

    def quantize_rows(self, stack: Tensor, qparams: QParams) -> QTensor:
        return self.quantize(stack[:, :1].expand_as(stack), qparams)


@attrs.frozen
class Hasty(Affine):
    kind: ClassVar[str] = "tests.hasty"

    def by_column(self, qparams: QParams, order: Tensor) -> ByColumn:
        return Affine.by_column(self, qparams, order.flip(1))


@attrs.frozen
class Vague(Affine):
    kind: ClassVar[str] = "tests.vague"

    def approximate(self, x: Tensor, qparams: QParams) -> Tensor:
        return 1.1 * self.fake_quantize(x, qparams)


@attrs.frozen
class OneScale(Affine):
    kind: ClassVar[str] = "tests.one_scale"

    def calculate_qparams(self, min_val: Tensor, max_val: Tensor, *, block_size: Shape) -> QParams:
        return Affine.calculate_qparams(
            self, min_val.amin().reshape(1), max_val.amax().reshape(1), block_size=block_size
        )


@attrs.frozen
class Uneven(Granularity):
    kind: ClassVar[str] = "tests.uneven"

    def block_size(self, shape: Shape) -> Shape:
        return (1, 1, 5)


def attrs_evolve(q: QTensor, codes: Tensor) -> QTensor:
    """Return `q` with other codes, in the dtype of the old ones."""
    return QTensor(codes.to(q.codes.dtype), q.qparams, q.dtype)


# --- what looks at values ------------------------------------------------------------------------


@attrs.frozen
class Averaged(MinMax):
    """Merges to the mean of both, which weighs the later more."""

    kind: ClassVar[str] = "tests.averaged"

    def merge(self, left, right):  # type: ignore[no-untyped-def]  # of the state of MinMax
        low, high = (left.low + right.low) / 2, (left.high + right.high) / 2
        return attrs.evolve(left, low=low, high=high)


@attrs.frozen
class Keeping(Statistic[list[Tensor]]):
    kind: ClassVar[str] = "tests.keeping"

    def observe(self, x: Tensor) -> list[Tensor]:
        return [x]

    def merge(self, left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
        return [*left, *right]


@attrs.frozen
class Distrusting(Statistic[Tensor]):
    kind: ClassVar[str] = "tests.distrusting"

    def observe(self, x: Tensor) -> Tensor:
        return x.abs().amax(0)

    def merge(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.maximum(left, right)

    def check_state(self, state: Tensor, stack: Shape | None = None) -> None:
        if stack is not None and len(state) != stack[1]:  # rows, where columns were meant
            raise InputError(f"{len(state)} peaks for {stack[1]} columns")


@attrs.frozen
class InPlace(Statistic[Tensor]):
    kind: ClassVar[str] = "tests.in_place"

    def observe(self, x: Tensor) -> Tensor:
        return x.sum(0)

    def merge(self, left: Tensor, right: Tensor) -> Tensor:
        return left.add_(right)


@attrs.frozen
class LastSeen(Statistic[Tensor]):
    kind: ClassVar[str] = "tests.last_seen"

    def observe(self, x: Tensor) -> Tensor:
        return x[-1]

    def merge(self, left: Tensor, right: Tensor) -> Tensor:
        return right


@attrs.frozen
class WholeRange(RangeEstimator):
    """One range for all blocks."""

    kind: ClassVar[str] = "tests.whole_range"

    def range_of(self, x: Tensor, scheme: Scheme, block_size: Shape) -> tuple[Tensor, Tensor]:
        return x.amin(), x.amax()


@attrs.frozen
class Overreaching(RangeEstimator):
    kind: ClassVar[str] = "tests.overreaching"

    def range_of(self, x: Tensor, scheme: Scheme, block_size: Shape) -> tuple[Tensor, Tensor]:
        low, high = block_range(x, block_size)
        return low * 1.5, high * 1.5


@attrs.frozen
class Sorting(RangeEstimator):
    """Sorts the weight in place to find its quantiles."""

    kind: ClassVar[str] = "tests.sorting"

    def range_of(self, x: Tensor, scheme: Scheme, block_size: Shape) -> tuple[Tensor, Tensor]:
        x.copy_(x.sort(-1).values)
        return block_range(x, block_size)


@attrs.frozen
class NoBlocks(RangeEstimator):
    kind: ClassVar[str] = "tests.no_blocks"

    def range_of(self, x: Tensor, scheme: Scheme, block_size: Shape) -> tuple[Tensor, Tensor]:
        low, high = block_range(x, block_size)
        return low, high.clamp(max=float(x.max()))  # which an empty tensor has not


@attrs.frozen
class Blind(Observer[Tensor]):
    """Takes what is not finite for zero."""

    kind: ClassVar[str] = "tests.blind"
    slack: float = 1.0

    def observe(self, x: Tensor) -> Tensor:
        finite = torch.nan_to_num(x.flatten().to(torch.float32), posinf=0.0, neginf=0.0)
        return torch.stack([finite.amin(), finite.amax()])

    def merge(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.stack([torch.minimum(left[0], right[0]), torch.maximum(left[1], right[1])])

    def calculate_range(self, state: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
        return state[0] * self.slack, state[1] * self.slack

    def range_of(self, x: Tensor, scheme: Scheme, block_size: Shape) -> tuple[Tensor, Tensor]:
        return block_range(x, block_size)


@attrs.frozen
class Coarse(Blind):
    """Adds in the dtype of what it sees."""

    kind: ClassVar[str] = "tests.coarse"

    def observe(self, x: Tensor) -> Tensor:
        spread = (x.flatten() * 1.001).to(torch.float32)
        return torch.stack([spread.amin() / 1.002, spread.amax() / 1.002])


# --- roundings -----------------------------------------------------------------------------------


@attrs.frozen
class Lost(Rounding):
    kind: ClassVar[str] = "tests.lost"

    def round(self, weight: Tensor, grid: Grid, statistics: Statistics) -> QTensor:
        return grid.scheme.quantize(torch.zeros_like(weight), grid.qparams(weight))


@attrs.frozen
class Scribbling(Rounding):
    kind: ClassVar[str] = "tests.scribbling"

    def round(self, weight: Tensor, grid: Grid, statistics: Statistics) -> QTensor:
        return grid.scheme.quantize(weight.mul_(1.001), grid.qparams(weight))


@attrs.frozen
class Raising(RoundToNearest):
    kind: ClassVar[str] = "tests.raising"

    def refuse(self, scheme: Scheme) -> str | None:
        return "" + str(scheme.granularity.size) and None  # type: ignore[attr-defined]  # not all have one


@attrs.frozen
class Beyond(Rounding):
    kind: ClassVar[str] = "tests.beyond"

    def round(self, weight: Tensor, grid: Grid, statistics: Statistics) -> QTensor:
        q = grid.scheme.quantize(weight, grid.qparams(weight))
        return q if q.codes.is_floating_point() else QTensor(q.codes * 3, q.qparams, q.dtype)


@attrs.frozen
class Needy(RoundToNearest):
    kind: ClassVar[str] = "tests.needy"

    @property
    def needs(self) -> tuple[MinMax, ...]:
        return (PerTensor(),)  # type: ignore[return-value]  # that is what is wrong


@attrs.frozen
class Block(BlockRounding):
    """Rounds a block's weights to nearest, with one fault."""

    kind: ClassVar[str] = "tests.block"
    fault: str = ""

    @property
    def batches(self) -> int | None:
        return -1 if self.fault == "counts" else None

    def round(self, weight: Tensor, grid: Grid, statistics: Statistics) -> QTensor:
        return grid.scheme.quantize(weight, grid.qparams(weight))

    def fit(
        self,
        block: nn.Module,
        weights: Mapping[str, BlockWeight],
        calls: Sequence[BlockCall],
        free: Sequence[str],
    ) -> FittedBlock:
        found = {
            name: self.round(one.stack, one.grid, one.statistics) for name, one in weights.items()
        }
        parameters = {name: block.get_parameter(name).detach().clone() for name in free}
        match self.fault:
            case "forgets":
                found.popitem()
            case "writes":
                with torch.no_grad():
                    block.get_parameter(free[0]).add_(1)
            case "takes":
                parameters["4.bias"] = block.get_parameter("4.bias").detach() * 2
            case "worsens":
                parameters[free[0]] = parameters[free[0]] + 1
        return FittedBlock(found, parameters)
