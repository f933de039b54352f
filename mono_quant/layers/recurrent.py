"""Recurrent layers and cells, whose weights are quantized each on its own."""

import dataclasses
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from functools import partial
from typing import ClassVar, cast

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence

from mono_quant.base import Activation, PackedTensor, QuantizedModule, Scheme
from mono_quant.configurable import register
from mono_quant.layers.converting import ConvertingQuantizer
from mono_quant.modules import (
    QuantizedGRU,
    QuantizedGRUCell,
    QuantizedLSTM,
    QuantizedLSTMCell,
    QuantizedRecurrent,
    QuantizedRNN,
    QuantizedRNNCell,
)
from mono_quant.modules.recurrent_cell import mode_of, read_cell
from mono_quant.modules.sequence import Hidden, SequenceCall, unroll
from mono_quant.numerics.values import Layout
from mono_quant.recurrence import GATES, Projection, Recurrence

Inputs = Iterable[tuple[str, Tensor]]


class _SeveralWeightsQuantizer(ConvertingQuantizer):
    """What the quantizers of recurrent layers and cells share."""

    slowed: ClassVar[str | None] = (
        "each step is many small operations, which makes layers of a few hundred units two or "
        "three times slower than in float and only wider ones, or batches, faster; "
        'activations(None), or override(..., activations="float"), leaves its inputs in float'
    )

    def refuse(self, layer: nn.Module, scheme: Scheme) -> str | None:
        """Return that a subclass computes something else, or why a weight cannot be taken over."""
        if reason := ConvertingQuantizer.refuse(self, layer, scheme):
            return reason
        float_class, _ = self._classes(layer)
        if is_parametrized(layer):
            return (
                "a weight of it is parametrized: make the weight an ordinary one with "
                "torch.nn.utils.parametrize.remove_parametrizations"
            )
        if type(layer).forward is not float_class.forward:
            return f"{type(layer).__name__} is a {float_class.__name__} with a forward of its own"
        if any(name not in layer._parameters for name in self.layouts(layer)):
            return "a weight of it is made by a hook (old-style weight_norm or pruning): remove it"
        return None

    @abstractmethod
    def layouts(self, layer: nn.Module) -> Mapping[str, Layout]:
        """Return the layout of each weight: a row is what one gate of one unit sees."""

    def refuse_activation(self, layer: nn.Module, name: str, mode: str) -> str | None:
        """Return None: these are matrix products, which take any."""
        return None

    def rows(self, layer: nn.Module, name: str, x: Tensor) -> Tensor:
        """Return rows ``[n, in]``, as which all inputs come."""
        return x

    def channel_dim(self, layer: nn.Module, name: str) -> int:
        """Return the last one."""
        return -1


