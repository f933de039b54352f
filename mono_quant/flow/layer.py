"""A quantized layer that takes codes and gives codes, or floats where those are asked for."""

from typing import cast

import torch
from torch import Tensor, nn

from mono_quant.base import Operation, PackedTensor
from mono_quant.flow.arithmetic import SIGN, Grid, dequantize, numbers, quantize, signed_codes
from mono_quant.kernels import onednn
from mono_quant.kernels.packed import PackedWeight
from mono_quant.modules import QuantizedLayer, QuantizedWeight
from mono_quant.operations import Convolution, MatrixProduct
from mono_quant.schemes import Affine

_PACK = "_pack"  # the weight as the operator wants it: opaque, made at the first call


class IntegerLayer(nn.Module):
    """A Linear or convolution between codes.

    It stands where the quantized layer stood and holds what that held, under the same names, so a
    state dict of the one fits the other. Grids are fixed: they are part of the graph.
    """

    bias: Tensor | None
    quantized_weights: nn.ModuleDict
    quantized_inputs: nn.ModuleDict

    def __init__(
        self,
        layer: QuantizedLayer,
        operation: Operation,
        inputs: Grid,
        output: Grid | None,
        reference: bool,
    ) -> None:
        """Take over the weight of `layer`.

        Args:
            layer: whose tensors are shared.
            operation: what it computes.
            inputs: grid of its inputs.
            output: grid of the result; None for floats.
            reference: compute in float, on dequantized values.
        """
        super().__init__()
        self.bias = layer.bias if isinstance(layer.bias, Tensor) else None
        self.quantized_weights = layer.quantized_weights
        self.quantized_inputs = layer.quantized_inputs
        self.operation = operation
        self.inputs = inputs
        self.output = output
        why = "it was asked for" if reference else refuse_operator(self.weight, operation)
        self.in_float = why
        self.register_load_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    @property
    def weight(self) -> PackedTensor:
        """The weight, sharing this module's memory."""
        holder = cast("QuantizedWeight", self.quantized_weights["weight"])  # the layer's own
        return holder.packed

    def forward(
        self, codes: Tensor, added: Tensor | None = None, added_grid: object = None
    ) -> Tensor:
        """Return uint8 codes on the grid of the output, or float32 values where it has none.

        Args:
            codes: uint8, on the grid of the inputs.
            added: codes to be added to the result before it is put on its grid.
            added_grid: scale, zero point and largest code of `added`.
        """
        plain = codes.device.type != "cpu" or codes.numel() == 0 or torch.compiler.is_compiling()
        if self.in_float is not None or plain:
            return self._finish(self._in_float(codes), added, added_grid)
        output = self.output.numbers if self.output is not None else None
        if isinstance(self.operation, Convolution):
            return self._conv(self.operation, codes, output, added, added_grid)
        pack = self._packed()
        if pack.zeros is not None:
            return self._corrected(pack, codes, added, added_grid)
        return self._within(pack.product(codes, self.inputs.numbers, self._bias(), output))

    def _conv(
        self,
        operation: Convolution,
        codes: Tensor,
        output: onednn.Numbers | None,
        added: Tensor | None,
        added_grid: object,
    ) -> Tensor:
        single = codes.dim() == 3
        batch = codes.unsqueeze(0) if single else codes
        batch = batch.contiguous(memory_format=torch.channels_last)
        pack = self._packed()
        if pack.zeros is not None:
            beside = added.unsqueeze(0) if single and added is not None else added
            done = self._corrected(pack, batch, beside, added_grid)
            return done.squeeze(0) if single else done
        if added is None:
            done = self._within(pack.product(batch, self.inputs.numbers, self._bias(), output))
            return done.squeeze(0) if single else done
        if single or output is None or not _same(added, batch, operation, self.weight):
            floats = pack.product(batch, self.inputs.numbers, self._bias(), None)
            return self._finish(floats.squeeze(0) if single else floats, added, added_grid)
        sums = added.clone(memory_format=torch.channels_last)  # overwritten, and read by others
        grid = numbers(added_grid)
        done = pack.sum_with(batch, self.inputs.numbers, self._bias(), output, sums, grid)
        return self._within(done)

    def _corrected(
        self, pack: PackedWeight, x: Tensor, added: Tensor | None, added_grid: object
    ) -> Tensor:
        """Return what a weight with zero points gives, codes added where there are some."""
        bias, output = self._bias(), self.output
        if output is None:
            none = torch.zeros_like(pack.scale)
            y = pack.corrected(x, self.inputs.numbers, none if bias is None else bias)
            return self._finish(y, added, added_grid)
        unit, offset = output.scale, float(output.zero_point)
        step, zero_point, _ = (0.0, 0, 0) if added is None else numbers(added_grid)
        offset -= zero_point * step / unit
        shifts = torch.full_like(pack.scale, offset) if bias is None else bias / unit + offset
        y = pack.corrected(x, self.inputs.numbers, shifts - SIGN, unit)
        if added is not None:
            y = torch.add(y, added, alpha=step / unit)
        return signed_codes(y, output.top)

    def _finish(self, y: Tensor, added: Tensor | None, added_grid: object) -> Tensor:
        """Return floats with codes added, on the grid of the output."""
        if added is not None:
            y = y + dequantize(added, *numbers(added_grid))
        return quantize(y, *self.output.numbers) if self.output is not None else y

    def _in_float(self, codes: Tensor) -> Tensor:
        """Return what the class-kept layer computes, bit for bit."""
        return self.operation(dequantize(codes, *self.inputs.numbers), self.weight, self.bias)

    def _within(self, done: Tensor) -> Tensor:
        """Return codes clamped to a grid of fewer than 8 bits; the operators know 8 only."""
        if self.output is None or self.output.top == 255:
            return done
        return done.clamp_(max=self.output.top)

    def _bias(self) -> Tensor | None:
        return self.bias.to(torch.float32) if self.bias is not None else None

    def _packed(self) -> PackedWeight:
        if _PACK not in self.__dict__:
            self.__dict__[_PACK] = self._pack_weight()
        return cast("PackedWeight", self.__dict__[_PACK])  # set in the line above

    def _pack_weight(self) -> PackedWeight:
        weight = self.weight
        q = weight.unpack()
        rows = q.codes.shape[:2]
        scale = cast("Tensor", q.qparams.scale)  # an affine grid has one
        codes, zero_point = weight.layout.to_native(q.codes), q.qparams.zero_point
        if zero_point is not None:
            codes = (codes.to(torch.int16) - SIGN).to(torch.int8)
            zero_point = zero_point.expand(*rows, 1).flatten().to(torch.int16) - SIGN
        return PackedWeight.of(
            codes,
            scale.to(torch.float32).expand(*rows, 1).flatten(),  # [out]
            zero_point,
            _place(self.operation) if isinstance(self.operation, Convolution) else None,
        )

    def __getstate__(self) -> dict[str, object]:
        """Leave the packed weight out: it cannot be copied, and is made again."""
        return {key: value for key, value in self.__dict__.items() if key != _PACK}

    def extra_repr(self) -> str:
        """Return what it computes, and from and to which grids."""
        end = self.output if self.output is not None else "float32"
        return f"{type(self.operation).__name__}, {self.inputs} -> {end}"


