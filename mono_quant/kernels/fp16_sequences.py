"""Whole recurrent layers on float16 weights, by torch's own operators over packed ones."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import final

import attrs
import torch
from torch import Tensor

from mono_quant.base import ArrangingKernel, KernelSpec, PackedTensor
from mono_quant.kernels.codes import SMALLEST
from mono_quant.kernels.fp16 import FP16, HalfPrecision
from mono_quant.kernels.ops import (
    fp16_cell,
    fp16_pack,
    fp16_packed_bytes,
    fp16_sequence,
    fp16_sequence_refusal,
    fp16_unpack,
)
from mono_quant.recurrence import WholeSequence
from mono_quant.schemes import FloatCast

_CELLS = ("LSTM", "GRU")


@final
@attrs.define(eq=False)
class HalfFactor(HalfPrecision):
    """A float16 weight in one piece, with a place for the bias that torch's operators add.

    Attributes:
        packed: the weight; None where it could not be packed.
        bias: what `packed` adds to each product, ``float32 [out]``: it reads this tensor anew.
        shape: of the weight, ``[out, in]``.
        weight: the weight as it was, where it could not be packed.
        users: how many calls in progress rely on `bias`.
        cell: of a weight of h, the weight of inputs that it last ran with, and what the operators
            take for both.
    """

    packed: torch.ScriptObject | None
    bias: Tensor
    shape: tuple[int, int]
    weight: PackedTensor | None = None
    users: int = 0
    cell: tuple[torch.ScriptObject, torch.ScriptObject] | None = None

    @property
    def beside(self) -> int:
        """Bytes that fill up the panels, and those of the bias."""
        return self.padding + self.bias.nbytes

    def unpacked(self) -> Tensor:
        """Return the codes."""
        assert self.packed is not None  # `canonical` saw to it
        return fp16_unpack(self.packed).to(torch.float16)[None]

    def after(self, inputs: torch.ScriptObject) -> torch.ScriptObject:
        """Return what the operators take for this weight of h and that packed one of inputs."""
        known = self.cell
        if known is None or known[0] is not inputs:
            assert self.packed is not None  # the caller saw to it
            known = self.cell = (inputs, fp16_cell(inputs, self.packed))
        return known[1]


class Fp16Sequences(ArrangingKernel[HalfFactor]):
    """Runs an LSTM or GRU with float inputs whole, on float16 weights that are widened as it goes.

    What is done is what `torch.ao` does for its float16 dynamic LSTM: values are those of the
    reference, summed in float32 in another order. Weights that hold NaN or infinity, which the
    packing would change, are decoded, and so are those that are packed when the engine of
    `torch.backends.quantized` is another one than when the kernel was chosen.

    The operators fill up columns to a multiple of 512. A layer may take as much as in float32 in
    that way; decoding takes half as much again, at each call.
    """

    name = FP16.name

    @property
    def arrangement(self) -> type[HalfFactor]:
        """Weights in one piece each."""
        return HalfFactor

    def supports(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it cannot: float16 weights of an LSTM or GRU on a CPU are what it can."""
        operation, scheme = spec.operation, spec.scheme
        if not isinstance(operation, WholeSequence):
            return f"it is a {type(operation).__name__}, not a whole sequence"
        if operation.cell not in _CELLS:
            return f"torch has no such operator for {operation.cell}"
        if operation.projected:
            return "torch has no such operator for a projected h"
        if device.type != "cpu":
            return f"inputs are on {device.type}, not on a CPU"
        if dtype is not torch.float32:
            return f"inputs are {dtype}"
        if type(scheme) is not FloatCast or scheme.dtype is not torch.float16:
            return f"the weight is {scheme.describe()}"
        count = sum(rows * length for rows, length in operation.shapes)
        if count < SMALLEST:
            return f"{count} values are too few to gain from it"
        packed = sum(fp16_packed_bytes(*shape) for shape in operation.shapes)
        if packed > 4 * count:
            return f"the packed weights would take {packed / (4 * count):.1f} times float32's bytes"
        return fp16_sequence_refusal()

    def arrange(self, spec: KernelSpec, weight: PackedTensor) -> HalfFactor:
        """Return the weight packed."""
        values = weight.tensors["codes"][0].to(torch.float32)
        shape, bias = (values.shape[0], values.shape[1]), values.new_zeros(values.shape[0])
        if fp16_sequence_refusal() is not None or not bool(values.isfinite().all()):
            return HalfFactor(None, bias, shape, weight)
        return HalfFactor(fp16_pack(values, bias), bias, shape)

    def product(
        self, spec: KernelSpec, x: Tensor, weight: HalfFactor, bias: Tensor | None
    ) -> Tensor:
        """Return the output of one layer, as a call of `WholeSequence` does."""
        operation = spec.operation
        assert isinstance(operation, WholeSequence)  # `supports` saw to it
        if weight.weight is not None:
            return operation(x, weight.weight, bias)
        done = self.run(operation, x, operation.zeros(x), (weight, weight), (bias, bias))
        assert done is not None  # it could be packed
        return done[0]

    def run(
        self,
        operation: WholeSequence,
        x: Tensor,
        states: Sequence[Tensor],
        weights: Sequence[HalfFactor],
        biases: Sequence[Tensor | None],
        batch_sizes: Tensor | None = None,
    ) -> tuple[Tensor, ...] | None:
        """Return output and last states; None where a weight could not be packed.

        Args:
            operation: how the layer is made up.
            x: as torch's operators take it.
            states: ``[layers * directions, B, units]`` each.
            weights: of inputs and of h, by turns, in the order of `torch.nn.RNNBase`. A weight
                may come twice only if it meets the same bias.
            biases: as many, or None for each.
            batch_sizes: of a packed sequence, whose data `x` is.
        """
        cells = []
        for inputs, hidden in zip(weights[::2], weights[1::2], strict=True):
            if inputs.packed is None or hidden.packed is None:
                return None
            cells.append(hidden.after(inputs.packed))
        with _biased(weights, biases):
            options = (True, *operation.options[1:])  # the operator for LSTM insists on biases
            if batch_sizes is not None:
                return fp16_sequence(operation.cell, (x, batch_sizes), states, cells, options)
            return fp16_sequence(
                operation.cell, (x,), states, cells, (*options, operation.batch_first)
            )


