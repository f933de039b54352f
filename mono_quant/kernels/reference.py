"""Plain torch, always able, and the oracle of all other kernels."""

import torch
from torch import Tensor

from mono_quant.base import KernelSpec, PackedTensor
from mono_quant.numerics.blocks import met


class Reference:
    """Dequantizes what an operation needs, then runs the float operation.

    Every call decodes the whole weight (a lookup, its rows), so it is slower than float layers on
    small batches. Differentiable in its input; through the grid of activations, as if it were not
    there.
    """

    name = "reference"

    def supports(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return None: everything is supported."""
        return None

    def __call__(
        self, spec: KernelSpec, x: Tensor, weight: PackedTensor, bias: Tensor | None
    ) -> Tensor:
        """Return the operation on the dequantized weight and the input, put on its grid first."""
        if spec.activation is None:
            return spec.operation(x, weight, bias)
        one = spec.activation.mode == "static"  # and so `x` may lie in memory as it likes
        rows = x if one else spec.operation.rows(x)
        on_grid = met(spec.activation.fake_quantize(rows), x.shape)
        return spec.operation(on_grid, weight, bias).to(x.dtype)
