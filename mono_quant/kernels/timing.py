"""What kernels take here for a weight of this shape and so many rows of inputs."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from mono_quant.base import ArrangingKernel, Kernel, KernelSpec, PackedTensor, Scheme
from mono_quant.kernels.store import STORE
from mono_quant.numerics.blocks import block_counts
from mono_quant.numerics.granularity import Shape
from mono_quant.numerics.packing import packed_length
from mono_quant.operations import Convolution
from mono_quant.recurrence import Recurrence, WholeSequence
from mono_quant.schemes import Affine, FloatCast
from mono_quant.speed import timed

LARGEST_BATCH = 512
"""Batches beyond this are served as this one is."""

_ENOUGH_S = 0.05  # of timing each kernel
_LEAST, _REPEATS = 3, 9
_STEPS = 32
_WHOLE_STEPS = 128


def bucket(rows: int) -> int:
    """Return the least power of two from `rows` on, up to `LARGEST_BATCH`."""
    return min(LARGEST_BATCH, 1 << max(0, rows - 1).bit_length())


def seconds(
    kernels: Sequence[Kernel],
    spec: KernelSpec,
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
) -> Mapping[str, float]:
    """Return what a call of each of `kernels` takes, by name; each supports `spec`.

    Measured on made-up codes the first time, remembered for this process and this machine: the
    answer is the same for all weights of a shape, so two models of one process agree to the bit.

    Args:
        kernels: with names of their own; at least one.
        spec: of what they do.
        device: where it is to be computed.
        dtype: of the inputs.
        rows: how many inputs the weight meets at once.
    """
    batch = bucket(rows)
    named = {kernel.name: kernel for kernel in kernels}
    spec = _shortened(spec)
    inputs = None if spec.activation is None else (spec.activation.mode, spec.activation.scheme)
    what = _what(tuple(spec.layout.stack), spec.scheme, inputs) + _how(spec)
    threads = f"{torch.get_num_threads()} threads"
    place = threads if device.type == "cpu" else torch.cuda.get_device_name(device)
    key = f"{'/'.join(named)}: {what}, {dtype}, {batch} rows, {place}"
    found = _read(STORE.get(key))
    if found.keys() != named.keys():
        with torch.device(device):  # whatever the default
            x, weight = _inputs(spec, batch).to(dtype), _made_up(spec)
        with torch.no_grad():
            taken = _by_turns(kernels, spec, x, weight)
        text = ", ".join(f"{name} {least:.3g}" for name, least in taken.items())
        STORE.set(key, text)
        found = _read(text)  # as it is read again: unrounded, a near tie could end otherwise
    return found


def _read(text: str | None) -> dict[str, float]:
    """Return times by name from how they are stored; nothing if it is no such text."""
    words = [one.rpartition(" ") for one in text.split(", ")] if text else []
    try:
        return {name: float(taken) for name, _, taken in words}
    except ValueError:
        return {}


@lru_cache(maxsize=1024)  # it is asked for at every call, and takes as long as a small layer
def _what(stack: Shape, scheme: Scheme, inputs: tuple[str, Scheme] | None) -> str:
    met = "float" if inputs is None else f"{inputs[0]} {inputs[1].describe()}"
    scales = f", {scheme.scale_dtype}" if isinstance(scheme, Affine) else ""
    return f"{list(stack)} {scheme.describe()}{scales}, {met} inputs"


def _shortened(spec: KernelSpec) -> KernelSpec:
    """Return what is timed in place of a long sequence, its first steps, and of several layers."""
    operation = spec.operation
    if isinstance(operation, WholeSequence):
        _, count, length = spec.layout.stack
        steps = min(_WHOLE_STEPS, operation.steps)
        one = WholeSequence(operation.cell, ((count, length),) * 2, steps=steps)
        return replace(spec, operation=one)
    if not isinstance(operation, Recurrence):
        return spec
    return replace(spec, operation=replace(operation, sizes=operation.sizes[:_STEPS]))


def _how(spec: KernelSpec) -> str:
    """Return what else a choice depends on: steps that follow each other, and windows."""
    operation = spec.operation
    if isinstance(operation, Convolution):
        return f", {list(spec.layout.native)} by {operation}"
    if isinstance(operation, WholeSequence):
        return f", {operation.cell} of {operation.steps} steps at once"
    if not isinstance(operation, Recurrence):
        return ""
    h = "float" if operation.activation is None else operation.activation.describe()
    return f", {operation.cell} of {bucket(len(operation.sizes))} steps, {h} h"


def _inputs(spec: KernelSpec, batch: int) -> Tensor:
    """Return inputs for a kernel: made-up ones, as many as are asked for or the sequence has."""
    _, count, length = spec.layout.stack
    operation = spec.operation
    if isinstance(operation, Recurrence):
        return torch.ones(sum(operation.sizes), count)
    if isinstance(operation, WholeSequence):
        return torch.ones(operation.steps, batch, length)
    if not isinstance(operation, Convolution):
        return torch.ones(batch, length)
    _, channels, *kernel = spec.layout.native
    side = math.ceil(batch ** (1 / len(kernel)))
    windows = zip(operation.stride, operation.dilation, kernel, strict=True)
    sizes = [max(side * step, apart * (taps - 1) + 1) for step, apart, taps in windows]
    return torch.ones(1, channels * operation.groups, *sizes)


def _made_up(spec: KernelSpec) -> PackedTensor:
    """Return a weight of the shape and scheme of `spec`, of codes that mean nothing."""
    groups, count, length = stack = spec.layout.stack
    scheme = spec.scheme
    if isinstance(scheme, FloatCast):
        codes = torch.zeros(stack, dtype=scheme.dtype)
        return PackedTensor({"codes": codes}, scheme, spec.layout, torch.float32)
    block_size = scheme.granularity.block_size(stack)
    scales = block_counts(stack, block_size)
    if not isinstance(scheme, Affine):
        high = torch.ones(scales)
        qparams = scheme.calculate_qparams(-high, high, block_size=block_size)
        q = scheme.quantize(torch.zeros(stack), qparams)
        return PackedTensor.pack(q, scheme, spec.layout, torch.float32)
    places = (groups, count, packed_length(length, scheme.bits))
    codes = torch.full(places, 65, dtype=scheme.stored_dtype)
    tensors = {"codes": codes, "scale": torch.ones(scales, dtype=scheme.scale_dtype)}
    if scheme.float_zero_point:
        tensors["zero_point"] = torch.zeros(scales, dtype=scheme.scale_dtype)
    elif not scheme.symmetric:
        zeros = packed_length(torch.Size(scales).numel(), scheme.bits)
        tensors["zero_point"] = torch.zeros(zeros, dtype=scheme.stored_dtype)
    return PackedTensor(tensors, scheme, spec.layout, torch.float32)


def _by_turns(
    kernels: Sequence[Kernel], spec: KernelSpec, x: Tensor, weight: PackedTensor
) -> dict[str, float]:
    """Return the least time of a call of each kernel, by name; what disturbs one disturbs all."""
    calls = {kernel.name: _prepared(kernel, spec, x, weight) for kernel in kernels}
    for call in calls.values():
        call()  # what only the first call does is not counted
    alone = x.device.type == "cpu" and torch.get_num_threads() == 1
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(_REPEATS):
        for name, call in calls.items():
            if turn < _LEAST or sum(taken[name]) < _ENOUGH_S:
                taken[name].append(_of_this_thread(call) if alone else timed(call, x.device))
    return {name: min(times) for name, times in taken.items()}


def _of_this_thread(call: Callable[[], object]) -> float:
    """Return the processor time of a call, in which other processes of the machine have no part."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


def _prepared(
    kernel: Kernel, spec: KernelSpec, x: Tensor, weight: PackedTensor
) -> Callable[[], Tensor]:
    """Return a call of `kernel`, the weight as a module would hold it for it."""
    if isinstance(kernel, ArrangingKernel):
        return partial(kernel.product, spec, x, kernel.arrange(spec, weight), None)
    return partial(kernel, spec, x, weight, None)
