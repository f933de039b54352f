"""Inputs as integers, and weights of signed bytes as the right factor of exact products."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mono_quant.base import Activation, Scheme
from mono_quant.kernels.codes import has_finite_sum
from mono_quant.kernels.ops import int_mm
from mono_quant.numerics.granularity import PerTensor, PerToken
from mono_quant.numerics.values import QParams
from mono_quant.schemes import Affine
from mono_quant.schemes.affine import float32

AT_ONCE = 256
"""Rows of inputs that a thread takes at once."""

SIGN = 128
"""What turns a signed byte into an unsigned one."""

_SUMS = 1 << 18  # that a thread works on at once: they stay in its core's cache
_MIDDLE = torch.full((1, 1), SIGN, dtype=torch.int32, device="cpu")
_PLACES = 3
_USUAL = (1e-25, 1e25)
_FEW = 16
"""Rows whose grids Python finds sooner than operators do."""


@dataclass(frozen=True, eq=False, slots=True)
class Digits:
    """Some rows of inputs as integers.

    Attributes:
        digits: ``uint8 [places * M, in]``, the lowest digits to base 256 first.
        zero: the digit that means zero, ``int32 [M or 1, 1]``.
        unit: what a lowest digit of 1 stands for, ``float32 [M or 1, 1]``.
        places: how many digits a value has.
    """

    digits: Tensor
    zero: Tensor
    unit: Tensor
    places: int = 1


@dataclass(frozen=True, eq=False, slots=True)
class Factor:
    """A weight as the right factor of products.

    Attributes:
        codes: as stored, ``int8 [out, in]``.
        sums: of each row of codes less their zero point, ``int32 [1, out]``.
        zero: the stored codes that mean zero, ``int32 [1, out or 1]``; None where all are 0.
        scale: ``float32 [out or 1]``.
        bias: ``float32 [out]`` or None.
    """

    codes: Tensor
    sums: Tensor
    zero: Tensor | None
    scale: Tensor
    bias: Tensor | None

    @classmethod
    def of(
        cls, codes: Tensor, sums: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None
    ) -> "Factor":
        """Return the factor for what is stored.

        Args:
            codes: ``int8 [out, in]``.
            sums: of each row of codes, ``int32 [1, out]``.
            scale: of any shape that ends in ``[..., out or 1, 1]``.
            zero: ``int8 [out or 1]``, or None.
            bias: ``[out]``, or None.
        """
        if zero is not None:
            zero = zero.to(torch.int32)[None]
            sums = sums - zero * codes.shape[-1]
        bias = bias.to(torch.float32) if bias is not None else None
        return cls(codes, sums, zero, scale.reshape(-1).to(torch.float32), bias)

    def product(self, x: Digits, out: Tensor | None = None) -> Tensor:
        """Return the product with some rows of inputs, ``float32 [M, out]``.

        Args:
            x: the inputs.
            out: where it is to be; None for where the sums were, if values have one digit: fresh
                memory for as much takes a good part of the time.
        """
        width = self.codes.shape[0]
        sums = self.less_zeros(x, int_mm(x.digits, self.codes)).view(x.places, -1, width)
        count = sums.shape[1]
        if out is None:
            one = x.places == 1
            out = sums[0].view(torch.float32) if one else self.scale.new_empty(count, width)
        step = _SUMS * torch.get_num_threads() // (x.places * width)
        for place in parts(count, max(1, step)):
            self.finish(x, sums if place is None else sums[:, place], place, rows_of(out, place))
        return out

    def less_zeros(self, x: Digits, sums: Tensor) -> Tensor:
        """Return sums of codes, ``int32 [places * M, out]``, less what zero points add to them.

        Args:
            x: the inputs.
            sums: ``x.digits @ codes.T``; overwritten.
        """
        if self.zero is None:
            return sums
        of_rows = x.digits.sum(1, keepdim=True, dtype=torch.int32)
        return sums.addcmul_(of_rows, self.zero, value=-1)

    def of_sums(
        self, sums: Tensor, codes: Tensor, zero: Tensor | None, unit: Tensor, places: int = 1
    ) -> Tensor:
        """Return the product from sums of codes, which it leaves alone: for traces and devices.

        Args:
            sums: ``codes @ self.codes.T``, ``int32 [places * M, out]``.
            codes: of the inputs, ``[places * M, in]``.
            zero: the code that means zero, ``int32 [M or 1, 1]``; None for 0.
            unit: what a (lowest) code of 1 stands for, ``float32 [M or 1, 1]``.
            places: how many codes a value has, as `Digits`.
        """
        if self.zero is not None:
            sums = _less_product(sums, codes.sum(1, keepdim=True, dtype=torch.int32), self.zero)
        if zero is not None:
            sums = _less_product(sums, zero, self.sums)
        if places > 1:
            *lower, sums = sums.to(torch.float32).view(places, -1, sums.shape[1]).unbind()
            for digit in reversed(lower):
                sums = sums * 256.0 + digit
        out = sums * self.scale  # before the unit of a huge input, which alone could overflow
        return out * unit if self.bias is None else torch.addcmul(self.bias, out, unit)

    def finish(self, x: Digits, sums: Tensor, place: slice | None, out: Tensor) -> None:
        """Write some rows of the product.

        Args:
            x: the inputs.
            sums: of those rows, from `less_zeros`, ``[places, M, out]``; overwritten.
            place: of those rows; None for all.
            out: ``[M, out]``; the same memory as the sums', or none of it.
        """
        sums.addcmul_(rows_of(x.zero, place), self.sums, value=-1)
        out.copy_(sums[-1])
        for lower in range(x.places - 2, -1, -1):
            out.mul_(256.0).add_(sums[lower])
        unit = rows_of(x.unit, place)
        out.mul_(self.scale)  # before the unit of a huge input, which alone could overflow
        if self.bias is None:
            out.mul_(unit)
        else:
            torch.addcmul(self.bias, out, unit, out=out)


def _less_product(sums: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Return ``sums - one * other`` in integers."""
    if torch.compiler.is_compiling():  # where `addcmul` is a sum of floats
        return sums - one * other
    return torch.addcmul(sums, one, other, value=-1)


