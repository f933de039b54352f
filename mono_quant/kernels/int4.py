"""Products with 4-bit weights in panels: torch's own, and some that decode a panel at a time."""

from collections.abc import Iterator
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from mono_quant.base import ArrangingKernel, KernelSpec, PackedTensor
from mono_quant.kernels.codes import SMALLEST, flat, refuse, scales_and_zeros, shaped
from mono_quant.kernels.digits import Factor, digits_of_inputs
from mono_quant.kernels.integer import refuse_inputs
from mono_quant.kernels.ops import int4_mm, int4_panel, int_mm, int_mm_refusal
from mono_quant.kernels.panels import Panels, to_panels
from mono_quant.numerics.granularity import PerChannel, PerGroup, PerTensor
from mono_quant.schemes import Affine

_GROUPS = (256, 128, 64, 32)
_CENTRE = 8  # the code that torch's product takes for zero
_SIXTEEN = 16  # what a high nibble weighs, where it stays in its place
_LOW, _HIGH = 0x0F0F0F0F0F0F0F0F, -0x0F0F0F0F0F0F0F10  # nibbles of eight bytes
_ROWS = 256  # of the weight that are multiplied at once as bytes
_LONGEST, _WIDE = 2048, 64  # of what is decoded at once: 512 KB, which stay in a core's cache


