"""Products on CUDA devices by torch's own operators: 8-bit integers and floats, and 4 bits.

Written from what torch documents of them, and tried in a process of its own on each device before
they are used: sizes, the order of nibbles and the results.
"""

from typing import ClassVar, final

import attrs
import torch
from torch import Tensor

from mono_quant.base import Arranged, ArrangingKernel, KernelSpec, PackedTensor, Scheme
from mono_quant.kernels.codes import flat, refuse, scales_and_zeros, shaped
from mono_quant.kernels.digits import Digits, Factor
from mono_quant.kernels.int4 import group_of, refuse_four_bits
from mono_quant.kernels.integer import refuse_inputs, refuse_weight
from mono_quant.kernels.ops import unfollowed
from mono_quant.kernels.trial import refusal
from mono_quant.numerics.granularity import PerChannel, PerTensor, PerToken
from mono_quant.numerics.packing import pack_bits
from mono_quant.schemes import Float8

_STEP = 8  # rows and columns of integers have to be multiples of it
_FEWEST = 24  # and the rows of inputs more than 16
_FLOATS = 16  # what rows and columns of 8-bit floats have to be multiples of
_TILES = 8  # of 16 columns, that 4-bit weights are packed by
_COLUMNS = 16 * _TILES
_CENTRE = 8  # the code that the 4-bit product takes for zero
_AT_ONCE = 1024  # columns that are unpacked at once
_SIGN = 128  # what turns an unsigned byte into a signed one


