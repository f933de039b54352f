"""The contract: every class that a third party may subclass, and the values between them.

Post-training quantization is a few independent questions, each one a class here:

=========================================================  =======================
which grid of values?                                      `Scheme`
what range do the values take?                             `RangeEstimator`, `Observer`
which grid point for each weight?                          `Rounding`
what is done to the float model first?                     `Transform`
how is this kind of layer read and replaced?               `LayerQuantizer`
what must a container know of its quantized children?      `Container`
which code computes the product?                           `Kernel`, `Operation`
what file?                                                 `Serializer`
=========================================================  =======================

Instances are handed to the builder; nothing has to be registered to be used. A weight is always
seen as a stack of matrices ``[G, out, in]`` in float32 (see `Layout`).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Generic, Protocol, TypeVar, cast, final

import attrs
import torch
from torch import Tensor, nn

from mono_quant.configurable import Config, Configurable, Kinds
from mono_quant.errors import InputError
from mono_quant.numerics.blocks import AT_ONCE, block_counts, block_range, row_parts
from mono_quant.numerics.columns import ByColumn, columns_of
from mono_quant.numerics.granularity import Granularity, Shape
from mono_quant.numerics.metrics import tensor_bytes
from mono_quant.numerics.packing import pack_bits, unpack_bits
from mono_quant.numerics.values import Layout, QParams, QTensor, WeightView

StateT = TypeVar("StateT")

_BYTE = 8
_SIGN = 128  # what turns an unsigned byte into a signed one


class Scheme(Configurable, ABC):
    """A grid of values: how numbers become codes and codes become numbers.

    Frozen, hashable, and without a tensor of its own. Codes are unpacked integers from `code_min`
    on (or floats, where `code_bits` is None); `pack` stores them densely.
    """

    __slots__ = ()
    decodes_rows: ClassVar[bool] = False
    """Whether `dequantize` takes some rows of a stack alone, as `QTensor.rows` gives them.

    Kernels then never decode a whole weight at once.
    """

    columns_apart: ClassVar[str | None] = None
    """Name of the tensor that lists columns which are kept beside the codes; None if none are.

    Where the inputs of a matrix are quantized as they come, those of these columns stay float.
    """

    def __init_subclass__(cls) -> None:
        """Let no class inherit a shorter way past a `quantize` or `dequantize` of its own."""
        super().__init_subclass__()
        own = vars(cls).keys()
        if own & {"quantize", "dequantize"}:
            for shorter in {"by_column", "approximate", "quantize_rows"} - own:
                setattr(cls, shorter, getattr(Scheme, shorter))

    @property
    @abstractmethod
    def granularity(self) -> Granularity:
        """Which values share one scale."""

    @property
    @abstractmethod
    def code_bits(self) -> int | None:
        """Bits of one code in a file; None where codes are floats, kept as they are."""

    @property
    def code_min(self) -> int:
        """The smallest code."""
        return 0

    @property
    def step(self) -> float:
        """The mean distance of neighbouring grid points, for a scale of one."""
        return 1.0

    @property
    def headroom(self) -> float:
        """By what factor a range may pay to reach beyond the extremes of its block; 1 if by none.

        Coarse scales, and levels far apart, may serve a block better from a little further away.
        """
        return 1.0

    @final
    @property
    def code_offset(self) -> int:
        """The code that is stored as 0: the smallest; of 8 bits, which are signed, the middle."""
        return self.code_min + (_SIGN if self.code_bits == _BYTE else 0)

    @property
    def has_zero_point(self) -> bool:
        """Whether values are ``(code - zero_point) * scale``, of zero points that may be moved."""
        return False

    def hold_zero_point(self, zero_point: Tensor, scale: Tensor) -> Tensor:
        """Return the nearest zero points that `QParams` of this scheme can hold.

        By default they are floats in the dtype of the scale.

        Args:
            zero_point: float32 values that are wished for, one per block.
            scale: as it is stored, one per block.
        """
        return zero_point.to(scale.dtype)

    @final
    @property
    def stored_dtype(self) -> torch.dtype | None:
        """The dtype of packed codes; None where codes are floats."""
        if self.code_bits is None:
            return None
        return torch.int8 if self.code_bits == _BYTE else torch.uint8

    @abstractmethod
    def nbytes(self, shape: Shape) -> int:
        """Return the bytes that a packed stack of `shape` takes, scales and zero points counted."""

    @abstractmethod
    def calculate_qparams(self, min_val: Tensor, max_val: Tensor, *, block_size: Shape) -> QParams:
        """Return the parameters that cover ``[min_val, max_val]``, each of one value per block.

        Raises:
            InputError: a bound is NaN or infinite.
        """

    @abstractmethod
    def quantize(self, x: Tensor, qparams: QParams) -> QTensor:
        """Return the nearest grid point of each value of `x`, clamped to the grid."""

    @abstractmethod
    def dequantize(self, q: QTensor) -> Tensor:
        """Return the float32 values of the codes."""

    @final
    def quantize_stack(self, stack: Tensor, qparams: QParams) -> QTensor:
        """Return what `quantize` does of a stack ``[G, out, in]``.

        Some rows at a time, where no two share a scale: several times faster, and no float copy.
        """
        if not qparams.by_rows or stack.numel() <= AT_ONCE:
            return self.quantize(stack, qparams)
        return self.quantize_rows(stack, qparams)

    def quantize_rows(self, stack: Tensor, qparams: QParams) -> QTensor:
        """Return what `quantize` does of a stack of many values whose rows share no scale.

        A scheme overrides it to use the same memory for all of them. With a `quantize` of its own,
        an inherited one is not used.
        """
        codes: Tensor | None = None
        for part in row_parts((stack.shape[0], stack.shape[1], stack.shape[2])):
            found = self.quantize(stack[:, part], qparams.rows(part)).codes
            codes = torch.empty_like(stack, dtype=found.dtype) if codes is None else codes
            codes[:, part] = found
        assert codes is not None  # a stack of many values has rows
        return QTensor(codes, qparams, stack.dtype)

    def by_column(self, qparams: QParams, order: Tensor) -> ByColumn:
        """Return what quantizes single columns of a stack ``[G, out, in]``, as `quantize` would.

        For roundings that take them one after the other. A scheme overrides it to be faster: what
        does not depend on the values is then found once. One that inherits such a shorter way, and
        overrides `quantize` or `dequantize`, goes by those again.

        Args:
            qparams: of the stack.
            order: in which columns come, ``int64 [G, in]``.

        Returns:
            a function of values ``[G, out]`` and their place in that order, which returns codes
            and float32 values of that shape.
        """
        columns = columns_of(qparams, order)

        def nearest(x: Tensor, place: int) -> tuple[Tensor, Tensor]:
            q = self.quantize(x.unsqueeze(2), columns[place])
            return q.codes.squeeze(2), self.dequantize(q).squeeze(2)

        return nearest

    def choose_qparams(self, x: Tensor, observer: "RangeEstimator") -> QParams:
        """Return parameters for `x`, whose range is found by `observer`.

        A scheme that needs no range, or more than one, overrides this.
        """
        block_size = self.granularity.block_size(tuple(x.shape))
        low, high = observer.range_of(x, self, block_size)
        return self.calculate_qparams(low, high, block_size=block_size)

    def holding(self, extra: Mapping[str, Tensor]) -> "Scheme":
        """Return this grid with what it takes from a whole tensor given, for ranges of parts of it.

        Itself by default. A scheme whose `choose_qparams` finds something for the whole tensor (a
        table, a global scale) returns one whose `calculate_qparams` goes by `extra` instead.

        Args:
            extra: of the tensor's `QParams`.
        """
        return self

    @property
    def uses(self) -> "tuple[AnyStatistic, ...]":
        """Statistics of the weight's inputs that `rounded` looks at, where any reached it."""
        return ()

    def rounded(
        self,
        weight: Tensor,
        rounding: "Rounding",
        observer: "RangeEstimator",
        statistics: "Statistics",
    ) -> "tuple[Scheme, QTensor]":
        """Return a stack ``[G, out, in]`` as `rounding` rounds it, and the grid that it is on.

        A scheme that treats some of the values apart overrides this, and returns itself as it came
        out for this weight.
        """
        return self, rounding.round(weight, Grid(self, observer), statistics)

    def ranged(self, x: Tensor, qparams: QParams) -> "tuple[Tensor, Scheme, QParams]":
        """Return what a range was found for: values, grid, and the parameters that came out.

        A scheme that treats some of the values apart leaves those out.

        Args:
            x: the stack that was rounded.
            qparams: as `rounded` returned them.
        """
        return x, self.holding(qparams.extra), qparams

    def dynamic_qparams(self, x: Tensor) -> QParams:
        """Return parameters that cover the values of `x`, an activation as it comes.

        It runs in every forward, so a scheme whose `calculate_qparams` looks at values overrides
        this by something that `torch.compile` can trace. NaN and infinity make the result so.
        """
        block_size = self.granularity.block_size(tuple(x.shape))
        low, high = block_range(x, block_size)
        return self.calculate_qparams(low, high, block_size=block_size)

    def scales(self, qparams: QParams) -> Tensor | None:
        """Return what the levels of `qparams` are multiplied by, float32, one per block.

        None, the default, where values are not scales times levels that are the code's alone.
        """
        return None

    def rescaled(self, qparams: QParams, scales: Tensor) -> QParams:
        """Return `qparams` with other scales, as near as this grid can store them.

        Asked for only where `scales` returns some.

        Args:
            qparams: whose zero points and the rest stay.
            scales: float32, shaped like what `scales` returned.
        """
        return qparams

    def refuse(self, shape: Shape) -> str | None:
        """Return why a stack of `shape` cannot be quantized by this scheme, or None."""
        return self.granularity.refuse(shape)

    def refuse_parts(self, parts: Mapping[str, Tensor], shape: Shape) -> str | None:
        """Return why this scheme cannot have written the tensors of a file, or None.

        Shapes of codes, scales and zero points are checked already. By default scales are floats,
        and whatever else there is passes.

        Args:
            parts: all tensors of one weight, by name.
            shape: of the stack.
        """
        scale = parts.get("scale")
        if scale is not None and not scale.dtype.is_floating_point:
            return f"scale is of {scale.dtype}"
        return None

    def extra_of_rows(self, extra: Mapping[str, Tensor], rows: Tensor) -> Mapping[str, Tensor]:
        """Return `QParams.extra` for some rows of a single matrix: as it is, if it is of no rows.

        Args:
            extra: of the whole matrix.
            rows: their places, ``int64 [n]``.
        """
        return extra

    def describe(self) -> str:
        """Return the scheme in a few words, for reports."""
        return self.kind

    def remark(self, q: QTensor) -> str | None:
        """Return what a reader should know of a tensor that was quantized, or None."""
        return None

    @final
    def fake_quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """Return `x` on the grid: quantized and dequantized, in float32."""
        return self.dequantize(self.quantize(x, qparams))

    def approximate(self, x: Tensor, qparams: QParams) -> Tensor:
        """Return nearly what `fake_quantize` does: a search compares ranges by the error it leaves.

        The same by default. A scheme overrides it where some level near a value is found much
        faster than the nearest one; with a `quantize` of its own, an inherited one is not used.
        """
        return self.fake_quantize(x, qparams)

    @final
    def bits_per_weight(self, shape: Shape) -> float:
        """Return the bits that a value of a stack of `shape` takes, everything counted."""
        count = torch.Size(shape).numel()
        return 8 * self.nbytes(shape) / count if count else 0.0


