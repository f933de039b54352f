"""Machine code for quantized products, and the choice among it.

Kernels differ in how they round, within what float32 arithmetic allows, so which one runs is part
of what makes results repeatable: `use` fixes it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from mono_quant.base import ArrangingKernel, Kernel, KernelSpec
from mono_quant.kernels.blocks import BLOCKS, Blocks
from mono_quant.kernels.choice import fastest, order_of
from mono_quant.kernels.codes import SUMS, remembered_bytes, sums_of
from mono_quant.kernels.convolution import INTEGER_CONVOLUTION, IntegerConvolution
from mono_quant.kernels.cuda import (
    CUDA_DECODED,
    CUDA_FLOAT8,
    CUDA_INTEGER,
    CudaDecoded,
    CudaFloat8,
    CudaInteger,
)
from mono_quant.kernels.cuda_tiles import (
    CUDA_INT4,
    CUDA_TILES_DECODED,
    CudaInt4,
    CudaTilesDecoded,
)
from mono_quant.kernels.fbgemm_linear import FBGEMM_LINEAR, FbgemmLinear
from mono_quant.kernels.fp16 import FP16, Fp16
from mono_quant.kernels.fp16_sequences import (
    FP16_SEQUENCES,
    UNPACKED_SEQUENCES,
    Fp16Sequences,
)
from mono_quant.kernels.int4 import INT4, PANEL_BLOCKS, PANEL_BYTES, Int4, PanelBlocks, PanelBytes
from mono_quant.kernels.int8 import INT8, Int8
from mono_quant.kernels.integer import INTEGER, Integer
from mono_quant.kernels.ops import followed, gradient_asked, is_exported, untraced
from mono_quant.kernels.outliers import DECOMPOSED, DECOMPOSED_TRACED, Decomposed
from mono_quant.kernels.packed_convolution import PACKED_CONVOLUTION, PackedConvolution
from mono_quant.kernels.packed_linear import PACKED_LINEAR, PackedLinear
from mono_quant.kernels.reference import Reference
from mono_quant.kernels.rows import Row, row_of
from mono_quant.kernels.sequences import INTEGER_STEPS, IntegerSteps
from mono_quant.kernels.store import STORE
from mono_quant.kernels.switches import Switch, memory
from mono_quant.kernels.timing import bucket
from mono_quant.kernels.traced import (
    INT4_TRACED,
    INTEGER_TRACED,
    ROW_TRACED,
    for_many,
    most_rows,
)
from mono_quant.operations import Convolution
from mono_quant.recurrence import Recurrence, WholeSequence

REFERENCE: Kernel = Reference()

KERNELS: tuple[Kernel, ...] = (
    INTEGER,
    INTEGER_STEPS,
    PACKED_LINEAR,
    FBGEMM_LINEAR,
    PACKED_CONVOLUTION,
    INTEGER_CONVOLUTION,
    INT8,
    INT4,
    PANEL_BLOCKS,
    PANEL_BYTES,
    FP16,
    CUDA_INTEGER,
    CUDA_FLOAT8,
    CUDA_DECODED,
    CUDA_INT4,
    CUDA_TILES_DECODED,
    FP16_SEQUENCES,
    BLOCKS,
    DECOMPOSED,
    REFERENCE,
)
"""All that may be chosen; the last one can do everything."""

_RIVALLED = (Recurrence, Convolution)
"""Where the reference may be the fastest on a CPU: it decodes a weight that is used many times."""

_MOST_SAMPLES = 32
"""Larger batches of whole sequences are served as this one is."""

VARIABLE = "MONO_QUANT_KERNEL"
"""Environment variable that holds the name of a kernel, where `use` did not say one."""

_MACHINE_CODE = KERNELS[:-1]
"""What is neither differentiable nor traceable; a kernel of somebody else's may be both."""