class CudaInteger:
    """Multiplies 8-bit weights and quantized inputs as integers, summing in 32 bits.

    No value is looked at, so that the device is never waited for: the sums of the weight's codes
    are products with a row of ones, and a row with NaN is NaN.
    """

    name = "cuda-integer"

    def supports(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it cannot: 8-bit weights, quantized inputs, sizes of multiples of 8, CUDA."""
        reason = refuse(spec, device, dtype, "cuda") or refuse_weight(spec)
        if reason is None and spec.activation is None:
            reason = "inputs are float"
        reason = reason or refuse_inputs(spec.activation)
        _, rows, length = spec.layout.stack
        if reason is None and (rows % _STEP or length % _STEP):
            reason = f"{rows} x {length} values are no multiples of {_STEP}"
        return reason or _trial("the integer product", _INTEGER_TRIAL, device)

    def __call__(
        self, spec: KernelSpec, x: Tensor, weight: PackedTensor, bias: Tensor | None
    ) -> Tensor:
        """Return ``x @ weight.T + bias``, ``[..., out]`` in the dtype of `x`."""
        rows, tensors, activation = flat(x, spec.layout.stack[2]), weight.tensors, spec.activation
        assert activation is not None  # `supports` saw to it
        qparams = activation.qparams(rows)
        assert qparams.scale is not None  # an Affine has one
        codes = activation.scheme.quantize(rows, qparams).codes
        zero = qparams.zero_point
        if zero is None:
            zero = torch.zeros_like(qparams.scale, dtype=torch.int32)
        else:
            codes = codes.bitwise_xor(_SIGN).view(torch.int8)
            zero = zero.to(torch.int32) - _SIGN
        count = len(rows)
        left = codes.new_zeros(max(_FEWEST, -(-(count + 1) // _STEP) * _STEP), codes.shape[1])
        left[:count], left[count] = codes, 1
        both = torch._int_mm(left, tensors["codes"][0].t())
        products, sums = both[:count], both[count : count + 1]
        factor = Factor.of(
            tensors["codes"][0], sums, tensors["scale"], tensors.get("zero_point"), bias
        )
        digits = Digits(codes, zero, qparams.scale)
        out = rows.new_empty(products.shape)
        factor.finish(digits, factor.less_zeros(digits, products)[None], None, out)
        lost = rows.isnan().any(1, keepdim=True)
        return shaped(out.masked_fill_(lost, float("nan")), None, x)


class CudaFloat8:
    """Multiplies weights and inputs that are floats of 8 bits, summing in float32.

    The device adds up with fewer bits than float32 has between its own sums, so that products
    differ from the reference's by more than rounding in float32, and by far less than floats of 8
    bits round by themselves. Scales are multiplied in afterwards, in float32. NaN stays in its row.
    """

    name = "cuda-float8"

    def supports(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it cannot: floats of 8 bits on both sides, sizes of multiples of 16, CUDA."""
        reason = refuse(spec, device, dtype, "cuda") or _refuse_floats("the weight is", spec.scheme)
        if reason is None and spec.activation is None:
            reason = "inputs are float"
        if reason is None and spec.activation is not None:
            reason = _refuse_floats("inputs are", spec.activation.scheme)
            if spec.activation.apart is not None:
                reason = "some of the inputs stay float"
        if reason is None and torch.float8_e4m3fn not in _dtypes(spec):
            reason = "neither the weight nor the inputs are float8_e4m3fn"
        _, rows, length = spec.layout.stack
        if reason is None and (rows % _FLOATS or length % _FLOATS):
            reason = f"{rows} x {length} values are no multiples of {_FLOATS}"
        return reason or _trial("the product of 8-bit floats", _FLOAT8_TRIAL, device)

    def __call__(
        self, spec: KernelSpec, x: Tensor, weight: PackedTensor, bias: Tensor | None
    ) -> Tensor:
        """Return ``x @ weight.T + bias``, ``[..., out]`` in the dtype of `x`."""
        rows, activation = flat(x, spec.layout.stack[2]), spec.activation
        assert activation is not None  # `supports` saw to it
        inputs, columns = _dtypes(spec)
        q = activation.scheme.quantize(rows, activation.qparams(rows))
        assert q.qparams.scale is not None  # a Float8 has one
        codes, scale = weight.tensors["codes"][0], weight.tensors["scale"]
        one = scale.new_ones((), dtype=torch.float32)
        out = torch._scaled_mm(
            q.codes.view(inputs),
            codes.view(columns).t(),
            scale_a=one,
            scale_b=one,
            out_dtype=torch.float32,
        )
        return shaped(out.mul_(scale.reshape(1, -1)).mul_(q.qparams.scale), bias, x)


def _dtypes(spec: KernelSpec) -> tuple[torch.dtype, ...]:
    """Return the dtypes of 8-bit floats of inputs and weight."""
    schemes = (spec.activation.scheme if spec.activation is not None else None, spec.scheme)
    return tuple(scheme.dtype for scheme in schemes if isinstance(scheme, Float8))


def _refuse_floats(what: str, scheme: Scheme) -> str | None:
    """Return why a grid is not one of 8-bit floats with a scale per row or for all, or None."""
    whole = (PerTensor, PerChannel, PerToken)
    if type(scheme) is Float8 and type(scheme.granularity) in whole:
        return None
    return f"{what} {scheme.describe()}, not 8-bit floats by rows"


@final
@attrs.frozen(eq=False)
class Tiles(Arranged):
    """A 4-bit weight as the product on CUDA reads it.

    Attributes:
        codes: ``int32 [out / 8, in / 128, 32, 4]``.
        pairs: scale and offset of each group, ``bfloat16 [groups, out, 2]``: the value is
            ``(code - 8) * scale + offset``.
        shape: of the weight, ``[out, in]``.
    """

    traceable: ClassVar[bool] = False

    codes: Tensor
    pairs: Tensor
    shape: tuple[int, int]

    @property
    def beside(self) -> int:
        """Bytes of what the canonical weight does not have."""
        return self.pairs.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of the codes."""
        return self.codes.nbytes

    def canonical(self) -> Tensor:
        """Return the codes as `PackedTensor` has them, ``uint8 [1, out, in / 2]``."""
        return unfollowed(self._unpacked)

    def _unpacked(self) -> Tensor:
        """Return them by way of products with the rows of a unit matrix, which are exact."""
        rows, length = self.shape
        group = length // self.pairs.shape[0]
        ones = torch.zeros_like(self.pairs)
        ones[..., 0] = 1
        codes = torch.empty(rows, length, dtype=torch.uint8, device=self.codes.device)
        for start in range(0, length, _AT_ONCE):
            stop = min(start + _AT_ONCE, length)
            eye = self.pairs.new_zeros(stop - start, length)
            eye[:, start:stop].fill_diagonal_(1)
            values = torch.ops.aten._weight_int4pack_mm(eye, self.codes, group, ones)
            codes[:, start:stop] = values.add_(_CENTRE).t()
        return pack_bits(codes, 4)[None]


@final
class CudaInt4(ArrangingKernel[Tiles]):
    """Multiplies float inputs by 4-bit weights in bfloat16, as `Int4` does on a CPU."""

    name = "cuda-int4"

    @property
    def arrangement(self) -> type[Tiles]:
        """Tiles of 4-bit codes."""
        return Tiles

    def supports(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it cannot: 4-bit affine weights in whole tiles, float inputs, CUDA."""
        reason = refuse(spec, device, dtype, "cuda") or refuse_four_bits(spec)
        if reason is None and spec.activation is not None:
            reason = f"inputs are {spec.activation.describe()}"
        _, rows, length = spec.layout.stack
        if reason is None and (rows % _STEP or length % _COLUMNS):
            reason = f"{rows} x {length} values are no multiples of {_STEP} x {_COLUMNS}"
        return reason or _trial("the 4-bit product", _INT4_TRIAL, device)

    def arrange(self, spec: KernelSpec, weight: PackedTensor) -> Tiles:
        """Return the weight in tiles."""
        scale, zeros = scales_and_zeros(weight)
        _, rows, length = weight.layout.stack
        group = group_of(weight.block_size[2])
        pairs = torch.stack([scale, (_CENTRE - zeros) * scale], -1).to(torch.bfloat16)
        pairs = pairs.transpose(0, 1)
        repeats = length // group // pairs.shape[0]
        pairs = pairs.repeat_interleave(repeats, 0).expand(-1, rows, -1).contiguous()
        stored = weight.tensors["codes"][0]  # even columns low; the operator wants them high
        turned = (stored << 4) | (stored >> 4)
        codes = torch.ops.aten._convert_weight_to_int4pack(turned, _TILES)
        return Tiles(codes, pairs, (rows, length))

    def product(self, spec: KernelSpec, x: Tensor, weight: Tiles, bias: Tensor | None) -> Tensor:
        """Return ``x @ weight.T + bias``, ``[..., out]`` in the dtype of `x`."""
        length = spec.layout.stack[2]
        rows = flat(x, length, torch.bfloat16)
        group = length // weight.pairs.shape[0]
        found = torch.ops.aten._weight_int4pack_mm(rows, weight.codes, group, weight.pairs)
        return shaped(found.to(torch.float32), bias, x)


def _trial(name: str, program: str, device: torch.device) -> str | None:
    """Return why an operator cannot be used on a device, or None: by trying it there."""
    place = f"{name} on {torch.cuda.get_device_name(device)}"
    return refusal(place, f"device = {str(device)!r}\n{program}")


_INTEGER_TRIAL = """
import torch
for rows in (24, 32, 136):
    for length, count in ((64, 96), (1000, 64)):
        left = torch.randint(-128, 128, (rows, length), dtype=torch.int8)
        right = torch.randint(-128, 128, (count, length), dtype=torch.int8)
        found = torch._int_mm(left.to(device), right.to(device).t()).cpu()
        assert torch.equal(found.double(), left.double() @ right.double().t())
"""
_FLOAT8_TRIAL = """
import torch
floats = torch.float8_e4m3fn, torch.float8_e5m2
one = torch.ones((), device=device)
for of_left, of_right in ((0, 0), (0, 1), (1, 0)):
    for rows in (1, 3, 16, 17, 136):
        left = torch.randint(-8, 9, (rows, 64)).float().to(floats[of_left])
        right = torch.randint(-8, 9, (96, 64)).float().to(floats[of_right])
        found = torch._scaled_mm(left.to(device), right.to(device).t(), scale_a=one, scale_b=one,
                                 out_dtype=torch.float32).cpu()
        assert torch.equal(found, left.float() @ right.float().t())
"""
_INT4_TRIAL = """
import torch
aten = torch.ops.aten
count, length, group = 64, 512, 64
codes = torch.randint(0, 16, (count, length), dtype=torch.uint8)
high, low = codes[:, 0::2], codes[:, 1::2]
packed = aten._convert_weight_to_int4pack((high << 4 | low).to(device), 8)
assert packed.numel() * packed.element_size() == count * length // 2, "another size"
pairs = torch.randint(-8, 9, (length // group, count, 2)).to(torch.bfloat16)
scale, offset = (part.t().double().repeat_interleave(group, 1) for part in pairs.unbind(-1))
weight = (codes.double() - 8) * scale + offset
for rows in (1, 8, 17, 64):
    x = torch.zeros(rows, length, dtype=torch.bfloat16)
    x[torch.arange(rows), torch.randint(0, length, (rows,))] = 1
    found = aten._weight_int4pack_mm(x.to(device), packed, group, pairs.to(device)).cpu()
    assert torch.equal(found, (x.double() @ weight.t()).to(torch.bfloat16)), "another order"
"""

CUDA_INTEGER = CudaInteger()
CUDA_FLOAT8 = CudaFloat8()
CUDA_INT4 = CudaInt4()