class UnpackedSequences(Fp16Sequences):
    """Decodes packed weights for torch's float kernel, as the reference does where they are packed.

    The operators widen weights at each step, which takes longer than to decode them once where
    there are many samples, or many steps of few units.
    """

    name = "unpacked"

    def product(
        self, spec: KernelSpec, x: Tensor, weight: HalfFactor, bias: Tensor | None
    ) -> Tensor:
        """Return the output of one layer, as a call of `WholeSequence` does."""
        operation = spec.operation
        assert isinstance(operation, WholeSequence)  # `supports` saw to it
        matrices = [weight.canonical()[0].to(x.dtype) for _ in range(2)]
        biases = [bias] * 2 if bias is not None else []
        return operation.of_floats(x, operation.zeros(x), [*matrices, *biases])[0]


_CHANGED = threading.Condition()
"""Of `HalfFactor.users`, and held while a bias is written."""


@contextmanager
def _biased(weights: Sequence[HalfFactor], biases: Sequence[Tensor | None]) -> Iterator[None]:
    """Let weights add these biases until the end.

    Tied weights may be called with different ones, in threads too: whoever needs another bias than
    is there waits for those who use that. All are taken at once, so nobody waits holding one.
    """
    wanted = [
        torch.zeros_like(weight.bias) if bias is None else bias.detach().to(torch.float32)
        for weight, bias in zip(weights, biases, strict=True)
    ]
    pairs = list(zip(weights, wanted, strict=True))
    with _CHANGED:
        other = [(weight, bias) for weight, bias in pairs if not torch.equal(weight.bias, bias)]
        while any(weight.users for weight, _ in other):
            _CHANGED.wait()
            other = [(weight, bias) for weight, bias in pairs if not torch.equal(weight.bias, bias)]
        for weight, bias in other:
            weight.bias.copy_(bias)
        for weight in weights:
            weight.users += 1
    try:
        yield
    finally:
        with _CHANGED:
            for weight in weights:
                weight.users -= 1
            _CHANGED.notify_all()


FP16_SEQUENCES = Fp16Sequences()
UNPACKED_SEQUENCES = UnpackedSequences()
