"""Machine code for quantized products, and the choice among it."""

from mono_quant.base import Kernel, KernelSpec
from mono_quant.kernels.reference import Reference

REFERENCE: Kernel = Reference()


def select(spec: KernelSpec) -> Kernel:
    """Return the kernel that runs `spec`: the reference, until faster ones are built."""
    return REFERENCE


__all__ = ["REFERENCE", "Reference", "select"]
