"""Products with 4-bit weights in panels: torch's own, and one that decodes a panel at a time."""

from collections.abc import Iterator

import attrs
import torch
from torch import Tensor

from mono_quant.base import ArrangingKernel, KernelSpec, PackedTensor
from mono_quant.kernels.codes import flat, refuse, scales_and_zeros, shaped
from mono_quant.kernels.ops import int4_mm
from mono_quant.kernels.panels import Panels, to_panels
from mono_quant.kernels.trial import int4_panel
from mono_quant.numerics.granularity import PerChannel, PerGroup, PerTensor
from mono_quant.schemes import Affine

_GROUPS = (256, 128, 64, 32)
_CENTRE = 8  # the code that torch's product takes for zero
_HIGH = 16  # what a high nibble weighs, where it stays in its place
_LONGEST = 4096  # columns that are decoded at once: 1 MB, which stays in a core's cache


@attrs.frozen
class _OnPanels(ArrangingKernel[Panels]):
    """What kernels on panels have in common."""

    @property
    def arrangement(self) -> type[Panels]:
        """Panels of 4-bit codes."""
        return Panels

    def supports(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it cannot: 4-bit affine weights and float inputs on a CPU are what it can.

        Scales per group of a multiple of 32 columns, per channel or per tensor; a number of rows
        that panels divide.
        """
        if reason := refuse(spec, device, dtype) or _refuse(spec):
            return reason
        half = int4_panel()
        if isinstance(half, str):
            return half
        rows = spec.layout.stack[1]
        return f"{rows} rows are no multiple of {2 * half}" if rows % (2 * half) else None

    def arrange(self, weight: PackedTensor) -> Panels:
        """Return the weight in panels."""
        half = int4_panel()
        if isinstance(half, str):
            raise RuntimeError(half)
        scale, zeros = scales_and_zeros(weight)
        _, rows, length = weight.layout.stack
        group = _group(weight.block_size[2])
        offset = (_CENTRE - zeros) * scale
        pairs = torch.stack([scale, offset], -1).to(torch.bfloat16).transpose(0, 1)
        repeats = length // group // pairs.shape[0]
        pairs = pairs.repeat_interleave(repeats, 0).expand(-1, rows, -1).contiguous()
        kept = zeros.to(torch.uint8) if "zero_point" in weight.tensors else None
        codes = to_panels(weight.tensors["codes"], half)
        return Panels(codes, pairs, weight.tensors["scale"][0], kept)


@attrs.frozen
class Int4(_OnPanels):
    """Multiplies by torch's own 4-bit product, which reads weights in panels.

    Inputs, scales and offsets are bfloat16 inside, and so is the result; sums are float32. Inputs
    of a normal distribution and weights of a trained layer's give an SQNR of about 47 dB against
    the reference, where 4 bits in groups of 64 leave about 20 dB against the float layer.
    """

    name: str = attrs.field(default="int4", init=False)

    def product(self, spec: KernelSpec, x: Tensor, weight: Panels, bias: Tensor | None) -> Tensor:
        """Return ``x @ weight.T + bias``, ``[..., out]`` in the dtype of `x`."""
        length = spec.layout.stack[2]
        rows = flat(x, length, torch.bfloat16)
        group = length // weight.pairs.shape[0]
        return shaped(int4_mm(rows, weight.codes, group, weight.pairs).to(torch.float32), bias, x)


@attrs.frozen
class PanelBlocks(_OnPanels):
    """Decodes a panel of a weight into a buffer, multiplies, and goes on with the next one.

    What `Blocks` does, on the order that `Int4` reads: values are those of the reference, in
    float32. A decoded panel is ``[in, 64]``, which the product takes faster than rows.
    """

    name: str = attrs.field(default="int4-blocks", init=False)

    def product(self, spec: KernelSpec, x: Tensor, weight: Panels, bias: Tensor | None) -> Tensor:
        """Return ``x @ weight.T + bias``, ``[..., out]`` in the dtype of `x`."""
        rows = flat(x, spec.layout.stack[2])
        count, length, half = weight.codes.shape
        scale = weight.scale.to(torch.float32)
        runs, size = scale.shape[1], length // scale.shape[1]
        # every code is that of zero too large: start from what that makes of the sums
        zeros = weight.zeros.to(torch.float32) if weight.zeros is not None else float(_CENTRE)
        sums = rows.reshape(-1, runs, size).sum(-1)
        out = torch.mm(sums, (scale * zeros).expand(2 * half * count, -1).t()).neg_()
        scales = _by_panel(scale.expand(2 * half * count, -1), count, half)
        room = torch.empty(min(_LONGEST, length), half, dtype=torch.uint8)
        wide = torch.empty(len(room), 2 * half)
        for start, stop in _pieces(length, size):
            codes, block = room[: stop - start], wide[: stop - start]
            here = slice(start // size, -(-stop // size))
            by_run = block.view(here.stop - here.start, -1, 2 * half)
            for panel in range(count):
                stored = weight.codes[panel, start:stop]
                torch.bitwise_and(stored, 15, out=codes)
                block[:, :half].copy_(codes)
                torch.bitwise_and(stored, 240, out=codes)
                block[:, half:].copy_(codes)
                by_run.mul_(scales[panel, here])
                place = slice(panel * 2 * half, (panel + 1) * 2 * half)
                out[:, place].addmm_(rows[:, start:stop], block)
        return shaped(out, bias, x)


def _by_panel(scale: Tensor, count: int, half: int) -> Tensor:
    """Return ``scale [out, runs]`` as ``[panels, runs, 1, 2 * half]``; high nibbles weigh 16."""
    runs = scale.shape[1]
    parts = scale.reshape(count, 2, half, runs).permute(0, 3, 1, 2).contiguous()
    parts[:, :, 1] /= _HIGH
    return parts.view(count, runs, 1, 2 * half)


def _pieces(length: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield where columns that are decoded at once start and stop: whole runs, or parts of one."""
    if size <= _LONGEST:
        step = _LONGEST // size * size
        yield from ((start, min(start + step, length)) for start in range(0, length, step))
        return
    for run in range(0, length, size):
        for start in range(run, run + size, _LONGEST):
            yield start, min(start + _LONGEST, run + size)


def _refuse(spec: KernelSpec) -> str | None:
    scheme = spec.scheme
    if type(scheme) is not Affine or scheme.bits != 4:
        return f"the weight is {scheme.describe()}"
    if type(scheme.granularity) not in (PerTensor, PerChannel, PerGroup):
        return f"the weight's scales are {scheme.granularity.describe()}"
    if spec.activation is not None:
        return f"inputs are {spec.activation.describe()}"
    columns = scheme.granularity.block_size(spec.layout.stack)[2]
    if not _group(columns):
        return f"{columns} columns share a scale, which is no multiple of {_GROUPS[-1]}"
    return None


def _group(columns: int) -> int:
    """Return the largest group that torch's product knows and that divides `columns`, or 0."""
    return next((size for size in _GROUPS if columns % size == 0), 0)


INT4 = Int4()
PANEL_BLOCKS = PanelBlocks()
