"""Products that `torch.compile` makes fast code of: plain torch, as a trace wants it."""

import sys

import torch
from torch import Tensor

from mono_quant.base import Activation, Kernel, KernelSpec, PackedTensor
from mono_quant.kernels.codes import SUMS, flat, refuse, shaped
from mono_quant.kernels.cuda_tiles import CUDA_INT4, CUDA_TILES_DECODED, CudaTilesDecoded
from mono_quant.kernels.digits import Digits, Factor, digits_of_codes, digits_of_floats
from mono_quant.kernels.int4 import INT4, PANEL_BLOCKS, PANEL_BYTES, OnPanels
from mono_quant.kernels.integer import INTEGER, refuse_weight
from mono_quant.kernels.ops import int4_mm, int_mm, int_mm_refusal
from mono_quant.kernels.panels import Panels
from mono_quant.kernels.timing import LARGEST_BATCH, seconds
from mono_quant.schemes import FloatCast


class TracedInteger:
    """What `Integer` does, without a loop or a branch on values.

    Compilers fuse what goes before the product with what follows it. Sums of the weight's codes
    are products with ones where the weight does not come with them.

    A row with NaN is NaN, and one of float inputs that holds infinity.
    """

    name = INTEGER.name

    def supports(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it cannot: what `Integer` does is what it can."""
        return INTEGER.supports(spec, device, dtype)

    def __call__(
        self, spec: KernelSpec, x: Tensor, weight: PackedTensor, bias: Tensor | None
    ) -> Tensor:
        """Return ``x @ weight.T + bias``, ``[..., out]`` in the dtype of `x`."""
        rows, tensors = flat(x, spec.layout.stack[2]), weight.tensors
        activation, codes = spec.activation, tensors["codes"][0]
        digits = _digits(rows, activation)
        products, sums = int_mm(digits.digits, codes), tensors.get(SUMS)
        if sums is None:
            sums = int_mm(digits.digits.new_ones(1, digits.digits.shape[1]), codes)
        factor = Factor.of(codes, sums, tensors["scale"], tensors.get("zero_point"), bias)
        out = factor.of_sums(products, digits.digits, digits.zero, digits.unit, digits.places)
        return shaped(_with_nan(out, rows, activation), None, x)


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


class TracedInt4(OnPanels):
    """What `Int4` does: one operator, which a compiler calls as it is. A row with NaN is NaN."""

    name = INT4.name

    def product(self, spec: KernelSpec, x: Tensor, weight: Panels, bias: Tensor | None) -> Tensor:
        """Return ``x @ weight.T + bias``, ``[..., out]`` in the dtype of `x`."""
        rows, activation = flat(x, spec.layout.stack[2]), spec.activation
        left, unit = rows.to(torch.bfloat16), None
        if activation is not None:
            digits = _digits(rows, activation)
            left = (digits.digits.to(torch.int16) - digits.zero).to(torch.bfloat16)
            unit = digits.unit
        out = int4_mm(left, weight.codes, weight.group, weight.pairs).to(torch.float32)
        out = out if unit is None else _with_nan(out * unit, rows, activation)
        return shaped(out, bias, x)


class TracedPanels(OnPanels):
    """What `PanelBlocks` does, all panels at once: a compiler decodes them in one pass."""

    name = PANEL_BLOCKS.name

    def product(self, spec: KernelSpec, x: Tensor, weight: Panels, bias: Tensor | None) -> Tensor:
        """Return ``x @ weight.T + bias``, ``[..., out]`` in the dtype of `x`."""
        rows = flat(x, spec.layout.stack[2])
        if spec.activation is not None:
            rows = spec.activation.fake_quantize(rows)
        return shaped(torch.mm(rows, weight.decoded()), bias, x)


class TracedBytes(OnPanels):
    """What `PanelBytes` does, all panels at once. A row with NaN is NaN."""

    name = PANEL_BYTES.name

    def product(self, spec: KernelSpec, x: Tensor, weight: Panels, bias: Tensor | None) -> Tensor:
        """Return ``x @ weight.T + bias``, ``[..., out]`` in the dtype of `x`."""
        rows, activation = flat(x, spec.layout.stack[2]), spec.activation
        digits, values = _digits(rows, activation), weight.decoded()
        step = weight.byte_step().expand(values.shape[1])
        codes = (values / step).round().to(torch.int8)  # [in, out]
        products, sums = int_mm(digits.digits, codes.t()), codes.sum(0, True, dtype=torch.int32)
        added = bias.to(torch.float32) if bias is not None else None
        factor = Factor(codes.t(), sums, None, step, added)
        out = factor.of_sums(products, digits.digits, digits.zero, digits.unit)
        return shaped(_with_nan(out, rows, activation), None, x)


TracedMany = TracedPanels | TracedBytes | CudaTilesDecoded
"""What computes many rows of inputs from 4-bit codes in an order of a device."""


def for_many(spec: KernelSpec, device: torch.device) -> TracedMany:
    """Return what computes many rows of inputs in traces from 4-bit codes in a device's order.

    On a CPU quantized inputs are multiplied as bytes, if it can.
    """
    if device.type == "cuda":
        return CUDA_TILES_DECODED
    return PANELS_TRACED if spec.activation is None or int_mm_refusal() else BYTES_TRACED


def most_rows(spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> int:
    """Return for how many rows of inputs torch's own product of 4-bit codes serves traces.

    For as many as it is at least as fast here as what is for many.
    """
    few, many = _eager(for_many(spec, device))
    most = 0
    for rows in _TIMED:
        taken = seconds((few, many), spec, device, dtype, rows)
        if taken[few.name] > taken[many.name]:
            return most
        most = rows
    return sys.maxsize


def _eager(many: TracedMany) -> tuple[Kernel, Kernel]:
    """Return what computes few rows and what computes many where nobody makes a trace."""
    if many is CUDA_TILES_DECODED:
        return CUDA_INT4, CUDA_TILES_DECODED
    return INT4, PANEL_BYTES if many is BYTES_TRACED else PANEL_BLOCKS


_TIMED = (1, 8, 64, LARGEST_BATCH)


def _digits(rows: Tensor, activation: Activation | None) -> Digits:
    """Return inputs as integers, whether they are on a grid or not."""
    if activation is None:
        return digits_of_floats(rows)
    return digits_of_codes(rows, activation.scheme, activation.qparams(rows), None)


def _with_nan(out: Tensor, rows: Tensor, activation: Activation | None) -> Tensor:
    """Return a product of integers, NaN where an input is: the scales of dynamic ones are so."""
    if activation is not None and activation.mode != "static":
        return out
    peak = rows.amax(1, keepdim=True) if activation is not None else rows.abs().amax(1, True)
    lost = peak.isnan() if activation is not None else ~peak.isfinite()
    return out.masked_fill(lost, float("nan"))


INTEGER_TRACED, ROW_TRACED = TracedInteger(), TracedRow()
INT4_TRACED, PANELS_TRACED, BYTES_TRACED = TracedInt4(), TracedPanels(), TracedBytes()
