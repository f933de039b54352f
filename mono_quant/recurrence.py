"""Recurrent arithmetic: what one step does, and steps over a sequence, as an operation."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mono_quant.base import Activation, Operation, PackedTensor

States = tuple[Tensor, ...]
"""What a step hands to the next: h, and c for an LSTM."""

HiddenProduct = Callable[[Tensor], Tensor]
"""From h ``[B, out]`` to its product with the hidden weight and bias, ``[B, gates * units]``."""

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
        made = [torch.cat(step.states, -1) for step in steps]
        return torch.cat(made[::-1] if self.reverse else made)

    def steps(self, x: Tensor, hidden: HiddenProduct) -> Iterator[Step]:
        """Yield the steps in the order in which they are computed.

        Args:
            x: product of the inputs, as in a call.
            hidden: what each step makes of h.
        """
        states = tuple(state[:0] for state in self.states)
        parts = torch.split(x, list(self.sizes))
        for inputs in reversed(parts) if self.reverse else parts:
            count = inputs.shape[0]
            states = tuple(
                _of_count(now, first, count) for now, first in zip(states, self.states, strict=True)
            )
            before = states[0]
            states = advance(self.cell, inputs, hidden(before), states)
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
        parts = torch.split(rows, list(self.sizes))
        if self.reverse:
            return parts[0]
        ending: list[Tensor] = []  # samples that take part in a step and not in the next
        following = 0
        for part in reversed(parts):
            if part.shape[0] > following or not ending:
                ending.append(part[following:])
            following = part.shape[0]
        return torch.cat(ending)


def _on_grid(x: Tensor, activation: Activation | None) -> Tensor:
    return activation.fake_quantize(x).to(x.dtype) if activation is not None else x


def _of_count(now: Tensor, first: Tensor, count: int) -> Tensor:
    """Return a state of `count` samples: some have ended, or some begin, which go backwards."""
    present = now.shape[0]
    if present < count:
        return torch.cat((now, first[present:count]))
    return now[:count]
