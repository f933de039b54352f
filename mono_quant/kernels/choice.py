"""Which of several kernels is fastest here, and in which order that wants the codes of a weight."""

import math
from collections.abc import Mapping

import torch

from mono_quant.base import Arranged, ArrangingKernel, Kernel, KernelSpec, Operation
from mono_quant.kernels.switches import memory
from mono_quant.kernels.timing import LARGEST_BATCH, seconds
from mono_quant.operations import Convolution
from mono_quant.recurrence import WholeSequence
from mono_quant.speed import NO_DIFFERENCE

Order = type[Arranged] | None
"""An order of codes; None for the canonical one."""

_USUAL = (1, 8, 64, 256)
"""Rows of inputs for which the order of a matrix's codes is chosen: tokens, and few sequences."""

_BATCHES: Mapping[type[Operation], tuple[int, ...]] = {
    Convolution: (LARGEST_BATCH,),
    WholeSequence: (1,),
}
"""What decides for other operations: positions, and samples."""


def order_of(kernel: Kernel) -> Order:
    """Return the order of codes that a kernel reads."""
    return kernel.arrangement if isinstance(kernel, ArrangingKernel) else None


def fastest(
    kernels: tuple[Kernel, ...],
    rival: Kernel | None,
    spec: KernelSpec,
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
) -> Kernel:
    """Return the fastest of some kernels, of those that read the order that is chosen for all.

    Args:
        kernels: one at least, each of which supports `spec`.
        rival: another, which reads any order and has no say in which one is chosen.
        spec: what is to be done.
        device: of the inputs.
        dtype: of the inputs.
        rows: how many inputs the weight meets at once.
    """
    timed = (*kernels, rival) if rival is not None else kernels
    if len(timed) == 1:
        return timed[0]
    orders = _orders(kernels, timed, spec, device, dtype)
    able = [kernel for kernel in timed if kernel is rival or order_of(kernel) in orders]
    if len(able) == 1:
        return able[0]
    taken = seconds(timed, spec, device, dtype, rows)
    return min(able, key=lambda kernel: taken[kernel.name])


def _orders(
    kernels: tuple[Kernel, ...],
    timed: tuple[Kernel, ...],
    spec: KernelSpec,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Order, ...]:
    """Return the order of codes that serves some batches best; two where they may be kept and pay.

    By the product of their times. The second order is the canonical one, and pays if one of the
    batches is faster by more than what may be chance.
    """
    orders = tuple(dict.fromkeys(map(order_of, kernels)))
    if len(orders) == 1:
        return orders
    batches = _BATCHES.get(type(spec.operation), _USUAL)
    taken = [seconds(timed, spec, device, dtype, rows) for rows in batches]

    def best(order: Order) -> list[float]:
        names = [kernel.name for kernel in kernels if order_of(kernel) is order]
        return [min(times[name] for name in names) for times in taken]

    times = {order: best(order) for order in orders}
    chosen = min(orders, key=lambda order: math.prod(times[order]))
    if not memory.is_double() or None not in orders:
        return (chosen,)
    pairs = {order: list(map(min, times[order], times[None])) for order in orders}
    paired = min(orders, key=lambda order: math.prod(pairs[order]))
    gains = (one / two for one, two in zip(times[chosen], pairs[paired], strict=True))
    return (paired, None) if max(gains) > 1 + NO_DIFFERENCE else (chosen,)
