"""Recurrent arithmetic: what one step does, steps over a sequence, and whole layers."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mono_quant.base import Activation, Operation, PackedTensor

States = tuple[Tensor, ...]
"""What a step hands to the next: h, and c for an LSTM."""

HiddenProduct = Callable[[Tensor], Tensor]
"""From h ``[B, out]`` to its product with the hidden weight and bias, ``[B, gates * units]``."""

Advance = Callable[[Tensor, States], States]
"""From the product of a step's inputs and the states before it to the states after it."""

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
"""Kinds of cell as `torch.nn.RNNBase.mode` names them, and rows of their weights per unit."""


def advance(cell: str, inputs: Tensor, hidden: Tensor, states: States) -> States:
    """Return the states after a step, as the formulas of `torch.nn.LSTM`, `GRU` and `RNN` have it.

    Args:
        cell: a name in `GATES`.
        inputs: product of the inputs with its bias, ``[B, gates * units]``.
        hidden: product of h with its bias, ``[B, gates * units]``.
        states: h ``[B, units]`` (of a projected LSTM, its projection) and for an LSTM c.

    Returns:
        h before it is projected, ``[B, units]``, and for an LSTM c.
    """
    if cell == "LSTM":
        i, f, g, o = (inputs + hidden).chunk(4, -1)
        c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if cell == "GRU":
        (xr, xz, xn), (hr, hz, hn) = inputs.chunk(3, -1), hidden.chunk(3, -1)
        n = (xn + (xr + hr).sigmoid() * hn).tanh()
        return (n + (xz + hz).sigmoid() * (states[0] - n),)
    total = inputs + hidden
    return (total.tanh() if cell == "RNN_TANH" else total.relu(),)


@dataclass(frozen=True, eq=False, slots=True)
class Projection:
    """What makes a shorter h of the h of an LSTM.

    Attributes:
        weight: ``[projected, units]``.
        activation: how its inputs are quantized; None where they stay float.
    """

    weight: Tensor
    activation: Activation | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Step:
    """One step of a sequence.

    Attributes:
        before: what the hidden weight was multiplied by, not yet on a grid, ``[B, out]``.
        unprojected: what the projection was multiplied by, ``[B, units]``; h if there is none.
        states: those after the step.
    """

    before: Tensor
    unprojected: Tensor
    states: States


