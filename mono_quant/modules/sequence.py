"""How recurrent layers are called: batches, single sequences, packed ones, and given states."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from mono_quant.operations import wide
from mono_quant.recurrence import Recurrence, States

Hidden = Tensor | tuple[Tensor, Tensor]
"""States as callers see them: a pair for an LSTM, a tensor for the others."""

Direction = Callable[[str, Tensor, Recurrence], Tensor]
"""Runs one direction of one layer, named as its weights are (``l1_reverse``), on rows ``[N, in]``.

The recurrence says all that does not depend on weights; the result is what a call of it returns.
"""


@dataclass(frozen=True, eq=False, slots=True)
class SequenceCall:
    """One call of a recurrent layer, its arguments checked and in one form.

    Attributes:
        input: ``[T, B, in]``, ``[B, T, in]`` for a layer with `batch_first`, or the data of a
            packed sequence ``[N, in]``; of half precision on a CPU, in float32.
        states: initial ones, ``[layers * directions, B, ...]`` each, in the order of the samples
            of `input`.
        packed: the packed sequence that was given, or None.
        single: a sequence without a batch was given.
        dtype: of what was given, and of what is returned.
    """

    input: Tensor
    states: States
    packed: PackedSequence | None
    single: bool
    dtype: torch.dtype

    @classmethod
    def read(
        cls, layer: nn.RNNBase, input: Tensor | PackedSequence, hx: Hidden | None
    ) -> "SequenceCall":
        """Return the call of a layer, float or quantized.

        Raises:
            ValueError: the input has the wrong number of dimensions or another dtype.
            RuntimeError: sizes do not fit; both as torch raises them.
        """
        packed = input if isinstance(input, PackedSequence) else None
        x = input.data if isinstance(input, PackedSequence) else input
        if packed is None and x.dim() not in (2, 3):
            raise ValueError(f"Expected input to be 2D or 3D, got {x.dim()}D instead")
        single = packed is None and x.dim() == 2
        given: States | None = None
        if hx is not None:
            given = (hx,) if isinstance(hx, Tensor) else tuple(hx)
            if packed is None and any(state.dim() != x.dim() for state in given):
                found = " and ".join(f"{state.dim()}-D" for state in given)
                raise RuntimeError(
                    f"for {x.dim()}-D input the hidden state is {x.dim()}-D too, not {found}"
                )
        if single:
            x = x.unsqueeze(0 if layer.batch_first else 1)
            given = tuple(state.unsqueeze(1) for state in given) if given is not None else None
        batch_sizes = packed.batch_sizes if packed is not None else None
        if given is None:
            states = _zeros(layer, x, batch_sizes)
        elif packed is not None and packed.sorted_indices is not None:
            order = packed.sorted_indices
            states = tuple(state.index_select(1, order) for state in given)
        else:
            states = given
        layer.check_forward_args(x, cast("Tensor", _as_hidden(layer, states)), batch_sizes)
        return cls(wide(x), tuple(map(wide, states)), packed, single, x.dtype)

    def steps(self, layer: nn.RNNBase) -> int:
        """Return how many steps there are, of the longest sample."""
        if self.packed is not None:
            return len(self.packed.batch_sizes)
        return self.input.shape[1 if layer.batch_first else 0]

    def rows(self, layer: nn.RNNBase) -> tuple[Tensor, tuple[int, ...]]:
        """Return the input as rows ``[N, in]``, step after step, and the samples of each step.

        Raises:
            RuntimeError: the sequence has no step.
        """
        if self.packed is not None:
            return self.input, tuple(self.packed.batch_sizes.tolist())
        steps = self.input.transpose(0, 1) if layer.batch_first else self.input
        if not steps.shape[0]:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        return steps.flatten(0, 1), (steps.shape[1],) * steps.shape[0]

    def shaped(self, layer: nn.RNNBase, rows: Tensor) -> Tensor:
        """Return rows ``[N, out]`` in the form of `input`."""
        if self.packed is not None:
            return rows
        if layer.batch_first:
            batch, length = self.input.shape[:2]
            return rows.reshape(length, batch, rows.shape[-1]).transpose(0, 1)
        return rows.reshape(*self.input.shape[:2], rows.shape[-1])

    def answer(
        self, layer: nn.RNNBase, output: Tensor, states: States
    ) -> tuple[Tensor | PackedSequence, Hidden]:
        """Return what the layer returns: an output in the form of `input`, and its last states."""
        output = output.to(self.dtype)
        states = tuple(state.to(self.dtype) for state in states)
        if self.packed is not None:
            _, sizes, order, back = self.packed
            if back is not None:
                states = tuple(state.index_select(1, back) for state in states)
            return PackedSequence(output, sizes, order, back), _as_hidden(layer, states)
        if self.single:
            output = output.squeeze(0 if layer.batch_first else 1)
            states = tuple(state.squeeze(1) for state in states)
        return output, _as_hidden(layer, states)


def unroll(layer: nn.RNNBase, call: SequenceCall, direction: Direction) -> tuple[Tensor, States]:
    """Return output and last states of a layer, each of whose directions is run by `direction`."""
    rows, sizes = call.rows(layer)
    directions = 2 if layer.bidirectional else 1
    last: list[States] = []
    for place in range(layer.num_layers):
        outputs = []
        for back in range(directions):
            states = tuple(state[len(last)] for state in call.states)
            recurrence = Recurrence(layer.mode, sizes, states, reverse=bool(back))
            made = direction(f"l{place}_reverse" if back else f"l{place}", rows, recurrence)
            outputs.append(recurrence.split(made)[0])
            last.append(recurrence.split(recurrence.last(made)))
        rows = torch.cat(outputs, -1)
        if place + 1 < layer.num_layers:
            rows = functional.dropout(rows, layer.dropout, layer.training)
    states = tuple(torch.stack(ends) for ends in zip(*last, strict=True))
    return call.shaped(layer, rows), states


def _zeros(layer: nn.RNNBase, x: Tensor, batch_sizes: Tensor | None) -> States:
    if batch_sizes is not None:
        batch = int(batch_sizes[0])
    else:
        batch = x.shape[0 if layer.batch_first else 1]
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    h = x.new_zeros(count, batch, layer.proj_size or layer.hidden_size)
    if layer.mode != "LSTM":
        return (h,)
    return h, x.new_zeros(count, batch, layer.hidden_size)


def _as_hidden(layer: nn.RNNBase, states: States) -> Hidden:
    return (states[0], states[1]) if layer.mode == "LSTM" else states[0]
