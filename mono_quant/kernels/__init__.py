"""Machine code for quantized products, and the choice among it."""

import torch

from mono_quant.base import Kernel, KernelSpec
from mono_quant.kernels.reference import Reference

REFERENCE: Kernel = Reference()

KERNELS: tuple[Kernel, ...] = (REFERENCE,)
"""Asked in this order; the last one can do everything."""


def select(spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> Kernel:
    """Return the first kernel that can do `spec` for inputs of `dtype` on `device`."""
    return next(kernel for kernel in KERNELS if kernel.supports(spec, device, dtype) is None)


__all__ = ["KERNELS", "REFERENCE", "Reference", "select"]
