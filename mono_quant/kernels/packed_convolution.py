"""Convolutions of codes by oneDNN's integer operator, floats out."""

import math
from typing import ClassVar, final

import attrs
import torch
from torch import Tensor

from mono_quant.base import Activation, Arranged, ArrangingKernel, KernelSpec, PackedTensor
from mono_quant.kernels import onednn, quantized
from mono_quant.kernels.codes import has_finite_sum
from mono_quant.kernels.convolution import Frame, in_reference, of_samples, refuse_convolution
from mono_quant.kernels.digits import SIGN, Digits, digits_of_codes, is_usual, one_grid
from mono_quant.kernels.integer import refuse_grid
from mono_quant.kernels.onednn import Place
from mono_quant.kernels.ops import unfollowed
from mono_quant.kernels.packed import PackedWeight
from mono_quant.numerics.granularity import Shape
from mono_quant.operations import Convolution, IntTuple
from mono_quant.schemes import Affine

_SMALLEST = 1 << 8  # weights of fewer values gain nothing
_TOP = 255
_HUGE = 1e30  # a scale beyond it times a sum of codes could overflow where the result does not


@final
@attrs.frozen(eq=False)
class PackedTaps(Arranged):
    """The weight of a convolution as oneDNN packs it.

    Attributes:
        pack: the weight.
        scale: as the weight stores it; shared, not copied.
        zero_point: as the weight stores it, or None; shared.
        stack: shape of the canonical codes.
    """

    traceable: ClassVar[bool] = False

    pack: PackedWeight
    scale: Tensor
    zero_point: Tensor | None
    stack: Shape

    @property
    def beside(self) -> int:
        """Bytes of scales in float32, and of what zero points need."""
        kept = (self.pack.scale, self.pack.zeros, self.pack.ones)
        return sum(part.numel() * part.element_size() for part in kept if part is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes; oneDNN does not tell what it adds to fill its blocks."""
        return math.prod(self.stack)

    def canonical(self) -> Tensor:
        """Return the codes as `PackedTensor` has them, ``int8 [groups, out, in * taps]``."""
        return unfollowed(lambda: self.pack.weight.to_dense().reshape(self.stack).contiguous())


@final
class PackedConvolution(ArrangingKernel[PackedTaps]):
    """Convolutions of quantized inputs and 8-bit weights, in any groups, by oneDNN.

    Sums are exact; float rounding enters with the scales alone. The result lies in memory as the
    input does: channels last or first. A weight that another layer uses with other strides was
    packed for one of them; the other's are left to the reference, as inputs that are not finite.
    """

    name = "onednn"

    @property
    def arrangement(self) -> type[PackedTaps]:
        """What oneDNN packs."""
        return PackedTaps

    def supports(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it cannot: 8-bit weights, quantized inputs, one or two dimensions, a CPU."""
        operation = spec.operation
        if type(operation) is not Convolution or len(operation.stride) > 2:
            return "it is no convolution of one or two dimensions"
        reason = refuse_convolution(spec, device, dtype, _SMALLEST) or refuse_grid(spec.scheme)
        if reason is not None:
            return reason
        if _place(operation, spec.layout.native) is None:
            return "it pads one end more than the other"
        return onednn.refuse_conv()

    def arrange(self, spec: KernelSpec, weight: PackedTensor) -> PackedTaps:
        """Return the weight, packed for the convolution of `spec`."""
        tensors, (count, _, *kernel) = weight.tensors, weight.layout.native
        scale, zero_point = tensors["scale"], tensors.get("zero_point")
        codes = tensors["codes"].reshape(count, -1, *_two(kernel, 1))
        pack = PackedWeight.of(
            codes,
            scale.to(torch.float32).reshape(-1).expand(count).contiguous(),
            zero_point.reshape(-1).expand(count) if zero_point is not None else None,
            _place(_convolution(spec), weight.layout.native),
        )
        return PackedTaps(pack, scale, zero_point, weight.layout.stack)

    def product(
        self, spec: KernelSpec, x: Tensor, weight: PackedTaps, bias: Tensor | None
    ) -> Tensor:
        """Return the convolution in the dtype of `x`."""
        operation = _convolution(spec)
        batched, flat = x.dim() == len(operation.stride) + 2, len(operation.stride) == 1
        batch = (x if batched else x[None]).to(torch.float32)
        Frame.of(operation, tuple(batch.shape), spec.layout.native)  # refuses what does not fit
        inputs = _inputs(spec, batch, weight)
        if inputs is None:
            scales = (weight.scale, weight.zero_point)
            return in_reference(weight.canonical(), scales, spec, x, bias)
        codes = inputs.digits.unsqueeze(2) if flat else inputs.digits
        codes = codes.contiguous(memory_format=torch.channels_last)
        bias = bias.to(torch.float32) if bias is not None else None
        found = _convolve(codes, inputs, weight.pack, bias)
        found = (found.squeeze(2) if flat else found).to(x.dtype)
        if batch.is_contiguous():
            found = found.contiguous()
        return found if batched else found[0]


def _inputs(spec: KernelSpec, batch: Tensor, weight: PackedTaps) -> Digits | None:
    """Return the codes of inputs, or None where they are to be left to the reference."""
    activation = spec.activation
    assert activation is not None  # `supports` saw to it
    if weight.pack.place != _place(_convolution(spec), spec.layout.native):
        return None
    found = _at_once(batch, activation)
    if found is None:
        if not has_finite_sum(batch):
            return None
        found = digits_of_codes(batch, activation.scheme, of_samples(activation, batch), None)
    return found if found.unit.amax().item() < _HUGE else None


def _at_once(batch: Tensor, activation: Activation) -> Digits | None:
    """Return the codes of finite inputs on one grid of 256 codes, found in one pass, or None."""
    scheme = activation.scheme
    if not isinstance(scheme, Affine) or scheme.quant_max - scheme.quant_min != _TOP:
        return None
    grid = one_grid(batch, activation) if quantized.refuse() is None else None
    if grid is None or not is_usual(grid[0]):
        return None
    unit, zero = grid
    middle = SIGN if scheme.symmetric else zero
    codes = quantized.codes(batch, unit, middle)
    return Digits(codes, torch.full((1, 1), middle, dtype=torch.int32), torch.full((1, 1), unit))


def _convolve(codes: Tensor, inputs: Digits, pack: PackedWeight, bias: Tensor | None) -> Tensor:
    """Return the product of ``codes [N, C, H, W]`` on the grids of `inputs`, one or N."""
    units, zeros = inputs.unit.flatten(), inputs.zero.flatten()
    scales = zip(units.tolist(), zeros.expand_as(units).tolist(), strict=True)
    grids = [(unit, zero, _TOP) for unit, zero in scales]
    parts = [codes] if len(grids) == 1 else torch.split(codes, 1)
    done = []
    for part, grid in zip(parts, grids, strict=True):
        if pack.zeros is None:
            done.append(pack.product(part, grid, bias, None))
        else:
            given = bias if bias is not None else torch.zeros_like(pack.scale)
            done.append(pack.corrected(part, grid, given))
    return done[0] if len(done) == 1 else torch.cat(done)


def _convolution(spec: KernelSpec) -> Convolution:
    assert isinstance(spec.operation, Convolution)  # `supports` saw to it
    return spec.operation


def _place(operation: Convolution, native: Shape) -> Place | None:
    """Return where the windows of a convolution are, in two dimensions; None if it is lopsided."""
    padding = operation.padding
    if padding == "valid":
        padding = (0,) * len(operation.stride)
    elif isinstance(padding, str):  # "same"
        reach = [
            step * (taps - 1) for step, taps in zip(operation.dilation, native[2:], strict=True)
        ]
        if any(one % 2 for one in reach):
            return None
        padding = tuple(one // 2 for one in reach)
    places = (_two(operation.stride, 1), _two(padding, 0), _two(operation.dilation, 1))
    return (*places, operation.groups)


def _two(values: "IntTuple | list[int]", filler: int) -> IntTuple:
    """Return values of one or two dimensions as those of two."""
    return (filler,) * (2 - len(values)) + tuple(values)


PACKED_CONVOLUTION = PackedConvolution()
