"""Exact integer products on the codes of a weight, as they are stored."""

import attrs
import torch
from torch import Tensor

from mono_quant.base import Activation, KernelSpec, PackedTensor
from mono_quant.kernels.blocks import BLOCKS
from mono_quant.kernels.codes import flat, refuse, row_sums, shaped
from mono_quant.kernels.ops import LONGEST_ROW, SHORTEST_ROW, int_mm, int_mm_refusal
from mono_quant.numerics.granularity import PerChannel, PerTensor, PerToken
from mono_quant.schemes import Affine

_SIGN = 128  # what turns an unsigned byte into a signed one
_DIGITS = 3


@attrs.frozen
class Integer:
    """Multiplies 8-bit weights and integers of inputs, summing in 32 bits, without decoding.

    The stored codes are the left factor, unsigned, and the inputs the right one, signed: so the
    weight needs no second layout, and what is repacked at each call is the smaller input. With
    quantized inputs, their codes are those of `Activation.fake_quantize` and the sums are exact;
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
        if not rows.numel() or not bool(rows.sum().isfinite()):
            return BLOCKS(spec, x, weight, bias)
        product = (
            _of_floats(rows, weight)
            if spec.activation is None
            else _of_codes(rows, weight, spec.activation)
        )
        return shaped(product.mul_(weight.tensors["scale"].reshape(-1)), bias, x)


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


def _of_codes(rows: Tensor, weight: PackedTensor, activation: Activation) -> Tensor:
    """Return the product with quantized ``rows [M, in]`` less the weight's scale, ``[M, out]``."""
    quantized = activation.scheme.quantize(rows, activation.qparams(rows))
    digits, zeros = quantized.codes, quantized.qparams.zero_point
    if zeros is not None:
        digits = (digits ^ _SIGN).view(torch.int8)
        zeros = zeros.reshape(-1, 1).to(torch.int32) - _SIGN  # [M, 1], or [1, 1] if static
    sums = _centred(digits, weight)
    if zeros is not None:
        codes = weight.tensors["codes"]
        of_weight = row_sums(codes) - _zeros(weight) * codes.shape[-1]  # [out]
        sums.addcmul_(zeros, of_weight[None], value=-1)
    scale = quantized.qparams.scale
    assert scale is not None  # an Affine has one
    return sums.to(torch.float32).mul_(scale.reshape(-1, 1))


def _of_floats(rows: Tensor, weight: PackedTensor) -> Tensor:
    """Return the product with float ``rows [M, in]`` less the weight's scale, ``[M, out]``."""
    _, exponent = torch.frexp(rows.abs().amax(1, keepdim=True))  # |x| < 2^exponent, [M, 1]
    exponent = exponent.clamp(min=-100) - 22  # of the last digit's unit
    values = (rows * _power_of_two(-exponent)).round_().to(torch.int32)  # below 2^22
    digits = []
    for _ in range(_DIGITS):
        digits.append(values.to(torch.int8))  # the lowest byte, as a signed one
        values = values.add_(_SIGN).bitwise_right_shift_(8)
    sums = _centred(torch.cat(digits), weight).reshape(_DIGITS, rows.shape[0], -1)
    product = sums[2].to(torch.float32)
    for place in (1, 0):
        product = product.mul_(256.0).add_(sums[place])
    return product.mul_(_power_of_two(exponent))


def _centred(digits: Tensor, weight: PackedTensor) -> Tensor:
    """Return ``digits @ (codes - zero point).T`` as exact ``int32 [M, out]``.

    Args:
        digits: ``int8 [M, in]``.
        weight: codes as stored, unsigned.
    """
    codes = weight.tensors["codes"][0]  # [out, in]
    sums = int_mm(codes, digits.t()).t().contiguous()
    per_row = digits.sum(1, keepdim=True, dtype=torch.int32)
    return sums.addcmul_(per_row, _zeros(weight)[None], value=-1)


def _zeros(weight: PackedTensor) -> Tensor:
    """Return the stored codes that mean zero, ``int32 [out]`` or ``[1]``."""
    zeros = weight.tensors.get("zero_point")
    if zeros is None:
        return torch.tensor([-weight.scheme.code_min], dtype=torch.int32)
    return zeros.reshape(-1).to(torch.int32)  # 8 bits take a byte


def _power_of_two(exponent: Tensor) -> Tensor:
    """Return ``2 ** exponent`` for ``int32`` exponents of -126 to 127, exactly."""
    return (exponent + 127).bitwise_left_shift(23).view(torch.float32)


INTEGER = Integer()
