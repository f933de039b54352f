"""Convolutions of integers: what each output position sees as a row of a matrix product."""

import math
from collections.abc import Iterator
from typing import final

import attrs
import torch
from torch import Tensor

from mono_quant.base import Activation, Arranged, ArrangingKernel, KernelSpec, PackedTensor
from mono_quant.kernels.codes import DTYPES, has_finite_sum
from mono_quant.kernels.digits import AT_ONCE, Digits, Factor, digits_of_codes
from mono_quant.kernels.integer import INTEGER, refuse_inputs, refuse_weight
from mono_quant.kernels.ops import int_mm_refusal
from mono_quant.kernels.reference import Reference
from mono_quant.numerics.granularity import Shape
from mono_quant.numerics.values import Layout, QParams
from mono_quant.operations import Convolution

_REFERENCE = Reference()
_SMALLEST = 1 << 12  # weights of fewer values gain nothing
_LONG = 16  # lines of so many times the positions that are done at once are cut


@final
@attrs.frozen(eq=False)
class Taps(Arranged):
    """The weight of a convolution, the channels of one tap of the kernel side by side.

    Attributes:
        codes: ``int8 [out, taps * in]``.
        sums: of each row, ``int32 [1, out]``.
        scale: as the weight stores it; shared, not copied.
        zero_point: as the weight stores it, or None; shared.
        layout: of the weight.
    """

    codes: Tensor
    sums: Tensor
    scale: Tensor
    zero_point: Tensor | None
    layout: Layout

    @property
    def beside(self) -> int:
        """Bytes of the sums."""
        return self.sums.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of the codes."""
        return self.codes.nbytes

    def canonical(self) -> Tensor:
        """Return the codes as `PackedTensor` has them, ``int8 [1, out, in * taps]``."""
        rows, channels, *kernel = self.layout.native
        taps = self.codes.reshape(rows, math.prod(kernel), channels)
        return taps.transpose(1, 2).reshape(self.layout.stack).contiguous()


class IntegerConvolution(ArrangingKernel[Taps]):
    """Multiplies the codes that each output position sees by 8-bit weights, as `Integer` does.

    Rows of codes are gathered some positions at a time, a quarter of the bytes that floats would
    take. The result lies in memory as the input does: channels last or first.

    Inputs that are not finite are left to the reference.
    """

    name = INTEGER.name

    @property
    def arrangement(self) -> type[Taps]:
        """Rows of taps."""
        return Taps

    def supports(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it cannot: 8-bit weights in one group, quantized inputs, a CPU."""
        operation = spec.operation
        if type(operation) is not Convolution:
            return f"it is a {type(operation).__name__}, not a convolution"
        if operation.groups != 1:
            return f"its channels are in {operation.groups} groups"
        reason = refuse_convolution(spec, device, dtype, _SMALLEST)
        return reason or refuse_weight(spec) or int_mm_refusal()

    def arrange(self, spec: KernelSpec, weight: PackedTensor) -> Taps:
        """Return the weight with its taps in rows."""
        rows, channels, *kernel = weight.layout.native
        codes = weight.tensors["codes"].reshape(rows, channels, math.prod(kernel))
        codes = codes.transpose(1, 2).reshape(rows, -1).contiguous()
        sums = codes.sum(1, dtype=torch.int32)[None]
        scale, zero_point = weight.tensors["scale"], weight.tensors.get("zero_point")
        return Taps(codes, sums, scale, zero_point, weight.layout)

    def product(self, spec: KernelSpec, x: Tensor, weight: Taps, bias: Tensor | None) -> Tensor:
        """Return the convolution in the dtype of `x`."""
        operation, activation = spec.operation, spec.activation
        assert isinstance(operation, Convolution)  # `supports` saw to it
        assert activation is not None
        if not has_finite_sum(x):
            scales = (weight.scale, weight.zero_point)
            return in_reference(weight.canonical(), scales, spec, x, bias)
        batched = x.dim() == len(operation.stride) + 2
        batch = (x if batched else x[None]).to(torch.float32)
        frame = Frame.of(operation, tuple(batch.shape), weight.layout.native)
        qparams = of_samples(activation, batch)
        factor = Factor.of(weight.codes, weight.sums, weight.scale, weight.zero_point, bias)
        out = batch.new_empty(len(batch), *frame.output, len(weight.codes))
        for start in range(0, len(batch), frame.samples):
            part = slice(start, start + frame.samples)
            codes = digits_of_codes(batch, activation.scheme, qparams, part)
            for rows, place in frame.rows(codes):
                factor.product(rows, out[(part, *place)].view(-1, out.shape[-1]))
        found = out.movedim(-1, 1).to(x.dtype)
        if batch.is_contiguous():
            found = found.contiguous()
        return found if batched else found[0]