def parts(count: int, step: int) -> Iterator[slice | None]:
    """Yield where parts of `count` rows are; None if there is one alone: a view takes time."""
    if count <= step:
        yield None
        return
    yield from (slice(start, start + step) for start in range(0, count, step))


def rows_of(values: Tensor, place: slice | None) -> Tensor:
    """Return some rows, or the one that is of all."""
    return values if place is None or values.shape[0] == 1 else values[place]


def digits_of_codes(x: Tensor, scheme: Scheme, qparams: QParams, place: slice | None) -> Digits:
    """Return the codes of some rows of ``x [M, in]``, which `qparams` are the parameters of."""
    scale, zero = qparams.scale, qparams.zero_point
    assert scale is not None  # an Affine has one
    rows, one = rows_of(x, place), scale.shape[0] == 1
    scale, zero = rows_of(scale, place), rows_of(zero, place) if zero is not None else None
    block = tuple(rows.shape) if one else qparams.block_size
    codes = scheme.quantize(rows, QParams(scale, zero, block)).codes
    if zero is not None:
        return Digits(codes, zero.to(torch.int32), scale)
    return Digits(codes.view(torch.uint8).bitwise_xor_(SIGN), _MIDDLE, scale)


OneGrid = tuple[Tensor, int, float]
"""Codes on a grid that all of them share, ``uint8 [M, in]``, the one that means zero, its scale."""


def one_grid(rows: Tensor, activation: Activation) -> tuple[float, int] | None:
    """Return scale and zero point (0 without one) that rows share, or None.

    Args:
        rows: ``float32 [M, in]``, or samples of any more dimensions.
        activation: how they are quantized.

    Returns:
        None where rows have grids of their own, are none, or are not finite.
    """
    scheme, count = activation.scheme, rows.shape[0]
    if type(scheme) is not Affine or not count:
        return None
    if activation.scale is not None:
        zero_point = int(activation.zero_point.item()) if activation.zero_point is not None else 0
        return (activation.scale.item(), zero_point) if has_finite_sum(rows) else None
    if count == 1 or type(scheme.granularity) is PerTensor:
        low, high = torch.aminmax(rows)
        return scheme.cover_one(low.item(), high.item())
    return None


def is_usual(scale: float) -> bool:
    """Return whether a scale of inputs may be inverted and multiplied by one of a weight."""
    return _USUAL[0] < scale < _USUAL[1]


def on_one_grid(rows: Tensor, activation: Activation) -> OneGrid | None:
    """Return the codes of ``rows [M, in]`` that share a grid, with few operators; or None.

    They are those of `digits_of_codes`. A layer that meets a single row waits for operators, not
    for arithmetic, and this takes a third of them.

    Returns:
        None where `one_grid` does, and for many rows.
    """
    grid = one_grid(rows, activation) if rows.shape[0] <= AT_ONCE else None
    if grid is None:
        return None
    scheme = activation.scheme
    assert isinstance(scheme, Affine)  # others have no such grid
    scale, zero = grid
    codes = _bytes(times(rows, float32(1 / scale)), _number(zero), scheme)
    return codes, SIGN if scheme.symmetric else zero, scale


def _bytes(values: Tensor, zero: Tensor, scheme: Affine) -> Tensor:
    """Return inputs in steps of their grids as unsigned bytes; `values` are overwritten.

    Args:
        values: ``float32 [M, in]``.
        zero: the codes that mean zero, ``float32``, one or ``[M, 1]``.
        scheme: their grid; of a symmetric one bytes are the codes with `SIGN` added.
    """
    if scheme.symmetric:
        values.round_().clamp_(scheme.quant_min, scheme.quant_max).add_(_number(SIGN))
    else:
        values.add_(zero).round_().clamp_(scheme.quant_min, scheme.quant_max)
    return values.short().byte()  # bytes at once take longer for many values