class use(Switch):
    """Let one kernel compute everything that it supports, and the reference the rest.

    From the call on, everywhere in the process; as a context manager, until its end.

        kernels.use("reference")  # for good
        with kernels.use("integer"):
            model(x)

    Args:
        name: of a kernel in `KERNELS`; None for the fastest, which is the default.

    Raises:
        ConfigurationError: there is no such kernel.
    """

    variable = VARIABLE
    noun = "kernel"
    current: ClassVar[str | None] = None

    @classmethod
    def known(cls) -> tuple[str, ...]:
        """Return the names of all kernels."""
        return tuple(kernel.name for kernel in KERNELS)


_Asked = tuple[torch.device, torch.dtype, int, bool, bool]
"""Inputs, how many rows of them, whether somebody follows, and whether codes may be arranged."""


@attrs.define(eq=False)
class Site:
    """Where one thing is asked for again and again, which remembers what was chosen for it.

    A layer asks at each call, and would otherwise wait as long as for a small product.

    Attributes:
        spec: what is to be done.
    """

    spec: KernelSpec
    _chosen: dict[_Asked, Kernel] = attrs.field(factory=dict, init=False)
    _state: tuple[int, int] | None = attrs.field(default=None, init=False)
    """For which age and how many threads that is."""

    def kernel(
        self,
        device: torch.device,
        dtype: torch.dtype,
        rows: int,
        others: tuple[Tensor | None, ...],
        arrange: Callable[[], bool] | None = None,
    ) -> Kernel:
        """Return what `select` does, whose arguments these are; not while a trace is compiled."""
        is_followed = followed(*others)
        if is_followed and all(one in _MACHINE_CODE for one in KERNELS if one is not REFERENCE):
            return REFERENCE  # before `rows` is counted, which has no value while a trace is made
        state = (STORE.age, torch.get_num_threads())
        if self._state != state:
            self._state, self._chosen = state, {}
        kernel = self._kernel((device, dtype, rows, is_followed, arrange is not None))
        if isinstance(kernel, ArrangingKernel) and (arrange is None or not arrange()):
            kernel = self._kernel((device, dtype, rows, is_followed, False))
        return kernel

    def _kernel(self, asked: _Asked) -> Kernel:
        kernel = self._chosen.get(asked)
        if kernel is None:
            if len(self._chosen) > _MOST_CHOICES:  # of as many lengths of sequences, say
                self._chosen.clear()
            device, dtype, rows, is_followed, is_arranged = asked
            able = _able(self.spec, device, dtype, use.named(), is_followed)
            able = tuple(one for one in able if is_arranged or order_of(one) is None)
            kernel = _fastest(able, self.spec, device, dtype, bucket(rows)) if able else REFERENCE
            self._chosen[asked] = kernel
        return kernel


_MOST_CHOICES = 1024


def select(
    spec: KernelSpec,
    device: torch.device,
    dtype: torch.dtype,
    rows: int = 1,
    *others: Tensor | None,
    arrange: Callable[[], bool] | None = None,
) -> Kernel:
    """Return the fastest kernel for `spec`, measured on this machine, or the one `use` names.

    Args:
        spec: what is to be done.
        device: of the inputs.
        dtype: of the inputs.
        rows: how many inputs the weight meets at once.
        others: what the kernel is to be called with. The reference is returned where someone
            follows these: where a gradient is asked for, and under `torch.compile`,
            `torch.export` and `torch.func`.
        arrange: tells whether the caller can hold the codes in another order; None if it cannot.
            The order is the one that serves 1, 8, 64 and 256 inputs best, of a convolution
            many positions, and every batch is then computed by a kernel that reads it: so codes lie
            in one order, and change it once. Where `memory` is double, kernels of the canonical
            order have their turn too, if that is faster for one of those batches. For whole
            recurrent layers a single sequence decides, of 32 steps.
    """
    if torch.compiler.is_compiling():
        return _traceable(spec, device, dtype, rows, others)
    return Site(spec).kernel(device, dtype, rows, others, arrange)