@dataclass(frozen=True, eq=False, slots=True)
class Recurrence(Operation):
    """One direction of one recurrent layer, from the product of its inputs on.

    A kernel is given the whole sequence, so that it decodes or prepares the hidden weight once. The
    tensor it is called with is that product and stays float; what is quantized is h, inside.

    Attributes:
        cell: a name in `GATES`.
        sizes: how many samples take part in each step; they never grow, and the first ones go on.
        states: before the first step, ``[B, ...]`` each.
        reverse: from the last step to the first.
        activation: how h is quantized before it meets the weight; None where it stays float.
        projection: of an LSTM that has one.
    """

    cell: str
    sizes: tuple[int, ...]
    states: States
    reverse: bool = False
    activation: Activation | None = None
    projection: Projection | None = None

    def __call__(self, x: Tensor, weight: PackedTensor, bias: Tensor | None) -> Tensor:
        """Return the states after each step, those of a sample side by side.

        Args:
            x: product of the inputs with its bias, a row for each sample of each step,
                ``[sum(sizes), gates * units]``.
            weight: the hidden one, ``[gates * units, out]``.
            bias: of the hidden product.

        Returns:
            ``[sum(sizes), out]``, for an LSTM ``[sum(sizes), out + units]``, in the dtype of `x`.
        """
        return self.unroll(x, weight.dequantize(x.dtype), bias)

    def unroll(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return what a call does, for a float weight."""
        return self.join(self.steps(x, self.product(weight.to(x.dtype), bias)))

    def product(self, weight: Tensor, bias: Tensor | None) -> HiddenProduct:
        """Return the product of h, put on its grid, with a float weight."""
        bias = bias.to(weight.dtype) if bias is not None else None
        return lambda h: functional.linear(_on_grid(h, self.activation), weight, bias)

    def join(self, steps: Iterable[Step]) -> Tensor:
        """Return the result of a call for its `steps`, in the order that they were computed in."""
        made = [step.states for step in steps]
        parts = zip(*(made[::-1] if self.reverse else made), strict=True)
        return torch.cat([torch.cat(part) for part in parts], -1)

    def steps(self, x: Tensor, hidden: HiddenProduct) -> Iterator[Step]:
        """Yield the steps in the order in which they are computed.

        Args:
            x: product of the inputs, as in a call.
            hidden: what each step makes of h.
        """
        return self.walk(x, lambda now, was: advance(self.cell, now, hidden(was[0]), was))

    def walk(self, x: Tensor, step: Advance) -> Iterator[Step]:
        """Yield the steps in the order in which they are computed.

        Args:
            x: product of the inputs, as in a call.
            step: what makes states, h before it is projected, of inputs and the states before.
        """
        states, present = tuple(state[:0] for state in self.states), 0
        parts = torch.split(x, list(self.sizes))
        for inputs in reversed(parts) if self.reverse else parts:
            count = inputs.shape[0]
            if count != present:
                pairs = zip(states, self.states, strict=True)
                states = tuple(_of_count(now, first, count) for now, first in pairs)
                present = count
            before = states[0]
            states = step(inputs, states)
            unprojected = states[0]
            if self.projection is not None:
                matrix = self.projection.weight.to(x.dtype)
                whole = _on_grid(unprojected, self.projection.activation)
                states = (functional.linear(whole, matrix), *states[1:])
            yield Step(before, unprojected, states)

    def split(self, rows: Tensor) -> States:
        """Return the result of a call as h ``[sum(sizes), out]`` and, for an LSTM, c."""
        return torch.split(rows, [state.shape[-1] for state in self.states], -1)

    def last(self, rows: Tensor) -> Tensor:
        """Return the row of each sample's last step, ``[B, width]``, of the result of a call."""
        first = self.sizes[0]
        if self.reverse:
            return rows[:first]
        if self.sizes[-1] == first:
            return rows[-first:]
        parts = torch.split(rows, list(self.sizes))
        ending: list[Tensor] = []  # samples that take part in a step and not in the next
        following = 0
        for part in reversed(parts):
            if part.shape[0] > following or not ending:
                ending.append(part[following:])
            following = part.shape[0]
        return torch.cat(ending)


@dataclass(frozen=True, slots=True)
class WholeSequence(Operation):
    """A recurrent layer with float inputs, all of whose steps torch computes in one call.

    It has several weights and is asked for as a whole; a kernel is chosen by the weight that h
    meets first.

    Attributes:
        cell: a name in `GATES`.
        shapes: of all weights.
        bias: whether there are biases.
        layers: on top of each other.
        dropout: between layers, while `training`.
        training: whether the layer is in that mode.
        bidirectional: whether each layer also goes from the last step to the first.
        batch_first: whether inputs are ``[B, T, in]``.
        projected: whether h is.
        steps: about how many; a kernel is chosen by that.
    """

    cell: str
    shapes: tuple[tuple[int, int], ...]
    bias: bool = False
    layers: int = 1
    dropout: float = 0.0
    training: bool = False
    bidirectional: bool = False
    batch_first: bool = False
    projected: bool = False
    steps: int = 32

    def __call__(self, x: Tensor, weight: PackedTensor, bias: Tensor | None) -> Tensor:
        """Return the output ``[T, B, units]`` of one layer, whose weights are both `weight`.

        That is no layer that anybody has, but takes as long as one to decode and compute.
        """
        matrices = [weight.dequantize(x.dtype) for _ in range(2)]
        biases = [bias.to(x.dtype)] * 2 if bias is not None else []
        return self.of_floats(x, self.zeros(x), [*matrices, *biases])[0]

    @property
    def options(self) -> tuple[bool, int, float, bool, bool]:
        """What torch's operators are told: all but `batch_first`, which packed sequences lack."""
        return (self.bias, self.layers, self.dropout, self.training, self.bidirectional)

    def zeros(self, x: Tensor) -> States:
        """Return states of zero for ``x [T, B, in]`` and one layer of one direction."""
        units = self.shapes[0][0] // GATES[self.cell]
        return (x.new_zeros(1, x.shape[1], units),) * (2 if self.cell == "LSTM" else 1)

    def of_floats(
        self,
        x: Tensor,
        states: States,
        weights: Sequence[Tensor],
        batch_sizes: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Return output and last states for float weights, by torch's own kernel.

        Args:
            x: ``[T, B, in]``, ``[B, T, in]`` with `batch_first`, or data of a packed sequence.
            states: ``[layers * directions, B, ...]`` each.
            weights: with the biases, in the order of `torch.nn.RNNBase`.
            batch_sizes: of the packed sequence.
        """
        fused, hidden = _FUSED[self.cell], states if self.cell == "LSTM" else states[0]
        if batch_sizes is not None:
            return fused(x, batch_sizes, hidden, weights, *self.options)
        return fused(x, hidden, weights, *self.options, self.batch_first)


_FUSED: Mapping[str, Callable[..., tuple[Tensor, ...]]] = {
    "LSTM": torch.lstm,
    "GRU": torch.gru,
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
}


def _on_grid(x: Tensor, activation: Activation | None) -> Tensor:
    return activation.fake_quantize(x).to(x.dtype) if activation is not None else x


def _of_count(now: Tensor, first: Tensor, count: int) -> Tensor:
    """Return a state of `count` samples: some have ended, or some begin, which go backwards."""
    present = now.shape[0]
    if present < count:
        return torch.cat((now, first[present:count]))
    return now[:count]