def grids_of_few(rows: Tensor, activation: Activation) -> Tensor | None:
    """Return the grids of a few ``rows [M, in]``, each of which has its own, or None.

    They are those that `Activation.qparams` finds, in half of its time: numbers are found by
    Python, as for `one_grid`.

    Returns:
        scales, their reciprocals and zero points, ``float32 [3, M, 1]``; None where rows are one or
        many, are not finite or nothing but zeros, or share a grid.
    """
    scheme = activation.scheme
    if activation.scale is not None or not 1 < rows.shape[0] <= _FEW:
        return None
    if type(scheme) is not Affine or type(scheme.granularity) is not PerToken:
        return None
    ends = zip(rows.amin(1).tolist(), rows.amax(1).tolist(), strict=True)
    scales, zeros = [], []
    for low, high in ends:
        grid = scheme.cover_one(low, high)
        if grid is None:
            return None
        scales.append(grid[0])
        zeros.append(grid[1])
    return rows.new_tensor([scales, [1 / scale for scale in scales], zeros]).unsqueeze(2)


def digits_of_few(rows: Tensor, activation: Activation) -> Digits | None:
    """Return the codes of a few ``rows [M, in]`` as `digits_of_codes` does, or None.

    Returns:
        None where `grids_of_few` does.
    """
    found = grids_of_few(rows, activation)
    if found is None:
        return None
    scheme = activation.scheme
    assert isinstance(scheme, Affine)  # others have no such grids
    unit, inverse, zero = found.unbind()
    codes = _bytes(rows * inverse, zero, scheme)
    return Digits(codes, _MIDDLE if scheme.symmetric else zero.int(), unit)


def times(values: Tensor, factor: float) -> Tensor:
    """Return ``values * factor``, where the call is what takes the time.

    torch makes a tensor of a factor first, and of `alpha` none.
    """
    return torch.add(_number(0), values, alpha=factor)


@lru_cache(maxsize=256)
def _number(value: int) -> Tensor:
    """Return an integer as a tensor, which is added in half the time of a number."""
    with torch.inference_mode(False):
        return torch.tensor(float(value), device="cpu")


def digits_on_one_grid(rows: Tensor, activation: Activation) -> Digits | None:
    """Return what `on_one_grid` does as digits."""
    alike = on_one_grid(rows, activation)
    if alike is None:
        return None
    codes, zero, scale = alike
    return Digits(codes, torch.full((1, 1), zero, dtype=torch.int32), torch.full((1, 1), scale))


def digits_of_inputs(rows: Tensor, activation: Activation) -> Digits | None:
    """Return the codes of ``rows [M, in]``; None where there is no row or one is not finite."""
    found = digits_on_one_grid(rows, activation) or digits_of_few(rows, activation)
    if found is not None:
        return found
    qparams = activation.qparams(rows)
    if not are_finite(rows, activation, qparams):
        return None
    return digits_of_codes(rows, activation.scheme, qparams, None)


def are_finite(rows: Tensor, activation: Activation | None, qparams: QParams | None) -> bool:
    """Return whether there are values and each is finite; where a range was found, it tells."""
    if activation is None or qparams is None or activation.scale is not None:
        return has_finite_sum(rows)
    assert qparams.scale is not None  # an Affine has one
    return bool(rows.numel()) and has_finite_sum(qparams.scale)


def digits_of_floats(rows: Tensor) -> Digits:
    """Return three digits of each of ``rows [M, in]``."""
    peak = rows.abs().amax(1, keepdim=True).view(torch.int32)
    exponent = peak.bitwise_right_shift(23) - 126  # |x| < 2^exponent, [M, 1]
    exponent = exponent.clamp(min=-100) - 22  # of the last digit's unit
    values = (rows * _power_of_two(-exponent)).round_().to(torch.int32)  # below 2^22
    bytes_ = _bytes_in_trace if torch.compiler.is_compiling() else _bytes_of
    return Digits(bytes_(values), _MIDDLE, _power_of_two(exponent), _PLACES)


def _bytes_of(values: Tensor) -> Tensor:
    """Return signed digits of ``int32 [M, in]`` as `Digits` has them; `values` are overwritten."""
    digits = values.new_empty(_PLACES, *values.shape, dtype=torch.int8)
    for digit in digits.unbind():
        digit.copy_(values)  # the lowest byte, as a signed one
        values.add_(SIGN).bitwise_right_shift_(8)
    return digits.view(torch.uint8).bitwise_xor_(SIGN).view(-1, values.shape[1])


def _bytes_in_trace(values: Tensor) -> Tensor:
    """Return what `_bytes_of` does, without writing into parts, which compilers make slow."""
    digits = []
    for _ in range(_PLACES):
        values = values + SIGN
        digits.append((values & 255).to(torch.uint8))
        values = values >> 8
    return torch.cat(digits)


def _power_of_two(exponent: Tensor) -> Tensor:
    """Return ``2 ** exponent`` for ``int32`` exponents of -126 to 127, exactly."""
    return (exponent + 127).bitwise_left_shift(23).view(torch.float32)