def refuse_operator(weight: PackedTensor, operation: Operation) -> str | None:
    """Return why no integer operator computes `operation` on `weight`, or None."""
    scheme = weight.scheme
    if not isinstance(scheme, Affine):
        return f"its weight is {scheme.describe()}"
    zero_point = weight.tensors.get("zero_point")
    if zero_point is not None and zero_point.is_floating_point():
        return "the zero points of its weight are no codes"
    if weight.tensors["scale"].shape[-1] != 1:
        return "its weight has several scales a row"
    if weight.tensors["codes"].device.type != "cpu":
        return "the integer operators are for processors"
    if isinstance(operation, MatrixProduct):
        return onednn.refuse_linear()
    if not isinstance(operation, Convolution) or len(operation.stride) != 2:
        return "the integer operator is for convolutions of two dimensions"
    if isinstance(operation.padding, str):
        return "its padding is given by a word"
    return onednn.refuse_conv()


def _place(operation: Convolution) -> onednn.Place:
    padding = cast("onednn.IntTuple", operation.padding)  # words are refused for the operator
    return operation.stride, padding, operation.dilation, operation.groups


def _same(added: Tensor, x: Tensor, operation: Convolution, weight: PackedTensor) -> bool:
    """Return whether a tensor has the shape of the result, so that it need not be broadcast."""
    stride, padding, dilation, _ = _place(operation)
    channels, _, *window = weight.layout.native
    sides = [
        (x.shape[side + 2] + 2 * padding[side] - dilation[side] * (taps - 1) - 1) // stride[side]
        + 1
        for side, taps in enumerate(window)
    ]
    return tuple(added.shape) == (x.shape[0], channels, *sides)


def _forget(layer: IntegerLayer, _: object) -> None:
    layer.__dict__.pop(_PACK, None)