@attrs.frozen
class Frame:
    """Where the positions of a convolution's output find what they see.

    Attributes:
        kernel: taps in each dimension.
        stride: positions of the input from one of the output to the next.
        dilation: positions from one tap to the next.
        before: positions of zeros before the input.
        after: those behind it.
        output: positions of the output.
        at_once: how many positions of the output to do at once.
    """

    kernel: Shape
    stride: Shape
    dilation: Shape
    before: Shape
    after: Shape
    output: Shape
    at_once: int

    @property
    def samples(self) -> int:
        """How many to do at once: several are done whole."""
        return max(1, self.at_once // math.prod(self.output))

    @classmethod
    def of(cls, operation: Convolution, shape: Shape, native: Shape) -> "Frame":
        """Return the frame for inputs ``[N, C, *positions]`` and a weight ``[out, C, *kernel]``.

        Raises:
            RuntimeError: they do not fit, as in torch's own convolution.
        """
        kernel, sizes = native[2:], shape[2:]
        if len(shape) != len(native):
            raise RuntimeError(f"an input {list(shape)} does not meet a weight {list(native)}")
        reach = [
            step * (size - 1) + 1 for step, size in zip(operation.dilation, kernel, strict=True)
        ]
        if operation.padding == "same":
            before = tuple((size - 1) // 2 for size in reach)
            after = tuple(size - 1 - zeros for size, zeros in zip(reach, before, strict=True))
        elif isinstance(operation.padding, str):  # "valid"
            before = after = (0,) * len(kernel)
        else:
            before = after = operation.padding
        room = [sum(one) for one in zip(before, sizes, after, strict=True)]
        if shape[1] != native[1] * operation.groups or any(map(int.__lt__, room, reach)):
            raise RuntimeError(f"an input {list(shape)} does not meet a weight {list(native)}")
        steps = zip(room, reach, operation.stride, strict=True)
        output = tuple((size - seen) // stride + 1 for size, seen, stride in steps)
        at_once = AT_ONCE * torch.get_num_threads()
        return cls(
            tuple(kernel), operation.stride, operation.dilation, before, after, output, at_once
        )

    def rows(self, x: Digits) -> Iterator[tuple[Digits, tuple[slice, ...]]]:
        """Yield what positions see, and where in the output they are.

        Args:
            x: codes ``[n, C, *positions]``, zeros and units ``[n or 1, ...]``.
        """
        padded = self._padded(x)
        count, *steps, _ = padded.stride()
        moves = [step * stride for step, stride in zip(steps, self.stride, strict=True)]
        taps = [step * apart for step, apart in zip(steps, self.dilation, strict=True)]
        samples, channels = padded.shape[0], padded.shape[-1]
        windows = padded.as_strided(
            (samples, *self.output, *self.kernel, channels), (count, *moves, *taps, 1)
        )
        for place in _places(self.output, self.at_once):
            seen = windows[(slice(None), *place)]
            rows = seen.reshape(-1, math.prod(self.kernel) * channels).contiguous()  # no overlap
            each = len(rows) // samples
            yield Digits(rows, _of_rows(x.zero, each), _of_rows(x.unit, each)), place

    def _padded(self, x: Digits) -> Tensor:
        """Return the codes as ``[n, *positions, C]``, within codes of zero."""
        codes = x.digits.movedim(1, -1)
        if not any(self.before) and not any(self.after):
            return codes.contiguous()
        sizes = codes.shape[1:-1]
        room = [sum(one) for one in zip(self.before, sizes, self.after, strict=True)]
        padded = codes.new_empty(len(codes), *room, codes.shape[-1])
        zeros = x.zero.flatten().tolist()  # of each sample, or one of all
        for part, zero in zip(padded.view(len(zeros), -1), zeros, strict=True):
            part.fill_(zero)
        ends = zip(self.before, sizes, strict=True)
        inner = tuple(slice(zeros, zeros + size) for zeros, size in ends)
        padded[(slice(None), *inner)] = codes
        return padded


def _places(sizes: Shape, at_once: int) -> Iterator[tuple[slice, ...]]:
    """Yield parts of positions that follow each other: lines, or parts of lines that are long."""
    first, inner = sizes[0], math.prod(sizes[1:])
    if inner > _LONG * at_once:
        for line in range(first):
            yield from ((slice(line, line + 1), *place) for place in _places(sizes[1:], at_once))
        return
    step = max(1, at_once // inner)
    yield from ((slice(start, start + step),) for start in range(0, first, step))


def refuse_convolution(
    spec: KernelSpec, device: torch.device, dtype: torch.dtype, smallest: int
) -> str | None:
    """Return why no convolution of codes is done, or None; of the weight only its size is asked."""
    if device.type != "cpu" or dtype not in DTYPES:
        return f"inputs are {dtype} on {device.type}"
    if spec.activation is None:
        return "inputs are float"
    if math.prod(spec.layout.stack) < smallest:
        return f"{math.prod(spec.layout.stack)} values are too few to gain from it"
    return refuse_inputs(spec.activation)


def of_samples(activation: Activation, batch: Tensor) -> QParams:
    """Return the parameters for ``batch [N, C, *positions]``, each shaped to meet it."""
    if activation.scale is not None:
        return activation.qparams(batch)
    rows = batch if batch.is_contiguous() else batch.movedim(1, -1)
    found = activation.qparams(rows.flatten(1))
    ones = (1,) * (batch.dim() - 1)
    scale, zero_point = found.scale, found.zero_point
    assert scale is not None  # an Affine has one
    zero_point = zero_point.reshape(-1, *ones) if zero_point is not None else None
    return QParams(scale.reshape(-1, *ones), zero_point, (1, *batch.shape[1:]))


def _of_rows(values: Tensor, each: int) -> Tensor:
    """Return values per sample, or the one of all, for `each` rows of every sample."""
    values = values.reshape(-1, 1)
    return values if values.shape[0] == 1 else values.repeat_interleave(each, 0)


def in_reference(
    codes: Tensor,
    scales: tuple[Tensor, Tensor | None],
    spec: KernelSpec,
    x: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Return what the reference makes of `x`.

    Args:
        codes: canonical ones.
        scales: scale and zero point, as the weight stores them.
        spec: what is to be done.
        x: the input.
        bias: of the layer, or None.
    """
    scale, zero_point = scales
    tensors = {"codes": codes, "scale": scale}
    if zero_point is not None:
        tensors["zero_point"] = zero_point
    return _REFERENCE(spec, x, PackedTensor(tensors, spec.scheme, spec.layout, x.dtype), bias)


INTEGER_CONVOLUTION = IntegerConvolution()