class OnPanels(ArrangingKernel[Panels]):
    """What kernels on panels have in common.

    Attributes:
        fewest: values of a weight that a kernel gains from.
    """

    fewest: ClassVar[int] = SMALLEST

    @property
    def arrangement(self) -> type[Panels]:
        """Panels of 4-bit codes."""
        return Panels

    def supports(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it cannot: 4-bit affine weights and any inputs on a CPU are what it can.

        Scales per group of a multiple of 32 columns, per channel or per tensor; a number of rows
        that panels divide.
        """
        reason = refuse(spec, device, dtype, fewest=self.fewest)
        if reason is None:
            reason = refuse_four_bits(spec) or refuse_inputs(spec.activation)
        if reason is not None:
            return reason
        half = int4_panel()
        if isinstance(half, str):
            return half
        rows = spec.layout.stack[1]
        return f"{rows} rows are no multiple of {2 * half}" if rows % (2 * half) else None

    def arrange(self, spec: KernelSpec, weight: PackedTensor) -> Panels:
        """Return the weight in panels."""
        half = int4_panel()
        if isinstance(half, str):
            raise RuntimeError(half)
        scale, zeros = scales_and_zeros(weight)
        _, rows, length = weight.layout.stack
        group = group_of(weight.block_size[2])
        offset = (_CENTRE - zeros) * scale
        pairs = torch.stack([scale, offset], -1).to(torch.bfloat16).transpose(0, 1)
        repeats = length // group // pairs.shape[0]
        pairs = pairs.repeat_interleave(repeats, 0).expand(-1, rows, -1).contiguous()
        codes = to_panels(weight.tensors["codes"], half)
        return Panels(codes, pairs, weight.tensors["scale"][0], _kept(weight, zeros))


class Int4(OnPanels):
    """Multiplies by torch's own 4-bit product, which reads weights in panels.

    Inputs, scales and offsets are bfloat16 inside, and so is the result; sums are float32. Inputs
    of a normal distribution and weights of a trained layer's give an SQNR of about 50 dB against
    the reference, where 4 bits in groups of 64 leave about 20 dB against the float layer.

    Quantized inputs are multiplied as codes less their zero point, which bfloat16 holds exactly;
    those that are not finite are left to `PanelBlocks`.
    """

    name = "int4"
    fewest = 1  # two calls, where the reference takes a dozen

    def product(self, spec: KernelSpec, x: Tensor, weight: Panels, bias: Tensor | None) -> Tensor:
        """Return ``x @ weight.T + bias``, ``[..., out]`` in the dtype of `x`."""
        length, group = spec.layout.stack[2], weight.group
        if spec.activation is None:
            rows = flat(x, length, torch.bfloat16)
            found = int4_mm(rows, weight.codes, group, weight.pairs).to(torch.float32)
            return shaped(found, bias, x)
        inputs = digits_of_inputs(flat(x, length), spec.activation)
        if inputs is None:
            return PANEL_BLOCKS.product(spec, x, weight, bias)
        rows = inputs.digits.to(torch.int16).sub_(inputs.zero).to(torch.bfloat16)
        found = int4_mm(rows, weight.codes, group, weight.pairs).to(torch.float32)
        return shaped(found.mul_(inputs.unit), bias, x)


class PanelBlocks(OnPanels):
    """Decodes some panels of a weight into a buffer, multiplies, and goes on with the next ones.

    What `Blocks` does, on the order that `Int4` reads: values are those of the reference, in
    float32. What is decoded is ``[in, 64]``, which the product takes faster than rows.
    """

    name = "int4-blocks"

    def product(self, spec: KernelSpec, x: Tensor, weight: Panels, bias: Tensor | None) -> Tensor:
        """Return ``x @ weight.T + bias``, ``[..., out]`` in the dtype of `x`."""
        rows = flat(x, spec.layout.stack[2])
        if spec.activation is not None:
            rows = spec.activation.fake_quantize(rows)
        count, length, half = weight.codes.shape
        scale = weight.scale.to(torch.float32)
        runs, size = scale.shape[1], length // scale.shape[1]
        scale = scale.expand(2 * half * count, runs)
        # what the codes of zero make of the sums of inputs; products with codes are added to it
        sums = rows.reshape(-1, runs, size).sum(-1)
        out = torch.mm(sums, (scale * weight.centres()).mT).neg_()
        scales = scale.mT.contiguous()  # [runs, out]
        scales.view(runs, count, 2, half)[:, :, 1] /= _SIXTEEN  # high nibbles stay in their place
        at_once, longest = max(1, _WIDE // (2 * half)), min(_LONGEST, length)
        codes = rows.new_empty(at_once * longest * half, dtype=torch.uint8)
        values = rows.new_empty(at_once * longest * half * 2)
        for start, stop in _pieces(length, size):
            here, part = slice(start // size, -(-stop // size)), rows[:, start:stop]
            for first in range(0, count, at_once):
                stored = weight.codes[first : first + at_once, start:stop]
                code = codes[: stored.numel()].view(stored.shape)
                block = values[: 2 * stored.numel()].view(stop - start, -1)
                nibbles = block.view(stop - start, len(stored), 2, half).unbind(2)
                for mask, target in zip((_LOW, _HIGH), nibbles, strict=True):
                    words = stored.view(torch.int64), code.view(torch.int64)  # eight bytes at once
                    torch.bitwise_and(words[0], mask, out=words[1])
                    target.copy_(code.transpose(0, 1))
                columns = slice(2 * half * first, 2 * half * (first + len(stored)))
                by_run = block.view(here.stop - here.start, -1, block.shape[1])
                by_run.mul_(scales[here, None, columns])
                out[:, columns].addmm_(part, block)
        return shaped(out, bias, x)


class PanelBytes(OnPanels):
    """Puts half panels of a weight on an 8-bit grid of each row, and multiplies integers.

    For many rows of quantized inputs, which it is twice as fast for as a float product. What is
    added to the error is at most half a step of an 8-bit grid that covers all that a row's groups
    can hold: about 40 dB below the weight, where 4 bits in groups of 64 are 20 dB below it. The
    products are then exact but for the scales.

    Inputs that are not finite are left to `PanelBlocks`.
    """

    name = "int4-bytes"

    def supports(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it cannot: what the others can, with quantized inputs, is what it can."""
        if spec.activation is None:
            return "inputs are float"
        return super().supports(spec, device, dtype) or int_mm_refusal()

    def product(self, spec: KernelSpec, x: Tensor, weight: Panels, bias: Tensor | None) -> Tensor:
        """Return ``x @ weight.T + bias``, ``[..., out]`` in the dtype of `x`."""
        _, total, length = spec.layout.stack
        assert spec.activation is not None  # `supports` saw to it
        inputs = digits_of_inputs(flat(x, length), spec.activation)
        if inputs is None:
            return PANEL_BLOCKS.product(spec, x, weight, bias)
        left = torch.cat((inputs.digits, inputs.digits.new_ones(1, length)))  # ones sum the weight
        count, _, half = weight.codes.shape
        bytes_ = _Bytes.of(weight)
        added = bias.to(torch.float32) if bias is not None else None
        out = torch.empty(len(inputs.digits), total)
        at_once = max(1, _ROWS // (2 * half))
        right = left.new_empty(length, 2 * half * at_once, dtype=torch.int8)
        for start in range(0, count, at_once):
            panels = range(start, min(start + at_once, count))
            columns = slice(2 * half * start, 2 * half * panels.stop)
            block = right[:, : 2 * half * len(panels)]
            for place, panel in enumerate(panels):
                bytes_.fill(panel, block[:, 2 * half * place : 2 * half * (place + 1)])
            products = int_mm(left, block.t())
            own = added[columns] if added is not None else None
            factor = Factor(block, products[-1:], None, bytes_.step[columns], own)
            factor.finish(inputs, products[None, :-1], None, out[:, columns])
        return shaped(out, None, x)


@attrs.frozen(eq=False)
class _Bytes:
    """Puts panels of a 4-bit weight on an 8-bit grid, symmetric and of each row.

    Attributes:
        weight: the panels.
        step: of each row's grid, ``float32 [out]``.
        scale: of groups, in steps, as of `_by_panel`.
        offset: what the codes of zero make of it, negated, in the same shape.
        codes: room for nibbles, ``uint8 [2, in * half]``.
        values: room for floats, ``[in * half]``.
    """

    weight: Panels
    step: Tensor
    scale: Tensor
    offset: Tensor
    codes: Tensor
    values: Tensor

    @classmethod
    def of(cls, weight: Panels) -> "_Bytes":
        """Return what fills bytes from `weight`."""
        count, length, half = weight.codes.shape
        scale = weight.scale.to(torch.float32)
        scale = scale.expand(2 * half * count, scale.shape[1])
        below = scale * weight.centres()
        step = weight.byte_step().expand(len(scale))[:, None]
        codes = weight.codes.new_empty(2, length * half)
        return cls(
            weight,
            step.flatten(),
            _by_panel(scale / step, count, half, _SIXTEEN),
            _by_panel(below / -step, count, half, 1),
            codes,
            torch.empty(codes.shape[1]),
        )

    def fill(self, panel: int, out: Tensor) -> None:
        """Write a panel's rows as columns, ``int8 [in, 2 * half]``."""
        words = self.weight.codes[panel].reshape(-1).view(torch.int64)
        low, high = self.codes.view(torch.int64)
        torch.bitwise_and(words, _LOW, out=low)
        torch.bitwise_and(words, _HIGH, out=high)
        half = self.weight.codes.shape[2]
        for nibble in range(2):
            scale, offset = self.scale[panel, nibble], self.offset[panel, nibble]
            by_run = self.values.copy_(self.codes[nibble]).view(len(scale), -1, half)
            torch.addcmul(offset, by_run, scale, out=by_run)
            out[:, half * nibble : half * (nibble + 1)] = by_run.round_().view(-1, half)


def _kept(weight: PackedTensor, zeros: Tensor) -> Tensor | None:
    """Return what `PanelBlocks` reads zero points from: floats as they are stored, or bytes."""
    stored = weight.tensors.get("zero_point")
    if stored is None:
        return None
    return stored[0] if stored.is_floating_point() else zeros.to(torch.uint8)


def _by_panel(scale: Tensor, count: int, half: int, high: int) -> Tensor:
    """Return ``scale [out, runs]`` as ``[panels, 2, runs, 1, half]``.

    Those of high nibbles are divided by `high`: they weigh 16 where they stay in their place.
    """
    runs = scale.shape[1]
    parts = scale.reshape(count, 2, half, runs).transpose(2, 3).contiguous()
    parts[:, 1] /= high
    return parts.view(count, 2, runs, 1, half)


def _pieces(length: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield where columns that are decoded at once start and stop: whole runs, or parts of one."""
    if size <= _LONGEST:
        step = _LONGEST // size * size
        yield from ((start, min(start + step, length)) for start in range(0, length, step))
        return
    for run in range(0, length, size):
        for start in range(run, run + size, _LONGEST):
            yield start, min(start + _LONGEST, run + size)


def refuse_four_bits(spec: KernelSpec) -> str | None:
    """Return why torch's product with 4-bit weights, on any device, cannot read one, or None."""
    scheme = spec.scheme
    if type(scheme) is not Affine or scheme.bits != 4:
        return f"the weight is {scheme.describe()}"
    if type(scheme.granularity) not in (PerTensor, PerChannel, PerGroup):
        return f"the weight's scales are {scheme.granularity.describe()}"
    columns = scheme.granularity.block_size(spec.layout.stack)[2]
    if not group_of(columns):
        return f"{columns} columns share a scale, which is no multiple of {_GROUPS[-1]}"
    return None


def group_of(columns: int) -> int:
    """Return the largest group that torch's product knows and that divides `columns`, or 0."""
    return next((size for size in _GROUPS if columns % size == 0), 0)


INT4 = Int4()
PANEL_BLOCKS = PanelBlocks()
PANEL_BYTES = PanelBytes()
