"""Exact integer products on the codes of a weight, as they are stored."""

import torch
from torch import Tensor

from mono_quant.base import Activation, KernelSpec, PackedTensor, Scheme
from mono_quant.kernels.blocks import BLOCKS
from mono_quant.kernels.codes import (
    SMALLEST,
    Constants,
    constants,
    flat,
    has_finite_sum,
    refuse,
    shaped,
)
from mono_quant.kernels.digits import (
    AT_ONCE,
    Factor,
    OneGrid,
    digits_of_codes,
    digits_of_few,
    digits_of_floats,
    on_one_grid,
    parts,
    rows_of,
    times,
)
from mono_quant.kernels.ops import (
    LONGEST_ROW,
    SHORTEST_ROW,
    int_mm_columns,
    int_mm_refusal,
)
from mono_quant.numerics.granularity import PerChannel, PerTensor, PerToken
from mono_quant.schemes import Affine


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

    name = "integer"

    def supports(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it cannot: 8-bit weights, per channel or per tensor, on a CPU are what it can.

        Inputs may be float, or on an affine grid, dynamic or static, of at most 8 bits. A weight of
        few values takes those on a grid alone: the digits of floats take longer than the reference.
        """
        fewest = SMALLEST if spec.activation is None else 1
        reason = refuse(spec, device, dtype, fewest=fewest)
        if reason is None:
            reason = refuse_weight(spec) or refuse_inputs(spec.activation)
        return reason if reason is not None else int_mm_refusal()

    def __call__(
        self, spec: KernelSpec, x: Tensor, weight: PackedTensor, bias: Tensor | None
    ) -> Tensor:
        """Return ``x @ weight.T + bias``, ``[..., out]`` in the dtype of `x`."""
        rows, zero_point = flat(x, spec.layout.stack[2]), weight.tensors.get("zero_point")
        count, activation = rows.shape[0], spec.activation
        if count == 1 and activation is not None and zero_point is None:
            alike = on_one_grid(rows, activation)
            if alike is not None:
                columns = weight.tensors["codes"][0].t()
                return shaped(of_one_row(alike, columns, constants(weight), bias), None, x)
        few = digits_of_few(rows, activation) if activation is not None else None
        if few is not None:
            return shaped(factor_of(weight, bias).product(few), None, x)
        if not has_finite_sum(rows):
            return BLOCKS(spec, x, weight, bias)
        factor = factor_of(weight, bias)
        qparams = activation.qparams(rows) if activation is not None else None
        out: Tensor | None = None
        for place in parts(count, AT_ONCE * torch.get_num_threads()):
            if activation is None or qparams is None:
                digits = digits_of_floats(rows_of(rows, place))
            else:
                digits = digits_of_codes(rows, activation.scheme, qparams, place)
            if place is None:
                return shaped(factor.product(digits), None, x)
            out = rows.new_empty(count, spec.layout.stack[1]) if out is None else out
            factor.product(digits, out[place])
        assert out is not None  # a part that is not all is followed by others
        return shaped(out, None, x)


def of_one_row(inputs: OneGrid, columns: Tensor, known: Constants, bias: Tensor | None) -> Tensor:
    """Return what `Factor` makes of one row, for a weight without zero points.

    In half of the operators: sums of one row need no room of their own, and are not many.

    Args:
        inputs: the row.
        columns: codes of the weight, ``int8 [in, out]``.
        known: of the weight.
        bias: ``[out]``, or None.
    """
    row, zero, unit = inputs
    sums = int_mm_columns(row, columns)
    if zero:
        sums.sub_(known.sums, alpha=zero)
    out = sums * known.scale
    if bias is None:
        return times(out, unit)
    return torch.add(bias.to(torch.float32), out, alpha=unit)


def factor_of(weight: PackedTensor, bias: Tensor | None) -> Factor:
    """Return a matrix of 8-bit codes as the right factor of products, with its bias."""
    known, tensors = constants(weight), weight.tensors
    zero_point = tensors.get("zero_point")
    return Factor.of(tensors["codes"][0], known.sums, known.scale, zero_point, bias)


def refuse_weight(spec: KernelSpec) -> str | None:
    """Return why a weight cannot be the right factor, or None: 8 bits, per channel or tensor."""
    if reason := refuse_grid(spec.scheme):
        return reason
    if spec.layout.stack[2] < SHORTEST_ROW:
        return f"rows of {spec.layout.stack[2]} are too short to gain from it"
    if spec.layout.stack[2] > LONGEST_ROW:
        return f"rows of {spec.layout.stack[2]} could overflow 32 bits"
    return None


def refuse_grid(scheme: Scheme) -> str | None:
    """Return why codes on a grid cannot be factors, or None: of 8 bits, per channel or tensor."""
    if type(scheme) is not Affine or scheme.bits != 8:
        return f"the weight is {scheme.describe()}, not 8-bit"
    if scheme.float_zero_point:
        return "the weight's zero points are floats, and sums of codes are integers"
    if type(scheme.granularity) not in (PerTensor, PerChannel):
        return f"the weight's scales are {scheme.granularity.describe()}"
    return None


def refuse_inputs(activation: Activation | None) -> str | None:
    """Return why inputs cannot be digits, or None: floats and affine grids can."""
    if activation is None:
        return None
    if activation.apart is not None:
        return "some of the inputs stay float"
    scheme = activation.scheme
    known = type(scheme) is Affine and type(scheme.granularity) in (PerTensor, PerToken)
    codes = isinstance(scheme, Affine) and not scheme.float_zero_point
    return None if known and codes else f"inputs are {activation.describe()}"


INTEGER = Integer()
