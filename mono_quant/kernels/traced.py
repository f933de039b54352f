"""Products that `torch.compile` makes fast code of: plain torch, as a trace wants it."""

import torch
from torch import Tensor

from mono_quant.base import KernelSpec, PackedTensor
from mono_quant.kernels.codes import flat, refuse, shaped
from mono_quant.kernels.digits import Factor, digits_of_codes
from mono_quant.kernels.integer import INTEGER, refuse_weight
from mono_quant.schemes import FloatCast


class TracedInteger:
    """What `Integer` does for quantized inputs, without a loop, a branch or a write in place.

    Compilers fuse what goes before the product with what follows it. Sums of the weight's codes
    are one row more of the product, so that nothing has to be kept for a compiled layer.

    A row with NaN is NaN.
    """

    name = INTEGER.name

    def supports(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it cannot: what `Integer` does for quantized inputs is what it can."""
        if spec.activation is None:
            return "inputs are float"
        return INTEGER.supports(spec, device, dtype)

    def __call__(
        self, spec: KernelSpec, x: Tensor, weight: PackedTensor, bias: Tensor | None
    ) -> Tensor:
        """Return ``x @ weight.T + bias``, ``[..., out]`` in the dtype of `x`."""
        rows, tensors = flat(x, spec.layout.stack[2]), weight.tensors
        activation, codes = spec.activation, tensors["codes"][0]
        assert activation is not None  # `supports` saw to it
        digits = digits_of_codes(rows, activation.scheme, activation.qparams(rows), None)
        ones = digits.digits.new_ones(1, rows.shape[1])
        sums = torch._int_mm(torch.cat((digits.digits, ones)), codes.t())
        scale, zero = tensors["scale"], tensors.get("zero_point")
        factor = Factor.of(codes, sums[-1:], scale, zero, bias)
        out = factor.finished(digits, sums[:-1])
        lost = rows.isnan().any(1, keepdim=True)
        return shaped(out.masked_fill(lost, float("nan")), None, x)


class TracedRow:
    """The product of one float row: multiplied and summed, while the weight is decoded.

    A compiler reads the codes once, where a matrix product would want all of the weight in floats.
    """

    name = "row"

    def supports(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it cannot: what it can is weights of 8 and 16 bits, float inputs, a CPU."""
        if spec.activation is not None:
            return f"inputs are {spec.activation.describe()}"
        if isinstance(spec.scheme, FloatCast):
            return refuse(spec, device, dtype)
        return refuse_weight(spec) or refuse(spec, device, dtype)

    def __call__(
        self, spec: KernelSpec, x: Tensor, weight: PackedTensor, bias: Tensor | None
    ) -> Tensor:
        """Return ``x @ weight.T + bias`` for a single row, ``[..., out]`` in the dtype of `x`."""
        row, tensors = flat(x, spec.layout.stack[2]), weight.tensors
        sums = (tensors["codes"][0].to(torch.float32) * row).sum(1)
        zero, scale = tensors.get("zero_point"), tensors.get("scale")
        if zero is not None:
            sums = sums - zero.to(torch.float32) * row.sum()
        if scale is not None:
            sums = sums * scale.to(torch.float32).flatten()
        return shaped(sums[None], bias, x)


INTEGER_TRACED, ROW_TRACED = TracedInteger(), TracedRow()
