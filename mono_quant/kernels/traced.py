"""Products that `torch.compile` makes fast code of: plain torch, as a trace wants it."""

import torch
from torch import Tensor

from mono_quant.base import KernelSpec, PackedTensor
from mono_quant.kernels.codes import flat, refuse, shaped
from mono_quant.kernels.digits import Factor, digits_of_codes
from mono_quant.kernels.integer import INTEGER, refuse_weight
from mono_quant.kernels.ops import int_mm
from mono_quant.schemes import FloatCast


class TracedInteger:
    """What `Integer` does for quantized inputs, without a loop or a branch on values.

    Compilers fuse what goes before the product with what follows it. Sums of the weight's codes
    are products with ones, so that nothing has to be kept for a compiled layer.

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
        ones = digits.digits.new_ones(1, digits.digits.shape[1])
        products, sums = int_mm(digits.digits, codes), int_mm(ones, codes)
        factor = Factor.of(codes, sums, tensors["scale"], tensors.get("zero_point"), bias)
        out = factor.of_sums(products, digits.digits, digits.zero, digits.unit)
        if activation.mode == "static":  # the scale of another one is NaN where an input is
            out = out.masked_fill(rows.amax(1, keepdim=True).isnan(), float("nan"))
        return shaped(out, None, x)


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