@register
@attrs.frozen
class RecurrentQuantizer(_SeveralWeightsQuantizer):
    """`torch.nn.LSTM`, `GRU` and `RNN`, of any number of layers, both directions, projected too.

    The weights of inputs, of h and of projections are quantized each on its own, and so are what
    they are multiplied by.
    """

    kind: ClassVar[str] = "recurrent"
    float_classes: ClassVar = {nn.LSTM: QuantizedLSTM, nn.GRU: QuantizedGRU, nn.RNN: QuantizedRNN}

    def layouts(self, layer: nn.Module) -> Mapping[str, Layout]:
        """Return ``[1, gates * units, in]``; for a projection, ``[1, out, units]``."""
        rnn = cast("nn.RNNBase", layer)  # `matches` has seen to it
        rows, out = GATES[rnn.mode] * rnn.hidden_size, rnn.proj_size or rnn.hidden_size
        between = out * (2 if rnn.bidirectional else 1)
        shapes = {"ih": (rows, between), "hh": (rows, out), "hr": (out, rnn.hidden_size)}
        first = ("weight_ih_l0", "weight_ih_l0_reverse")
        return {
            name: Layout.grouped(
                (rows, rnn.input_size) if name in first else shapes[name.split("_")[1]]
            )
            for name in rnn._flat_weights_names
            if name.startswith("weight_")
        }

    def inputs(
        self, layer: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> Inputs:
        """Return what each weight is multiplied by, rows ``[n, in]``: the layer runs step by step.

        Raises:
            ValueError, RuntimeError: the layer cannot be called like that.
        """
        rnn = cast("nn.RNNBase", layer)
        found: list[tuple[str, Tensor]] = []
        unroll(rnn, SequenceCall.read(rnn, *_arguments(args, kwargs)), partial(_watch, rnn, found))
        return found

    def replace(
        self,
        layer: nn.Module,
        weights: Mapping[str, PackedTensor],
        activations: Mapping[str, Activation],
    ) -> QuantizedModule:
        """Return `layer` itself, converted."""
        converted = ConvertingQuantizer.replace(self, layer, weights, activations)
        return cast("QuantizedRecurrent", converted).forget_float_weights()


@register
@attrs.frozen
class RecurrentCellQuantizer(_SeveralWeightsQuantizer):
    """`torch.nn.LSTMCell`, `GRUCell` and `RNNCell`."""

    kind: ClassVar[str] = "recurrent_cell"
    float_classes: ClassVar = {
        nn.LSTMCell: QuantizedLSTMCell,
        nn.GRUCell: QuantizedGRUCell,
        nn.RNNCell: QuantizedRNNCell,
    }

    def layouts(self, layer: nn.Module) -> Mapping[str, Layout]:
        """Return ``[1, gates * units, in]`` for each of the two weights."""
        cell = cast("nn.RNNCellBase", layer)  # `matches` has seen to it
        rows = GATES[mode_of(cell)] * cell.hidden_size
        return {
            "weight_ih": Layout.grouped((rows, cell.input_size)),
            "weight_hh": Layout.grouped((rows, cell.hidden_size)),
        }

    def inputs(
        self, layer: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> Inputs:
        """Return the input and h, rows ``[n, in]``."""
        input, hx = _arguments(args, kwargs)
        x, states = read_cell(cast("nn.RNNCellBase", layer), cast("Tensor", input), hx)
        return [("weight_ih", x), ("weight_hh", states[0])]


def _arguments(
    args: tuple[object, ...], kwargs: Mapping[str, object]
) -> tuple[Tensor | PackedSequence, Hidden | None]:
    """Return what ``forward(input, hx=None)`` was called with."""
    given = {**dict(zip(("input", "hx"), args, strict=False)), **kwargs}
    return cast("Tensor | PackedSequence", given["input"]), cast("Hidden | None", given.get("hx"))


def _watch(
    layer: nn.RNNBase,
    found: list[tuple[str, Tensor]],
    suffix: str,
    x: Tensor,
    recurrence: Recurrence,
) -> Tensor:
    """Run one direction of one float layer, and add what its weights are multiplied by."""

    def held(name: str) -> Tensor | None:
        parameter = layer._parameters.get(f"{name}_{suffix}")
        return parameter.to(x.dtype) if parameter is not None else None

    weight_ih, weight_hh, shorten = map(held, ("weight_ih", "weight_hh", "weight_hr"))
    if shorten is not None:
        recurrence = dataclasses.replace(recurrence, projection=Projection(shorten))
    inputs = functional.linear(x, cast("Tensor", weight_ih), held("bias_ih"))
    hidden = recurrence.product(cast("Tensor", weight_hh), held("bias_hh"))
    steps = list(recurrence.steps(inputs, hidden))
    found.append((f"weight_ih_{suffix}", x))
    found.append((f"weight_hh_{suffix}", torch.cat([step.before for step in steps])))
    if shorten is not None:
        found.append((f"weight_hr_{suffix}", torch.cat([step.unprojected for step in steps])))
    return recurrence.join(steps)
