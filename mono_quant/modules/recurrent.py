"""Quantized recurrent layers over sequences."""

from dataclasses import replace
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from mono_quant.base import KernelSpec
from mono_quant.kernels import REFERENCE, Fp16Sequences, select
from mono_quant.kernels.ops import followed
from mono_quant.kernels.timing import bucket
from mono_quant.modules.layer import QuantizedLayer
from mono_quant.modules.sequence import Hidden, SequenceCall, unroll
from mono_quant.operations import MatrixProduct
from mono_quant.recurrence import Projection, Recurrence, States, WholeSequence


class SeveralWeights(QuantizedLayer):
    """A layer of several weights, any of which may have stayed a float parameter."""

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        """Return a float copy of a quantized weight, with a warning; all else as it is."""
        if name in self.__dict__.get("_modules", {}).get("quantized_weights", ()):
            return self.float_weight(name)
        return super().__getattr__(name)

    def product(self, name: str, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ weight.T + bias`` for the weight of that name, ``[..., out]``.

        Args:
            name: of the weight.
            x: ``[..., in]``, wide enough to compute with (see `mono_quant.operations.wide`).
            bias: ``[out]``.
        """
        if name in self.quantized_weights:
            return self.run(MatrixProduct(), x, bias, name)
        bias = bias.to(x.dtype) if bias is not None else None
        return functional.linear(x, self.dense(name, x.dtype), bias)

    def dense(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return a weight or bias as floats: decoded, or the parameter itself."""
        if name in self.quantized_weights:
            return self._holder(name).peek().dequantize(dtype)
        return cast("Tensor", getattr(self, name)).to(dtype)


class QuantizedRecurrent(SeveralWeights, nn.RNNBase):
    """What LSTM, GRU and RNN share.

    Where no input is quantized, torch's own kernel computes the layer: on float16 weights, or on
    ones that are decoded once a call. Otherwise the input product of each layer is one product over
    the whole sequence, and a `Recurrence` does its steps; then h is quantized anew at each step, a
    row for each sample.
    """

    def forward(
        self, input: Tensor | PackedSequence, hx: Hidden | None = None
    ) -> tuple[Tensor | PackedSequence, Hidden]:
        """Return the output of the last layer at each step, and the last states of all layers.

        Shapes, packed sequences and errors are those of the float layer.
        """
        call = SequenceCall.read(self, input, hx)
        run = self._unrolled if self.activations() else self._fused
        return call.answer(self, *run(call))

    def dequantize(self) -> nn.Module:
        """Turn this object back into the float layer, its weights on the grid."""
        layer = cast("nn.RNNBase", super().dequantize())
        layer._init_flat_weights()
        return layer

    def forget_float_weights(self) -> Self:
        """Drop the list in which `torch.nn.RNNBase` holds every float weight once more."""
        del self.__dict__["_flat_weights"]
        self._flat_weight_refs = []
        return self

    def flatten_parameters(self) -> None:
        """Do nothing: there are no float weights to lay out for cuDNN."""

    def _unrolled(self, call: SequenceCall) -> tuple[Tensor, States]:
        return unroll(self, call, self._direction)

    def _direction(self, suffix: str, x: Tensor, recurrence: Recurrence) -> Tensor:
        """Return the states after each step of one direction of one layer."""
        names = [f"bias_{kind}_{suffix}" for kind in _KINDS if self.bias]
        biases = [cast("Tensor", getattr(self, name)) for name in names]
        bias_ih, bias_hh = biases or (None, None)
        inputs = self.product(f"weight_ih_{suffix}", x, bias_ih)
        name, activations = f"weight_hh_{suffix}", self.activations()
        projection = None
        if self.proj_size:
            shorten = f"weight_hr_{suffix}"
            projection = Projection(self.dense(shorten, x.dtype), activations.get(shorten))
        operation = replace(recurrence, activation=activations.get(name), projection=projection)
        if name not in self.quantized_weights:
            return operation.unroll(inputs, self.dense(name, x.dtype), bias_hh)
        weight = self._holder(name).peek()
        spec = KernelSpec(operation, weight.scheme, weight.layout)
        met = (inputs, bias_hh, *recurrence.states)
        kernel = select(spec, inputs.device, inputs.dtype, recurrence.sizes[0], *met)
        self.note(name, kernel)
        return kernel(spec, inputs, weight, bias_hh)

    def _fused(self, call: SequenceCall) -> tuple[Tensor, States]:
        """Return what one call of torch makes of packed weights, or else of decoded ones."""
        names = [name for name in self._flat_weights_names if name.startswith("weight_")]
        operation = WholeSequence(
            self.mode,
            tuple(self._shape(name) for name in names),
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            self.batch_first,
            bool(self.proj_size),
        )
        sizes = call.packed.batch_sizes if call.packed is not None else None
        made = self._of_packed(operation, names, call, sizes)
        if made is None:
            weights = [self.dense(name, call.input.dtype) for name in self._flat_weights_names]
            made = operation.of_floats(call.input, call.states, weights, sizes)
            for name in self.quantized_weights:
                self.note(name, REFERENCE)
        return made[0], tuple(made[1:])

    def _of_packed(
        self, operation: WholeSequence, names: list[str], call: SequenceCall, sizes: Tensor | None
    ) -> tuple[Tensor, ...] | None:
        """Return what a kernel makes of packed weights; None if none is to, or can."""
        if any(name not in self.quantized_weights for name in names):
            return None
        held = [self._holder(name) for name in names]
        biases = [self._parameters.get(f"bias{name[len('weight') :]}") for name in names]
        of_h, x = held[1], call.input  # the first weight that h meets
        met = (x, *call.states, *biases)
        if any(one.scheme != of_h.scheme for one in held) or followed(*met):
            return None  # those who follow may know no number of steps
        operation = replace(operation, steps=bucket(call.steps(self)))
        spec = KernelSpec(operation, of_h.scheme, of_h.layout)

        def arrange() -> bool:
            alone = len(set(held)) == len(held)  # two directions of one weight have two biases
            return alone and all(one.is_arrangeable() for one in held)

        samples = call.states[0].shape[1]
        kernel = select(spec, x.device, x.dtype, samples, *met, arrange=arrange)
        if not isinstance(kernel, Fp16Sequences):
            return None
        packed = [one.arranged(kernel, spec) for one in held]
        made = kernel.run(operation, x, call.states, packed, biases, sizes)
        if made is not None:
            for name in names:
                self.note(name, kernel)
        return made

    def _shape(self, name: str) -> tuple[int, int]:
        if name in self.quantized_weights:
            _, rows, length = self._holder(name).layout.stack
            return rows, length
        rows, length = self.get_parameter(name).shape
        return rows, length

    @property
    def _flat_weights(self) -> list[Tensor | None]:  # type: ignore[override]  # a list there
        """What `torch.nn.RNNBase` knows of its weights: of a quantized one, the dtype alone."""
        return [
            self._holder(name).get_buffer("_like")
            if name in self.quantized_weights
            else cast("Tensor | None", getattr(self, name, None))  # a replica is filled later
            for name in self._flat_weights_names
        ]

    def _init_flat_weights(self) -> None:
        """Do nothing after a move: the list is made when it is asked for."""

    def _weights_have_changed(self) -> bool:
        return False

    def _replicate_for_data_parallel(self) -> Self:
        replica = nn.Module._replicate_for_data_parallel(self)  # type: ignore[no-untyped-call]  # torch's
        return cast("Self", replica)

    def __setstate__(self, state: dict[str, object]) -> None:
        # Not that of RNNBase, which makes a list of weights again.
        nn.Module.__setstate__(self, state)  # type: ignore[no-untyped-call]  # untyped in torch


class QuantizedLSTM(QuantizedRecurrent, nn.LSTM):  # type: ignore[misc]  # one forward for all three
    """`torch.nn.LSTM` with quantized weights."""

    float_class = nn.LSTM


class QuantizedGRU(QuantizedRecurrent, nn.GRU):  # type: ignore[misc]  # one forward for all three
    """`torch.nn.GRU` with quantized weights."""

    float_class = nn.GRU


class QuantizedRNN(QuantizedRecurrent, nn.RNN):  # type: ignore[misc]  # one forward for all three
    """`torch.nn.RNN` with quantized weights."""

    float_class = nn.RNN


_KINDS = ("ih", "hh")
