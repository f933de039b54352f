"""Exact integer products on the codes of a weight, as they are stored."""

import math
from collections.abc import Iterator

import attrs
import torch
from torch import Tensor

from mono_quant.base import Activation, KernelSpec, PackedTensor, Scheme
from mono_quant.kernels.blocks import BLOCKS
from mono_quant.kernels.codes import flat, refuse, row_sums, shaped
from mono_quant.kernels.ops import LONGEST_ROW, SHORTEST_ROW, int_mm, int_mm_refusal
from mono_quant.numerics.granularity import PerChannel, PerTensor, PerToken
from mono_quant.numerics.values import QParams
from mono_quant.schemes import Affine

_SIGN = 128  # what turns a signed byte into an unsigned one
_DIGITS = 3
_ROWS = 256  # of inputs that a thread takes at once
_AT_ONCE = 1 << 18  # sums that a thread works on at once: they stay in its core's cache
_MIDDLE = torch.full((1, 1), _SIGN, dtype=torch.int32, device="cpu")


@attrs.frozen
class Integer:
    """Multiplies 8-bit weights and integers of inputs, summing in 32 bits, without decoding.

    The inputs are the left factor, in unsigned bytes, and the stored codes the right one, so that
    the weight needs no second layout and sums come out in the order of the result. With quantized
    inputs, their codes are those of `Activation.fake_quantize` and the sums are exact;
    float rounding enters with the scales alone. Float inputs are written as three signed digits to
    base 256, the last one 22 bits below the power of two above the largest value of their row:
    about what float32 keeps of a sum.

    Rows with NaN or infinity, and sums that overflow, are left to `Blocks`.
    """

    name: str = attrs.field(default="integer", init=False)

    def supports(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it cannot: 8-bit weights, per channel or per tensor, on a CPU are what it can.

        Inputs may be float, or on an affine grid, dynamic or static, of at most 8 bits.
        """
        reason = refuse(spec, device, dtype)
        if reason is None:
            reason = _refuse_weight(spec) or _refuse_activation(spec.activation)
        return reason if reason is not None else int_mm_refusal()

    def __call__(
        self, spec: KernelSpec, x: Tensor, weight: PackedTensor, bias: Tensor | None
    ) -> Tensor:
        """Return ``x @ weight.T + bias``, ``[..., out]`` in the dtype of `x`."""
        rows = flat(x, spec.layout.stack[2])
        if not rows.numel() or not math.isfinite(rows.sum().item()):
            return BLOCKS(spec, x, weight, bias)
        factor = _Factor.of(weight, bias)
        qparams = spec.activation.qparams(rows) if spec.activation is not None else None
        out = rows.new_empty(len(rows), spec.layout.stack[1])
        for place in _places(len(rows), _ROWS * torch.get_num_threads()):
            if spec.activation is None or qparams is None:
                digits = _digits_of_floats(_rows(rows, place))
            else:
                digits = _digits_of_codes(rows, spec.activation.scheme, qparams, place)
            factor.product(digits, _rows(out, place))
        return shaped(out, None, x)


@attrs.frozen(eq=False)
class _Digits:
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


@attrs.frozen(eq=False)
class _Factor:
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
    def of(cls, weight: PackedTensor, bias: Tensor | None) -> "_Factor":
        codes, zero = weight.tensors["codes"], weight.tensors.get("zero_point")
        sums = row_sums(codes)
        if zero is not None:
            zero = zero.to(torch.int32)[None]
            sums = sums - zero * codes.shape[-1]
        scale = weight.tensors["scale"].reshape(-1).to(torch.float32)
        return cls(
            codes[0], sums, zero, scale, bias.to(torch.float32) if bias is not None else None
        )

    def product(self, x: _Digits, out: Tensor) -> None:
        """Write the product with some rows of inputs to ``out [M, out]``."""
        count, width = out.shape
        sums = torch.empty(x.places * count, width, dtype=torch.int32)
        int_mm(x.digits, self.codes, sums)
        if self.zero is not None:
            of_rows = x.digits.sum(1, keepdim=True, dtype=torch.int32)
            sums.addcmul_(of_rows, self.zero, value=-1)
        sums = sums.view(x.places, count, width)
        step = _AT_ONCE * torch.get_num_threads() // (x.places * width)
        for place in _places(count, max(1, step)):
            self._finish(x, sums if place is None else sums[:, place], place, _rows(out, place))

    def _finish(self, x: _Digits, sums: Tensor, place: slice | None, out: Tensor) -> None:
        """Write some rows of the product.

        Args:
            x: the inputs.
            sums: of those rows, ``[places, M, out]``; overwritten.
            place: of those rows.
            out: ``[M, out]``.
        """
        sums.addcmul_(_rows(x.zero, place), self.sums, value=-1)
        out.copy_(sums[-1])
        for lower in range(x.places - 2, -1, -1):
            out.mul_(256.0).add_(sums[lower])
        out.mul_(_rows(x.unit, place))
        if self.bias is None:
            out.mul_(self.scale)
        else:
            torch.addcmul(self.bias, out, self.scale, out=out)


def _places(count: int, step: int) -> Iterator[slice | None]:
    """Yield where parts of `count` rows are; None if there is one alone: a view takes time."""
    if count <= step:
        yield None
        return
    yield from (slice(start, start + step) for start in range(0, count, step))


def _rows(values: Tensor, place: slice | None) -> Tensor:
    """Return some rows, or the one that is of all."""
    return values if place is None or values.shape[0] == 1 else values[place]


def _refuse_weight(spec: KernelSpec) -> str | None:
    scheme = spec.scheme
    if type(scheme) is not Affine or scheme.bits != 8:
        return f"the weight is {scheme.describe()}, not 8-bit"
    if type(scheme.granularity) not in (PerTensor, PerChannel):
        return f"the weight's scales are {scheme.granularity.describe()}"
    if spec.layout.stack[2] < SHORTEST_ROW:
        return f"rows of {spec.layout.stack[2]} are too short to gain from it"
    if spec.layout.stack[2] > LONGEST_ROW:
        return f"rows of {spec.layout.stack[2]} could overflow 32 bits"
    return None


def _refuse_activation(activation: Activation | None) -> str | None:
    if activation is None:
        return None
    scheme = activation.scheme
    known = type(scheme) is Affine and type(scheme.granularity) in (PerTensor, PerToken)
    return None if known else f"inputs are {activation.describe()}"


def _digits_of_codes(x: Tensor, scheme: Scheme, qparams: QParams, place: slice | None) -> _Digits:
    """Return the codes of some rows of ``x [M, in]``, which `qparams` are the parameters of."""
    scale, zero = qparams.scale, qparams.zero_point
    assert scale is not None  # an Affine has one
    rows, one = _rows(x, place), scale.shape[0] == 1
    scale, zero = _rows(scale, place), _rows(zero, place) if zero is not None else None
    block = tuple(rows.shape) if one else qparams.block_size
    codes = scheme.quantize(rows, QParams(scale, zero, block)).codes
    if zero is not None:
        return _Digits(codes, zero.to(torch.int32), scale)
    return _Digits(codes.view(torch.uint8).bitwise_xor_(_SIGN), _MIDDLE, scale)


def _digits_of_floats(rows: Tensor) -> _Digits:
    """Return three digits of each of ``rows [M, in]``."""
    _, exponent = torch.frexp(rows.abs().amax(1, keepdim=True))  # |x| < 2^exponent, [M, 1]
    exponent = exponent.clamp(min=-100) - 22  # of the last digit's unit
    values = (rows * _power_of_two(-exponent)).round_().to(torch.int32)  # below 2^22
    digits = torch.empty(_DIGITS, *rows.shape, dtype=torch.int8)
    for digit in digits.unbind():
        digit.copy_(values)  # the lowest byte, as a signed one
        values.add_(_SIGN).bitwise_right_shift_(8)
    unsigned = digits.view(torch.uint8).bitwise_xor_(_SIGN).view(-1, rows.shape[1])
    return _Digits(unsigned, _MIDDLE, _power_of_two(exponent), _DIGITS)


def _power_of_two(exponent: Tensor) -> Tensor:
    """Return ``2 ** exponent`` for ``int32`` exponents of -126 to 127, exactly."""
    return (exponent + 127).bitwise_left_shift(23).view(torch.float32)


INTEGER = Integer()
