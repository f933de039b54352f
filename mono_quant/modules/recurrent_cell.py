"""Quantized recurrent cells: one step."""

from typing import cast

from torch import Tensor, nn

from mono_quant.modules.recurrent import SeveralWeights
from mono_quant.modules.sequence import Hidden
from mono_quant.operations import wide
from mono_quant.recurrence import States, advance


def mode_of(cell: nn.RNNCellBase) -> str:
    """Return the kind of a cell, as `torch.nn.RNNBase.mode` names it."""
    if isinstance(cell, nn.RNNCell):
        return f"RNN_{cell.nonlinearity.upper()}"
    return "LSTM" if isinstance(cell, nn.LSTMCell) else "GRU"


def read_cell(cell: nn.RNNCellBase, input: Tensor, hx: Hidden | None) -> tuple[Tensor, States]:
    """Return the input of a cell as ``[B, in]`` and its states as ``[B, units]``.

    Of half precision on a CPU, in float32.

    Raises:
        ValueError: something has the wrong number of dimensions.
        RuntimeError: a state has another size than the cell and the input say.
    """
    given: States = () if hx is None else (hx,) if isinstance(hx, Tensor) else tuple(hx)
    named = {"input": input, **{f"hx[{place}]": state for place, state in enumerate(given)}}
    for name, tensor in named.items():
        if tensor.dim() not in (1, 2):
            raise ValueError(f"Expected {name} to be 1D or 2D, got {tensor.dim()}D instead")
    if input.dim() == 1:
        input, given = input.unsqueeze(0), tuple(state.unsqueeze(0) for state in given)
    expected = (input.shape[0], cell.hidden_size)
    if hx is None:
        given = (input.new_zeros(expected),) * (2 if isinstance(cell, nn.LSTMCell) else 1)
    for state in given:
        if tuple(state.shape) != expected:
            raise RuntimeError(f"Expected hidden size {expected}, got {tuple(state.shape)}")
    return wide(input), tuple(map(wide, given))


class QuantizedRecurrentCell(SeveralWeights, nn.RNNCellBase):
    """What the cells share."""

    def forward(self, input: Tensor, hx: Hidden | None = None) -> Hidden:
        """Return the states after one step: h, for an LSTM the pair of h and c.

        Args:
            input: ``[B, in]`` or ``[in]``.
            hx: the states before, ``[B, units]`` or ``[units]``; zeros if they are not given.

        Raises:
            ValueError: something has the wrong number of dimensions.
            RuntimeError: sizes do not fit.
        """
        x, states = read_cell(self, input, hx)
        inputs = self.product("weight_ih", x, cast("Tensor | None", self.bias_ih))
        hidden = self.product("weight_hh", states[0], cast("Tensor | None", self.bias_hh))
        made = [new.to(input.dtype) for new in advance(mode_of(self), inputs, hidden, states)]
        if input.dim() == 1:
            made = [state.squeeze(0) for state in made]
        return (made[0], made[1]) if len(made) == 2 else made[0]


class QuantizedLSTMCell(QuantizedRecurrentCell, nn.LSTMCell):  # type: ignore[misc]  # one forward
    """`torch.nn.LSTMCell` with quantized weights."""

    float_class = nn.LSTMCell


class QuantizedGRUCell(QuantizedRecurrentCell, nn.GRUCell):  # type: ignore[misc]  # one forward
    """`torch.nn.GRUCell` with quantized weights."""

    float_class = nn.GRUCell


class QuantizedRNNCell(QuantizedRecurrentCell, nn.RNNCell):  # type: ignore[misc]  # one forward
    """`torch.nn.RNNCell` with quantized weights."""

    float_class = nn.RNNCell
