"""Products on CUDA devices by torch's own operators: 8-bit integers and 8-bit floats.

Operators are tried in a process of its own on each device before they are used: sizes and results.
"""

import torch
from torch import Tensor
from torch.nn import functional

from mono_quant.base import KernelSpec, PackedTensor, Scheme
from mono_quant.kernels.codes import SUMS, constants, flat, refuse, shaped, sums_of
from mono_quant.kernels.digits import Factor
from mono_quant.kernels.integer import refuse_grid, refuse_inputs, refuse_weight
from mono_quant.kernels.ops import untraced
from mono_quant.kernels.trial import refusal
from mono_quant.numerics.granularity import PerChannel, PerTensor, PerToken
from mono_quant.schemes import Float8

_STEP = 8  # rows and columns of integers have to be multiples of it
_FEWEST = 24  # and the rows of inputs more than 16
_FLOATS = 16  # what rows and columns of 8-bit floats have to be multiples of
_SIGN = 128  # what turns an unsigned byte into a signed one


class CudaInteger:
    """Multiplies 8-bit weights and quantized inputs as integers, summing in 32 bits.

    No value is looked at, so that the device is never waited for, and `torch.compile` makes one
    pass of what goes before the product and one of what follows it. A row with NaN is NaN.
    """

    name = "cuda-integer"

    def supports(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it cannot: 8-bit weights, quantized inputs, sizes of multiples of 8, CUDA."""
        reason = refuse(spec, device, dtype, "cuda") or refuse_weight(spec)
        if reason is None and spec.activation is None:
            reason = "inputs are float"
        reason = reason or refuse_inputs(spec.activation)
        reason = reason or _refuse_sizes(spec, _STEP)
        return reason or trial("the integer product", _INTEGER_TRIAL, device)

    def __call__(
        self, spec: KernelSpec, x: Tensor, weight: PackedTensor, bias: Tensor | None
    ) -> Tensor:
        """Return ``x @ weight.T + bias``, ``[..., out]`` in the dtype of `x`."""
        rows, activation = flat(x, spec.layout.stack[2]), spec.activation
        assert activation is not None  # `supports` saw to it
        factor = _factor(weight, bias)
        qparams = activation.qparams(rows)
        codes, zero, unit = activation.scheme.quantize(rows, qparams).codes, None, qparams.scale
        assert unit is not None  # an Affine has one
        if qparams.zero_point is not None:
            codes = codes.bitwise_xor(_SIGN).view(torch.int8)
            zero = qparams.zero_point.to(torch.int32) - _SIGN
        out = factor.of_sums(_int_mm(codes, factor.codes), codes, zero, unit)
        if activation.mode == "static":  # the scale of another one is NaN where an input is
            out = out.masked_fill(rows.amax(1, keepdim=True).isnan(), float("nan"))
        return shaped(out, None, x)


def _refuse_sizes(spec: KernelSpec, step: int) -> str | None:
    """Return that rows and columns of a weight are no multiples of a number, or None."""
    _, rows, length = spec.layout.stack
    if rows % step or length % step:
        return f"{rows} x {length} values are no multiples of {step}"
    return None


def _factor(weight: PackedTensor, bias: Tensor | None) -> Factor:
    """Return a weight as a factor; sums of its codes are kept, but not for a compiled layer."""
    tensors = weight.tensors
    codes, scale = tensors["codes"], tensors["scale"]
    if torch.compiler.is_compiling():
        sums = tensors[SUMS] if SUMS in tensors else sums_of(codes)
    else:
        known = constants(weight)
        sums, scale = known.sums, known.scale
    return Factor.of(codes[0], sums, scale, tensors.get("zero_point"), bias)


def _int_mm(left: Tensor, codes: Tensor) -> Tensor:
    """Return ``left [M, in] @ codes [out, in].T``, ``int32 [M, out]``, for any number of rows."""
    count = left.shape[0]
    if count < _FEWEST:
        padded = left.new_zeros(_FEWEST, left.shape[1])
        padded[:count] = left
        left = padded
    return torch._int_mm(left, codes.t())[:count]


class CudaFloat8:
    """Multiplies weights and inputs that are floats of 8 bits, summing in float32.

    The device adds up with fewer bits than float32 has between its own sums, so that products
    differ from the reference's by more than rounding in float32, and by far less than floats of 8
    bits round by themselves. Scales are multiplied in afterwards, in float32; where the result is
    bfloat16, by the operator itself. NaN stays in its row.
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
        reason = reason or _refuse_sizes(spec, _FLOATS)
        return reason or trial("the product of 8-bit floats", _FLOAT8_TRIAL, device)

    def __call__(
        self, spec: KernelSpec, x: Tensor, weight: PackedTensor, bias: Tensor | None
    ) -> Tensor:
        """Return ``x @ weight.T + bias``, ``[..., out]`` in the dtype of `x`."""
        rows, activation = flat(x, spec.layout.stack[2], x.dtype), spec.activation
        assert activation is not None  # `supports` saw to it
        inputs, columns = _dtypes(spec)
        q = activation.scheme.quantize(rows, activation.qparams(rows))
        unit, scale = q.qparams.scale, weight.tensors["scale"].to(torch.float32).reshape(1, -1)
        assert unit is not None  # a Float8 has one
        left, right = q.codes.view(inputs), weight.tensors["codes"][0].view(columns).t()
        both_e4m3 = inputs == columns
        if x.dtype == torch.bfloat16 and both_e4m3 and _scales_rows(x.device):
            unit = unit.expand(rows.shape[0], 1).contiguous()
            scale = scale.expand(1, right.shape[1]).contiguous()
            bias = bias.to(x.dtype) if bias is not None else None
            out = torch._scaled_mm(left, right, unit, scale, bias, out_dtype=x.dtype)
            return shaped(out, None, x)
        one = scale.new_ones(())
        out = torch._scaled_mm(left, right, one, one, out_dtype=torch.float32)
        return shaped(out * scale * unit, bias, x)


def _scales_rows(device: torch.device) -> bool:
    """Return whether the operator itself multiplies scales of rows in."""
    return trial("the product of scaled rows", _ROWS_TRIAL, device) is None


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


class CudaDecoded:
    """Decodes a weight of 8 bits in one pass, in the dtype of the inputs, then multiplies floats.

    What the reference does in three passes, by way of float32.
    """

    name = "cuda-decoded"

    def supports(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it cannot: 8 bits with a scale per channel or tensor, float inputs, CUDA."""
        reason = refuse(spec, device, dtype, "cuda")
        if reason is None and spec.activation is not None:
            reason = f"inputs are {spec.activation.describe()}"
        if reason is not None or _refuse_floats("", spec.scheme) is None:
            return reason
        return refuse_grid(spec.scheme)

    def __call__(
        self, spec: KernelSpec, x: Tensor, weight: PackedTensor, bias: Tensor | None
    ) -> Tensor:
        """Return ``x @ weight.T + bias``, ``[..., out]`` in the dtype of `x`."""
        rows, tensors = flat(x, spec.layout.stack[2], x.dtype), weight.tensors
        values, zero = tensors["codes"][0], tensors.get("zero_point")
        scale = tensors["scale"].to(torch.float32).reshape(-1, 1)
        if isinstance(spec.scheme, Float8):
            values = values.view(spec.scheme.dtype).to(x.dtype)  # each of which has them all
        if zero is not None:
            values = values.to(torch.int16) - zero.to(torch.int16).reshape(-1, 1)
        decoded = torch.mul(values, scale, out=rows.new_empty(values.shape))
        bias = bias.to(x.dtype) if bias is not None else None
        return shaped(functional.linear(rows, decoded, bias), None, x)


@untraced
def trial(name: str, program: str, device: torch.device) -> str | None:
    """Return why an operator cannot be used on a device, or None: by trying it there."""
    place = f"{name} on {torch.cuda.get_device_name(device)}"
    return refusal(place, f"device = {str(device)!r}\n{program}")


_INTEGER_TRIAL = """
import torch
for rows in (24, 25, 32, 136):
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
        both = left.to(device), right.to(device).t()
        found = torch._scaled_mm(*both, one, one, out_dtype=torch.float32)
        assert torch.equal(found.cpu(), left.float() @ right.float().t())
"""
_ROWS_TRIAL = """
import torch
for rows in (1, 3, 16, 17, 136):
    left = torch.randint(-2, 3, (rows, 64)).float().to(torch.float8_e4m3fn)
    right = torch.randint(-2, 3, (96, 64)).float().to(torch.float8_e4m3fn)
    unit, scale = 2.0 ** torch.randint(-9, 9, (rows, 1)), 2.0 ** torch.randint(-9, 9, (1, 96))
    expected = (left.float() @ right.float().t()) * unit * scale
    both = left.to(device), right.to(device).t()
    found = torch._scaled_mm(*both, unit.to(device), scale.to(device), out_dtype=torch.bfloat16)
    assert torch.equal(found.cpu(), expected.to(torch.bfloat16))
    bias = torch.zeros(96, dtype=torch.bfloat16, device=device)
    again = torch._scaled_mm(
        *both, unit.to(device), scale.to(device), bias, out_dtype=torch.bfloat16
    )
    assert torch.equal(again, found)
"""

CUDA_INTEGER = CudaInteger()
CUDA_FLOAT8 = CudaFloat8()
CUDA_DECODED = CudaDecoded()
