"""Products of float inputs with 8-bit weights, for processors without exact ones."""

import torch
from torch import Tensor

from mono_quant.base import KernelSpec, PackedTensor
from mono_quant.kernels import onednn
from mono_quant.kernels.blocks import BLOCKS
from mono_quant.kernels.codes import flat, has_finite_sum, refuse, shaped
from mono_quant.kernels.integer import refuse_grid
from mono_quant.kernels.ops import INT8_COLUMNS, int8_mm, int8_mm_refusal
from mono_quant.schemes import Affine


class Int8:
    """Multiplies by torch's own 8-bit product, which widens codes as it reads them.

    Inputs are bfloat16 inside, and so are the sums that come out, before scales are applied in
    float32. Inputs of a normal distribution give an SQNR of more than 50 dB against the reference.

    Results that are not finite are left to `Blocks`. Where processors multiply bytes exactly
    (VNNI), it declines: `Integer` and `PackedLinear` are as fast there, and lose nothing.
    """

    name = "int8"

    def supports(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it cannot: symmetric 8-bit weights and float inputs on a CPU are what it can.

        Scales per channel or per tensor, rows of a multiple of 64 values.
        """
        reason = refuse(spec, device, dtype) or refuse_grid(spec.scheme)
        if reason is not None:
            return reason
        if spec.activation is not None:
            return f"inputs are {spec.activation.describe()}"
        if isinstance(spec.scheme, Affine) and not spec.scheme.symmetric:
            return "the weight has zero points"
        if (length := spec.layout.stack[2]) % INT8_COLUMNS:
            return f"rows of {length} values are no multiple of {INT8_COLUMNS}"
        if onednn.refuse_linear() is None:
            return "exact products are as fast here"
        return int8_mm_refusal()

    def __call__(
        self, spec: KernelSpec, x: Tensor, weight: PackedTensor, bias: Tensor | None
    ) -> Tensor:
        """Return ``x @ weight.T + bias``, ``[..., out]`` in the dtype of `x`."""
        rows = flat(x, spec.layout.stack[2], torch.bfloat16)
        out = int8_mm(rows, weight.tensors["codes"][0]).to(torch.float32)
        out.mul_(weight.tensors["scale"].reshape(-1))
        return shaped(out, bias, x) if has_finite_sum(out) else BLOCKS(spec, x, weight, bias)


INT8 = Int8()