def _traceable(
    spec: KernelSpec,
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    others: tuple[Tensor | None, ...],
) -> Kernel:
    """Return the kernel for a trace that is compiled; the reference for one that is exported.

    Whether 4-bit codes may be in another order, as those of them want, is the caller's to see.
    """
    if is_exported() or gradient_asked(*others) or not _fastest_wanted():
        return REFERENCE
    kernels = (ROW_TRACED, *_TRACED) if rows == 1 else _TRACED
    able = (kernel for kernel in kernels if kernel.supports(spec, device, dtype) is None)
    return next(able, REFERENCE)


_TRACED: tuple[Kernel, ...] = (
    INTEGER_TRACED,
    DECOMPOSED_TRACED,
    INT4_TRACED,
    CUDA_INT4,
    CUDA_INTEGER,
    CUDA_FLOAT8,
)


@untraced
def _fastest_wanted() -> bool:
    """Return whether nobody names a kernel."""
    return use.named() is None


def _able(
    spec: KernelSpec, device: torch.device, dtype: torch.dtype, name: str | None, is_followed: bool
) -> tuple[Kernel, ...]:
    kernels = [kernel for kernel in KERNELS if kernel is not REFERENCE]
    if is_followed:
        kernels = [kernel for kernel in kernels if kernel not in _MACHINE_CODE]
    elif name is not None:
        kernels = [kernel for kernel in kernels if kernel.name == name]
    return tuple(kernel for kernel in kernels if kernel.supports(spec, device, dtype) is None)


def _fastest(
    kernels: tuple[Kernel, ...],
    spec: KernelSpec,
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
) -> Kernel:
    """Return the fastest of some kernels, one at least, and where it may be, the reference."""
    if use.named() is not None:
        return fastest(kernels, None, spec, device, dtype, rows)
    if isinstance(spec.operation, WholeSequence):
        return _fastest_whole(kernels, spec, device, dtype, rows)
    if device.type != "cpu":  # where decoding a weight is cheap, but not from another order
        return fastest((*kernels, REFERENCE), None, spec, device, dtype, rows)
    rival = REFERENCE if isinstance(spec.operation, _RIVALLED) else None
    return fastest(kernels, rival, spec, device, dtype, rows)


def _fastest_whole(
    kernels: tuple[Kernel, ...],
    spec: KernelSpec,
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
) -> Kernel:
    """Return the fastest for a whole recurrent layer.

    A single sequence of usual length decides whether weights are packed. Those that are may still
    be decoded for other sequences, which is then timed from the order that they lie in.
    """
    operation = spec.operation
    assert isinstance(operation, WholeSequence)  # the caller saw to it
    usual = WholeSequence(operation.cell, operation.shapes)
    packed = replace(spec, operation=usual)
    if fastest((*kernels, REFERENCE), None, packed, device, dtype, 1) is REFERENCE:
        return REFERENCE
    found = fastest(
        (*kernels, UNPACKED_SEQUENCES), None, spec, device, dtype, min(rows, _MOST_SAMPLES)
    )
    return REFERENCE if found is UNPACKED_SEQUENCES else found


__all__ = [
    "CUDA_INT4",
    "INT4_TRACED",
    "KERNELS",
    "REFERENCE",
    "SUMS",
    "VARIABLE",
    "Blocks",
    "CudaDecoded",
    "CudaFloat8",
    "CudaInt4",
    "CudaInteger",
    "CudaTilesDecoded",
    "Decomposed",
    "FbgemmLinear",
    "Fp16",
    "Fp16Sequences",
    "Int4",
    "Int8",
    "Integer",
    "IntegerConvolution",
    "IntegerSteps",
    "PackedConvolution",
    "PackedLinear",
    "PanelBlocks",
    "PanelBytes",
    "Reference",
    "Row",
    "Site",
    "for_many",
    "memory",
    "most_rows",
    "remembered_bytes",
    "row_of",
    "select",
    "sums_of",
    "use",
]