@dataclass(frozen=True, eq=False, slots=True)
class PackedTensor:
    """A quantized weight as modules and files hold it: dense codes, the same on every machine.

    Attributes:
        tensors: ``codes`` (``uint8 [G, out, ceil(in * bits / 8)]``, of 8 bits ``int8``, or floats
            for a cast), ``scale``, ``zero_point`` (codes, packed as densely, or floats) and what
            else the scheme declares.
        scheme: the grid.
        layout: from the native weight to the stack ``[G, out, in]`` and back.
        dtype: dtype of the float weight.
    """

    tensors: Mapping[str, Tensor]
    scheme: Scheme
    layout: Layout
    dtype: torch.dtype

    @classmethod
    def pack(
        cls,
        q: QTensor,
        scheme: Scheme,
        layout: Layout,
        dtype: torch.dtype,
        *,
        consume: bool = False,
    ) -> "PackedTensor":
        """Return `q`, a stack on the grid of `scheme`, with its codes packed.

        Args:
            q: the stack.
            scheme: its grid.
            layout: from the native weight to the stack and back.
            dtype: of the float weight.
            consume: where codes fill their bytes, pack them in their own memory: `q` is no longer
                to be used.
        """
        in_place = consume and scheme.code_bits == 8 * q.codes.element_size()
        codes = _bytes_of(q.codes, scheme) if in_place else _pack_codes(q.codes, scheme)
        tensors = {"codes": codes, **q.qparams.extra}
        if q.qparams.scale is not None:
            tensors["scale"] = q.qparams.scale.contiguous()
        zero_point = q.qparams.zero_point
        if zero_point is not None:
            if not zero_point.is_floating_point():
                zero_point = _pack_codes(zero_point.flatten(), scheme)
            tensors["zero_point"] = zero_point.contiguous()
        return cls(tensors, scheme, layout, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of everything: codes, scales, zero points and the rest."""
        return sum(tensor_bytes(tensor) for tensor in self.tensors.values())

    @property
    def block_size(self) -> Shape:
        """The block of the stack that shares one scale."""
        return self.scheme.granularity.block_size(self.layout.stack)

    def unpack(self) -> QTensor:
        """Return the stack ``[G, out, in]`` of unpacked codes."""
        codes = _unpack_codes(self.tensors["codes"], self.scheme, self.layout.stack[-1])
        return QTensor(codes, self.qparams, self.dtype)

    @property
    def qparams(self) -> QParams:
        """The parameters of the stack, unpacked."""
        return self._qparams(self.block_size)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight in its native shape, in `dtype` or that of the float weight."""
        values = self.scheme.dequantize(self.unpack())
        return self.layout.to_native(values).to(dtype or self.dtype)

    def part(self, rows: slice) -> QTensor:
        """Return some neighbouring rows of each matrix, ``[G, n, in]``, unpacked.

        Of a scheme that `decodes_rows`, with a scale for the whole tensor or for parts of a row.
        """
        codes = _unpack_codes(self.tensors["codes"][:, rows], self.scheme, self.layout.stack[-1])
        qparams = self.qparams
        if not qparams.by_rows:  # one scale for all
            qparams = replace(qparams, block_size=tuple(codes.shape))
            return QTensor(codes, qparams, self.dtype)
        return QTensor(codes, qparams.rows(rows), self.dtype)

    def rows(self, indices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return rows of a single matrix, ``[*indices.shape, in]``, without decoding the others."""
        length = self.layout.stack[-1]
        flat = indices.flatten()
        stored = self.tensors["codes"][0].index_select(0, flat)  # refuses indices out of range
        codes = _unpack_codes(stored, self.scheme, length)
        block = self.block_size
        qparams = self._qparams(block, flat)
        values = self.scheme.dequantize(QTensor(codes[None], qparams, self.dtype))
        return values.reshape(*indices.shape, length).to(dtype or self.dtype)

    def _qparams(self, block: Shape, rows: Tensor | None = None) -> QParams:
        counts = block_counts(self.layout.stack, block)
        scale = self.tensors.get("scale")
        zero_point = self.tensors.get("zero_point")
        if zero_point is not None and not zero_point.is_floating_point():
            count = torch.Size(counts).numel()
            zero_point = _unpack_codes(zero_point, self.scheme, count).reshape(counts)
        extra: Mapping[str, Tensor] = {
            name: tensor
            for name, tensor in self.tensors.items()
            if name not in {"codes", "scale", "zero_point"}
        }
        if rows is not None:
            places = rows // block[1]
            block = (1, 1, block[2])
            scale = scale.index_select(1, places) if scale is not None else None
            zero_point = zero_point.index_select(1, places) if zero_point is not None else None
            extra = self.scheme.extra_of_rows(extra, rows) if extra else extra
        return QParams(scale, zero_point, block, extra)


@dataclass(frozen=True, eq=False, slots=True)
class Activation:
    """How the inputs of a weight are quantized.

    Attributes:
        scheme: the grid; its granularity is of rows of inputs (see `Operation.rows`).
        scale: calibrated, ``float32`` of one value; None where it is found anew for each input.
        zero_point: the code of zero, of one value, or None for a symmetric grid or a dynamic one.
        apart: features that stay float, ``int64 [k]``, of a dynamic one; None if there are none.
            The weight says so, which keeps their columns apart too.
    """

    scheme: Scheme
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    apart: Tensor | None = None

    @classmethod
    def calibrated(
        cls, scheme: Scheme, observer: "Observer[StateT]", state: StateT
    ) -> "Activation":
        """Return a static one, whose range `observer` finds in what it has seen.

        Raises:
            InputError: the range is not finite.
        """
        low, high = observer.calculate_range(state, scheme)
        qparams = scheme.calculate_qparams(low.reshape(1), high.reshape(1), block_size=(1,))
        return cls(scheme, qparams.scale, qparams.zero_point)

    @property
    def mode(self) -> str:
        """Either "static" (calibrated) or "dynamic"."""
        return "dynamic" if self.scale is None else "static"

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """What was calibrated, by name; empty for a dynamic one."""
        named = {"scale": self.scale, "zero_point": self.zero_point}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def qparams(self, x: Tensor) -> QParams:
        """Return the parameters for `x`, an input as rows ``[..., features]``."""
        if self.scale is None:
            return self.scheme.dynamic_qparams(self.rest(x))
        ones = (1,) * x.dim()
        zero_point = self.zero_point.reshape(ones) if self.zero_point is not None else None
        return QParams(self.scale.reshape(ones), zero_point, tuple(x.shape))

    def sparing(self, features: Tensor | None) -> "Activation":
        """Return how inputs are quantized but for these features, which stay as they are.

        A calibrated range was found with all of them, and stays that of all.
        """
        if features is None or self.scale is not None:
            return self
        return Activation(self.scheme, apart=features)

    def rest(self, x: Tensor) -> Tensor:
        """Return an input ``[..., features]`` with zeros for the features that stay float."""
        return x if self.apart is None else x.index_fill(-1, self.apart, 0)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Return rows `x` on the grid, in float32 or wider; its gradient is that of `x` itself.

        NaN stays NaN, on a calibrated grid too.
        """
        if not x.is_floating_point():
            raise TypeError(f"the input is {x.dtype}, where a floating dtype was expected")
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        values = x.detach()
        on_grid = self.scheme.fake_quantize(values, self.qparams(values)).to(x.dtype)
        on_grid = on_grid.masked_fill_(values.isnan(), math.nan)  # no code stands for it
        if self.apart is not None:
            on_grid = on_grid.index_copy(-1, self.apart, values.index_select(-1, self.apart))
        return x + (on_grid - x).detach() if x.requires_grad else on_grid

    def describe(self) -> str:
        """Return mode and grid in a few words, for reports."""
        return f"{self.mode} {self.scheme.describe()}"


def _pack_codes(codes: Tensor, scheme: Scheme) -> Tensor:
    if scheme.code_bits is None:
        return codes.contiguous()
    stored = codes - scheme.code_offset if scheme.code_offset else codes
    if scheme.code_bits == _BYTE:
        return stored.to(torch.int8).contiguous()
    return pack_bits(stored.to(torch.uint8).contiguous(), scheme.code_bits)


def _bytes_of(codes: Tensor, scheme: Scheme) -> Tensor:
    """Return codes of 8 bits as they are stored, in the same memory."""
    stored = codes.contiguous().view(torch.int8)
    return stored.add_(-scheme.code_offset) if scheme.code_offset else stored  # wraps, as it must


def _unpack_codes(packed: Tensor, scheme: Scheme, count: int) -> Tensor:
    bits, signed = scheme.code_bits, scheme.code_min < 0
    if bits is None:
        return packed
    if bits == _BYTE:
        codes = packed if signed else packed.view(torch.uint8)
        return codes + scheme.code_offset if scheme.code_offset else codes
    codes = unpack_bits(packed, bits, count)
    return codes.to(torch.int8) + scheme.code_min if signed else codes


class AnyStatistic(Configurable, ABC):
    """Parent of all statistics, whatever their state: what collections of them are typed by."""

    __slots__ = ()
    order_free: ClassVar[bool] = True
    """Whether merging in another order gives the same state."""


class Statistic(AnyStatistic, Generic[StateT]):
    """A fold over the inputs of a weight: what one tensor tells, and how two states become one.

    There is no hidden state, so a statistic is a frozen value that may be shared, and calibration
    on several machines is `merge`.
    """

    __slots__ = ()

    @abstractmethod
    def observe(self, x: Tensor) -> StateT:
        """Return the state of one tensor: rows of inputs ``[n, features]`` or anything finite."""

    @abstractmethod
    def merge(self, left: StateT, right: StateT) -> StateT:
        """Return the state of both; associative."""

    def check_state(self, state: StateT, stack: Shape | None = None) -> None:
        """Refuse a state that no inputs make; asked of one that comes from a file.

        Its classes, dtypes and numbers of dimensions are those of `observe` already. Sizes and
        values that do not go together are refused here; by default none are.

        Args:
            state: read from a file.
            stack: ``[G, out, in]`` of the weight whose inputs were seen as rows; None where it is
                not known yet, and for inputs as they come.

        Raises:
            InputError: saying what does not fit.
        """


class RangeEstimator(Configurable, ABC):
    """Proposes the range that a grid should cover, for a tensor seen whole: a weight."""

    __slots__ = ()

    @abstractmethod
    def range_of(self, x: Tensor, scheme: Scheme, block_size: Shape) -> tuple[Tensor, Tensor]:
        """Return the low and high end of the range of each block of `x`.

        Args:
            x: finite float32 values.
            scheme: the grid that will cover the range.
            block_size: the block that shares one range.

        Returns:
            two tensors of one value per block.
        """

    def remark(self, x: Tensor, scheme: Scheme, qparams: QParams) -> str | None:
        """Return why the range of `x` became that of `qparams`, where there was a choice, or None.

        Args:
            x: as `range_of` saw it.
            scheme: the grid.
            qparams: the parameters that cover the range.
        """
        return None


class Observer(RangeEstimator, Statistic[StateT]):
    """Proposes the range of values seen in pieces: activations. Only a `Scheme` makes qparams."""

    __slots__ = ()

    @abstractmethod
    def calculate_range(self, state: StateT, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """Return the low and high end of the range of what was observed."""

    def explain(self, state: StateT, scheme: Scheme) -> str | None:
        """Return why `calculate_range` gives what it gives, where there is a choice, or None."""
        return None


@attrs.frozen
class Grid:
    """A scheme and how its range is found: what a `Rounding` needs to make or remake qparams."""

    scheme: Scheme
    observer: RangeEstimator

    def qparams(self, weight: Tensor) -> QParams:
        """Return the parameters for a stack of matrices."""
        return self.scheme.choose_qparams(weight, self.observer)


@attrs.frozen(eq=False)
class Statistics:
    """The states that calibration gathered for one weight."""

    _states: Mapping[AnyStatistic, object] = attrs.field(factory=dict)

    def state(self, of: Statistic[StateT]) -> StateT:
        """Return the state of a statistic that was asked for.

        Raises:
            InputError: it was not gathered; a `Rounding` names what it needs in `needs`.
        """
        if of not in self._states:
            raise InputError(f"{of} was not gathered; name it in `needs`")
        return cast(
            "StateT", self._states[of]
        )  # a state is stored under the statistic that made it

    @property
    def states(self) -> Mapping[AnyStatistic, object]:
        """All states that were gathered, by the statistics that made them."""
        return dict(self._states)

    def __contains__(self, of: AnyStatistic) -> bool:
        """Return whether the state of `of` was gathered."""
        return of in self._states


class Rounding(Configurable, ABC):
    """Chooses a grid point for each weight."""

    __slots__ = ()
    sequential: ClassVar[bool] = False
    """Whether its statistics are to be of inputs that the layers before, quantized, have made."""

    @property
    def needs(self) -> tuple[AnyStatistic, ...]:
        """Statistics of the weight's inputs that `round` asks for."""
        return ()

    def describe(self) -> str:
        """Return what it does, and what that takes, in a few words, for plans."""
        return repr(self)

    def work_bytes(self, shape: Shape) -> int:
        """Return about how many bytes it takes beside a stack of `shape` and its codes, for plans.

        Statistics of inputs included, which all weights of a block hold at once where `sequential`.
        """
        return 0

    def refuse(self, scheme: Scheme) -> str | None:
        """Return why weights cannot be rounded to the grids of `scheme`, or None. Never raises."""
        return None

    @abstractmethod
    def round(self, weight: Tensor, grid: Grid, statistics: Statistics) -> QTensor:
        """Return `weight`, a float32 stack ``[G, out, in]``, on the grid, in memory of its own."""


@attrs.frozen(eq=False)
class BlockWeight:
    """One weight of a block whose weights are rounded together.

    Attributes:
        stack: the weight, ``float32 [G, out, in]``.
        layout: from the native weight to the stack and back.
        grid: what it is rounded to.
        statistics: of its inputs, as the rounding's `needs` asked for.
    """

    stack: Tensor
    layout: Layout
    grid: Grid
    statistics: Statistics


@attrs.frozen(eq=False)
class BlockCall:
    """One call of a block, and what it is to return.

    Attributes:
        args: positional arguments, as the blocks before make them that are quantized already.
        kwargs: keyword arguments.
        targets: the tensors that the float block returned in the float model.
    """

    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    targets: Sequence[Tensor]


@attrs.frozen(eq=False)
class FittedBlock:
    """What became of a block.

    Attributes:
        weights: on their grids, by their dotted names in the block.
        parameters: new values of parameters that stay float, by their dotted names in the block.
    """

    weights: Mapping[str, QTensor]
    parameters: Mapping[str, Tensor] = attrs.field(factory=dict)


class BlockRounding(Rounding):
    """Chooses the grid points of all weights of a block together, by what the block returns.

    A block is an entry of a list of modules, such as a layer of a transformer, or else one layer.
    Where it cannot be called by itself, `round` serves each of its weights alone.
    """

    __slots__ = ()
    sequential: ClassVar[bool] = True

    @property
    def batches(self) -> int | None:
        """How many batches `fit` runs forward and back, to foresee its time; None: not known."""
        return None

    @abstractmethod
    def fit(
        self,
        block: nn.Module,
        weights: Mapping[str, BlockWeight],
        calls: Sequence[BlockCall],
        free: Sequence[str],
    ) -> FittedBlock:
        """Return the weights of a block on their grids.

        Args:
            block: the float block, in eval mode; it must stay as it is, and can be run with other
                parameters by `torch.func.functional_call`. Its layers put their inputs on their
                grids where those will be quantized.
            weights: those that this rounding is asked for, by their dotted names in the block.
            calls: one for each batch; read from disk where they are many.
            free: names of what stays float in the block and may change: biases, norms and the like
                that nothing else shares.
        """


@attrs.frozen
class Edit:
    """A change of the model's structure, as plain data that a file can carry.

    Attributes:
        op: what was done: ``"identity"`` (a batch normalization became an `nn.Identity`),
            ``"bias"`` (a layer that had no bias was given one) or ``"rotate"`` (the inputs of an
            `nn.Linear` are turned first).
        path: dotted name of the module.
    """

    op: str
    path: str

    def to_config(self) -> Config:
        """Return both as JSON data."""
        return {"op": self.op, "path": self.path}


@attrs.frozen
class Change:
    """One thing that a transform did, or that it refused to do.

    Attributes:
        path: dotted name of the module that it is about.
        text: what happened to it, as a sentence; of a refusal, with the reason.
        done: whether it was done.
        edits: how the model's structure changed, for the skeleton that a file is loaded into.
    """

    path: str
    text: str
    done: bool = True
    edits: tuple[Edit, ...] = ()


@attrs.frozen
class Target:
    """How one weight is going to be quantized, and the inputs that meet it.

    Attributes:
        grid: of the weight.
        inputs: the grid of its inputs; None where they stay float.
        observer: how the range of static inputs is found; None where each input has its own.
    """

    grid: Grid
    inputs: Scheme | None = None
    observer: Observer[object] | None = None

    def activation(self, x: Tensor) -> Activation | None:
        """Return how inputs like `x` will be quantized, if it is all that is seen; None: not."""
        if self.inputs is None or self.observer is None:
            return Activation(self.inputs) if self.inputs is not None else None
        return Activation.calibrated(self.inputs, self.observer, self.observer.observe(x))


@attrs.frozen(eq=False)
class TransformContext:
    """What a transform may ask for beside the model.

    Attributes:
        outputs: runs a model on the example data, in eval mode, and yields the tensors that it
            returns for each batch; None where there is no data.
        targets: what is going to be done to each weight that will be quantized, by its dotted name.
        progress: show a progress bar where the output is a terminal.
    """

    outputs: Callable[[nn.Module], Iterator[Sequence[Tensor]]] | None = None
    targets: Mapping[str, Target] = attrs.field(factory=dict)
    progress: bool = False


WITHOUT_DATA = TransformContext()
"""Nothing but the model is known."""


class Transform(Configurable, ABC):
    """Changes the working copy of the float model before it is quantized.

    Exact in float unless it says otherwise. A transform gives parameters new tensors and never
    writes into the old ones, which the source model shares. Where it changes the model's structure,
    it says so by the edits of what it returns, which must be enough to do the same to another
    instance of the model: a saved file is loaded into a float skeleton.
    """

    __slots__ = ()
    needs_data: ClassVar[bool] = False
    """Whether a plan without data refuses it."""
    slows: ClassVar[bool] = False
    """Whether what it changed takes longer at each call."""

    def foresee(self, model: nn.Module, *, has_data: bool) -> Sequence[Change]:
        """Return what `apply` will do, and refuse, as far as a plan can know: nothing by default.

        Names, shapes and the model's code tell; no weight is read, and no data runs. Edits that are
        likely to come are named, for the sizes that a plan predicts.

        Args:
            model: as it was given.
            has_data: whether there will be data, which may decide what is left open.
        """
        return ()

    @abstractmethod
    def apply(self, model: nn.Module, context: TransformContext = WITHOUT_DATA) -> Sequence[Change]:
        """Change `model` in place and return what was done to it, and what was refused and why."""


class InnerOutputs(Protocol):
    """Runs a model on the example data."""

    def __call__(self, model: nn.Module, of: nn.Module) -> Iterator[Sequence[Tensor]]:
        """Yield what a module inside a model returns for each batch, when it is called first.

        In eval mode and without gradients; nothing behind that module is run.
        """


@attrs.frozen(eq=False)
class CorrectionContext:
    """What a correction may ask for beside the quantized model; none of it is to be changed.

    Attributes:
        floats: the same with float layers, after the transforms.
        original: the model as it was given, before the transforms.
        outputs: runs either of them, or the quantized one; None where there is no data.
    """

    floats: nn.Module
    original: nn.Module
    outputs: InnerOutputs | None = None


class Correction(Configurable, ABC):
    """Changes a quantized model to be closer to its float twin."""

    __slots__ = ()
    needs_data: ClassVar[bool] = True
    """Whether a plan without data refuses it."""

    @abstractmethod
    def apply(self, model: nn.Module, context: CorrectionContext) -> Sequence[Change]:
        """Change `model` in place and return what was done to it, and what was not and why."""


class QuantizedModule(nn.Module, ABC):
    """A layer whose weights are quantized."""

    made_by: "LayerQuantizer | None" = None
    """What replaced the float layer; travels in files, so that loading asks the same one."""

    @abstractmethod
    def packed_weights(self) -> Mapping[str, PackedTensor]:
        """Return the weights by name, canonical whatever the kernel."""

    @abstractmethod
    def dequantize(self) -> nn.Module:
        """Return the float layer again, its weights on the grid; it may be this object."""

    def activations(self) -> Mapping[str, Activation]:
        """Return how inputs are quantized, by the name of the weight that they meet."""
        return {}

    @property
    def stand_in(self) -> nn.Module | None:
        """What stands where the activation stood that this layer computes; None without one."""
        return None

    def qtensors(self) -> Mapping[str, QTensor]:
        """Return the weights by name as unpacked codes on the stack ``[G, out, in]``."""
        return {name: packed.unpack() for name, packed in self.packed_weights().items()}


class LayerQuantizer(Configurable, ABC):
    """Knows one kind of layer: how its weights are read, and what stands in for it.

    Layers come as plain `nn.Module`, so that a third party's layer can be known by its looks,
    without importing its class. `replace` serves quantizing and loading alike.
    """

    __slots__ = ()
    slowed: ClassVar[str | None] = None
    """How quantized inputs make such a layer slower than the float one, for notes; None if not."""

    looks_up: ClassVar[bool] = False
    """Whether such a layer returns rows of its weight, and no product with it."""

    takes_children: ClassVar[bool] = True
    """Whether the modules inside a layer are its own affair, hidden from other quantizers."""

    @abstractmethod
    def matches(self, layer: nn.Module) -> bool:
        """Return whether this is the kind of layer."""

    def refuse(self, layer: nn.Module, scheme: Scheme) -> str | None:
        """Return why this layer cannot be quantized by `scheme`, or None. Never raises."""
        return None

    def discourage(self, layer: nn.Module, name: str) -> str | None:
        """Return why this layer is left in float below 8 bits unless it is asked for, or None."""
        return None

    @abstractmethod
    def layouts(self, layer: nn.Module) -> Mapping[str, Layout]:
        """Return each weight's layout by the weight's name, without touching a tensor."""

    def weights(self, layer: nn.Module) -> Mapping[str, WeightView]:
        """Return each weight and its layout."""
        return {
            name: WeightView(cast("Tensor", getattr(layer, name)), layout)
            for name, layout in self.layouts(layer).items()
        }

    def refuse_activation(self, layer: nn.Module, name: str, mode: str) -> str | None:
        """Return why the inputs of a weight cannot be quantized, or None.

        Args:
            layer: of the kind that this matches.
            name: of the weight.
            mode: "dynamic" or "static".
        """
        return f"{type(self).__name__} quantizes weights only"

    def inputs(
        self, layer: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> Iterable[tuple[str, Tensor]]:
        """Return each weight's name with what it is multiplied by, for one call of the layer.

        As the layer's operation takes it: an image for a convolution. Nothing by default: there is
        then nothing to calibrate on.
        """
        return ()

    def rows(self, layer: nn.Module, name: str, x: Tensor) -> Tensor | None:
        """Return what `inputs` gave for a weight as rows ``[n, in]`` that meet the weight's rows.

        None by default: a rounding that needs statistics then refuses the layer.
        """
        return None

    def channel_dim(self, layer: nn.Module, name: str) -> int | None:
        """Return which dimension of what `inputs` gives for a weight counts channels, from the end.

        None by default: nothing is then said of channels that dwarf the others.
        """
        return None

    def quantizing_inputs(
        self, layer: nn.Module, activations: Mapping[str, Activation]
    ) -> AbstractContextManager[None] | None:
        """Return what has a float layer put its inputs on their grids; None: nobody knows how.

        While the context lasts, calls of the layer compute what the quantized layer would with
        these weights, and their gradients pass the grids as if those were not there. Roundings that
        learn are then shown what quantized inputs do to a block. None by default: the block sees
        the layer's float inputs.

        Args:
            layer: a float layer that `matches`, as `weights` left it.
            activations: how its inputs are quantized, by the name of the weight that they meet.
        """
        return None

    @abstractmethod
    def replace(
        self,
        layer: nn.Module,
        weights: Mapping[str, PackedTensor],
        activations: Mapping[str, Activation],
    ) -> QuantizedModule:
        """Return what stands in for `layer`, a working copy: it may be that object, converted.

        Args:
            layer: a float layer that `matches`.
            weights: those that are quantized, by name: not always all of the layer's.
            activations: how their inputs are quantized, of those whose inputs are.
        """


class Container(Configurable, ABC):
    """Knows a module that reads its children by attribute instead of calling them."""

    __slots__ = ()

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Return whether this is the kind of module."""

    def refuse_child(self, module: nn.Module, name: str) -> str | None:
        """Return why the child `name` must stay float, or None."""
        return None

    def adapt(self, module: nn.Module) -> None:
        """Change `module` so that it calls its descendants, some of which are quantized.

        Also while inputs are gathered, for those that are about to be.
        """

    def revert(self, module: nn.Module) -> None:
        """Undo `adapt`, for a model that is dequantized."""


class Operation(ABC):
    """What a layer computes with its weight, as a frozen value that can be called."""

    __slots__ = ()
    reads_rows: ClassVar[bool] = False
    """Whether single rows of the weight are read, which codes in another order do not offer."""

    @abstractmethod
    def __call__(self, x: Tensor, weight: PackedTensor, bias: Tensor | None) -> Tensor:
        """Return the result for a weight that is dequantized as far as it is needed."""

    def rows(self, x: Tensor) -> Tensor:
        """Return an input as rows ``[..., features]`` that are mapped each on its own."""
        return x

    def count(self, x: Tensor) -> int:
        """Return how many rows of inputs the weight meets: a kernel is chosen by it."""
        return x.numel() // max(1, x.shape[-1]) if x.dim() else 1


@dataclass(frozen=True, eq=False, slots=True)
class KernelSpec:
    """What a kernel is asked to do.

    Attributes:
        operation: the layer's arithmetic.
        scheme: the weight's grid.
        layout: the weight's shape.
        activation: how the input is quantized; None where it stays float.
    """

    operation: Operation
    scheme: Scheme
    layout: Layout
    activation: Activation | None = None


class Kernel(Protocol):
    """Machine code for an operation on a quantized weight; `reference` is the others' oracle."""

    @property
    def name(self) -> str:
        """Name in reports."""

    def supports(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why this kernel cannot do `spec` for inputs of `dtype` on `device`, or None."""

    def __call__(
        self, spec: KernelSpec, x: Tensor, weight: PackedTensor, bias: Tensor | None
    ) -> Tensor:
        """Return the result of the operation, in the dtype of `x` where that is a float."""


class Arranged(ABC):
    """A weight whose codes lie as some kernel wants them, on this machine and in this process.

    It takes the place of the canonical codes, which it can always give back, and is never copied,
    pickled or written to a file.
    """

    __slots__ = ()
    traceable: ClassVar[bool] = True
    """Whether `canonical` is plain torch, which `torch.compile` can trace at little cost.

    Where it is not, a weight that is compiled stays canonical from then on.
    """

    @abstractmethod
    def canonical(self) -> Tensor:
        """Return the codes as `PackedTensor` has them, bit for bit."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the codes."""

    @property
    @abstractmethod
    def beside(self) -> int:
        """Bytes of what is kept beside codes, scales and zero points."""


ArrangedT = TypeVar("ArrangedT", bound=Arranged)


class ArrangingKernel(ABC, Generic[ArrangedT]):
    """A `Kernel` that wants the codes in an order of its own, which a module then holds instead."""

    __slots__ = ()

    @property
    @abstractmethod
    def name(self) -> str:
        """Name in reports."""

    @property
    @abstractmethod
    def arrangement(self) -> type[ArrangedT]:
        """What `product` reads; kernels that read the same take turns on one weight."""

    @abstractmethod
    def supports(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why this kernel cannot do `spec` for inputs of `dtype` on `device`, or None."""

    @abstractmethod
    def arrange(self, spec: KernelSpec, weight: PackedTensor) -> ArrangedT:
        """Return `weight`, which must stay as it is, in the order that `product` reads.

        Layers that share a weight share this too, whichever of them came first with its `spec`.
        """

    @abstractmethod
    def product(
        self, spec: KernelSpec, x: Tensor, weight: ArrangedT, bias: Tensor | None
    ) -> Tensor:
        """Return the result of the operation, in the dtype of `x`."""

    def __call__(
        self, spec: KernelSpec, x: Tensor, weight: PackedTensor, bias: Tensor | None
    ) -> Tensor:
        """Return the result of the operation for a canonical weight, which is arranged for it."""
        return self.product(spec, x, self.arrange(spec, weight), bias)


@attrs.frozen(eq=False)
class WeightRecord:
    """One quantized weight of a file.

    Attributes:
        module: dotted name of the layer; empty for the root.
        name: the weight's name in the layer.
        weight: codes, scales and what they mean.
        layer: configuration of the `LayerQuantizer` that made it.
        activation: how its inputs are quantized; None where they stay float.
    """

    module: str
    name: str
    weight: PackedTensor
    layer: Config
    activation: Activation | None = None

    @property
    def key(self) -> str:
        """The weight's dotted name, as in a state dict."""
        return f"{self.module}.{self.name}" if self.module else self.name


@attrs.frozen(eq=False)
class Checkpoint:
    """A quantized model as plain data: what serializers turn into bytes and back.

    Attributes:
        records: quantized weights by their dotted name.
        tensors: the float rest by dotted name: parameters and buffers.
        transient: names among `tensors` of buffers that a state dict leaves out.
        ties: further names of a tensor or record, by alias.
        containers: configurations of the containers that had to be adapted.
        edits: configurations of the `Edit` that the float model's structure went through.
        applied: which layer computes an activation of the float model: the layer's dotted name by
            the activation's.
        config: the quantizer that made it, for the reader.
        summary: figures of the report, for the reader.
    """

    records: Mapping[str, WeightRecord]
    tensors: Mapping[str, Tensor]
    transient: frozenset[str] = frozenset()
    ties: Mapping[str, str] = attrs.field(factory=dict)
    containers: tuple[Config, ...] = ()
    edits: tuple[Config, ...] = ()
    applied: Mapping[str, str] = attrs.field(factory=dict)
    config: Config = attrs.field(factory=dict)
    summary: Config = attrs.field(factory=dict)


class Serializer(ABC):
    """Turns a checkpoint into a file and back; knows no modules.

    A file is written beside its place, synced and renamed. Loading never runs code found in a file.
    """

    format: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]

    def can_express(self, checkpoint: Checkpoint) -> str | None:
        """Return why this format cannot hold `checkpoint`, or None."""
        return None

    @abstractmethod
    def save(self, checkpoint: Checkpoint, path: Path) -> None:
        """Write the file.

        Raises:
            CheckpointError: the format cannot hold it.
            OSError: the file cannot be written; whatever stood at `path` still stands.
        """

    @abstractmethod
    def load(self, path: Path, *, kinds: Kinds | None = None) -> Checkpoint:
        """Return what the file holds, in memory of its own.

        Raises:
            CheckpointError: the file is not whole, not ours, too new, or names an unknown kind.
        """
