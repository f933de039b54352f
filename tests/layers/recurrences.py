"""Recurrent layers of every kind, and what they compute, written out sample by sample in float64.

Nothing here calls the code under test: weights are decoded bit by bit, and inputs are put on their
grid by torch's own `quantize_per_channel`.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from mono_quant import QuantizedModule, Quantizer
from mono_quant.modules import QuantizedRecurrent
from tests.helpers import WEIGHTS_ONLY, ModelT, quantized, stack_and_step

Grid = Callable[[Tensor], Tensor]
"""Puts one row of inputs on its grid."""

WIDTH, UNITS = 6, 8

KINDS: dict[str, Callable[..., nn.RNNBase]] = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "tanh": nn.RNN,
    "relu": partial(nn.RNN, nonlinearity="relu"),
}
OPTIONS: dict[str, dict[str, int | bool]] = {
    "plain": {},
    "layers": {"num_layers": 3},
    "both directions": {"bidirectional": True},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "all of it": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "projected": {"num_layers": 2, "bidirectional": True, "proj_size": 5},
}
LAYERS: dict[str, Callable[[], nn.RNNBase]] = {
    f"{kind} {name}": partial(make, WIDTH, UNITS, **options)
    for kind, make in KINDS.items()
    for name, options in OPTIONS.items()
    if kind == "LSTM" or "proj_size" not in options
}
CELLS: dict[str, Callable[[], nn.RNNCellBase]] = {
    "LSTM": lambda: nn.LSTMCell(WIDTH, UNITS),
    "GRU": lambda: nn.GRUCell(WIDTH, UNITS),
    "tanh": lambda: nn.RNNCell(WIDTH, UNITS),
    "relu": lambda: nn.RNNCell(WIDTH, UNITS, nonlinearity="relu"),
    "LSTM no bias": lambda: nn.LSTMCell(WIDTH, UNITS, bias=False),
    "GRU no bias": lambda: nn.GRUCell(WIDTH, UNITS, bias=False),
}


def recurrent(source: nn.RNNBase, quantizer: Quantizer = WEIGHTS_ONLY) -> QuantizedRecurrent:
    """Return the layer quantized, small as it may be."""
    model = quantized(source, quantizer)
    assert isinstance(model, QuantizedRecurrent)
    return model


def decoded(model: QuantizedModule, source: ModelT) -> ModelT:
    """Return `source` in float64 with the weights of a quantized layer, seen to be nearest."""
    twin = copy.deepcopy(source).to(torch.float64)
    for name, packed in model.packed_weights().items():
        weight = twin.get_parameter(name)
        stack, step = stack_and_step(packed, weight.shape[1])
        assert ((stack[0] - weight).abs() <= 0.65 * step[0] + 1e-12).all()
        setattr(twin, name, nn.Parameter(stack[0]))
    return twin


def per_row(x: Tensor) -> Tensor:
    """Return a row on the asymmetric grid of 8 bits that covers it, by torch's own operator."""
    row = x.to(torch.float32)
    low, high = row.min().clamp(max=0), row.max().clamp(min=0)
    scale = (high - low) / 255
    if scale == 0:
        return x
    return _quantized(x, scale, (-low / scale).round())


def calibrated(model: QuantizedModule) -> dict[str, Grid]:
    """Return the grids that were calibrated, by the name of the weight."""
    found: dict[str, Grid] = {}
    for name, activation in model.activations().items():
        assert activation.scale is not None
        assert activation.zero_point is not None
        found[name] = partial(_quantized, scale=activation.scale, zero_point=activation.zero_point)
    return found


def _quantized(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    row = x.to(torch.float32)
    codes = torch.quantize_per_channel(
        row[None], scale.reshape(1), zero_point.reshape(1).to(torch.int64), 0, torch.quint8
    )
    return codes.dequantize()[0].to(x.dtype)


def step(mode: str, inputs: Tensor, hidden: Tensor, states: list[Tensor]) -> list[Tensor]:
    """Return the states of one sample after a step: the formulas of torch's documentation."""
    h, n = states[0], hidden.numel() // {"LSTM": 4, "GRU": 3}.get(mode, 1)
    if mode == "LSTM":
        total = inputs + hidden
        i, f = torch.sigmoid(total[:n]), torch.sigmoid(total[n : 2 * n])
        g, o = torch.tanh(total[2 * n : 3 * n]), torch.sigmoid(total[3 * n :])
        c = f * states[1] + i * g
        return [o * torch.tanh(c), c]
    if mode == "GRU":
        r = torch.sigmoid(inputs[:n] + hidden[:n])
        z = torch.sigmoid(inputs[n : 2 * n] + hidden[n : 2 * n])
        new = torch.tanh(inputs[2 * n :] + r * hidden[2 * n :])
        return [(1 - z) * new + z * h]
    total = inputs + hidden
    return [torch.tanh(total) if mode == "RNN_TANH" else torch.relu(total)]


def naive(
    twin: nn.RNNBase, x: Tensor, states: Iterable[Tensor], grids: Mapping[str, Grid]
) -> tuple[Tensor, list[Tensor]]:
    """Return output and last states of a layer for one sample ``[T, in]``.

    Args:
        twin: in float64, with the weights to compute with.
        x: the sample.
        states: ``[layers * directions, ...]`` each.
        grids: by the name of the weight that the row meets; other rows stay as they are.
    """

    def product(kind: str, suffix: str, row: Tensor) -> Tensor:
        name = f"weight_{kind}_{suffix}"
        bias = getattr(twin, f"bias_{kind}_{suffix}", 0.0)
        on_grid = grids[name](row) if name in grids else row
        result: Tensor = getattr(twin, name) @ on_grid + bias
        return result

    last: list[list[Tensor]] = []
    for layer in range(twin.num_layers):
        outputs = []
        for back in range(1 + twin.bidirectional):
            suffix = f"l{layer}" + "_reverse" * back
            now = [state[len(last)] for state in states]
            made: dict[int, Tensor] = {}
            for t in range(len(x))[:: -1 if back else 1]:
                inputs, hidden = product("ih", suffix, x[t]), product("hh", suffix, now[0])
                now = step(twin.mode, inputs, hidden, now)
                if twin.proj_size:
                    now[0] = product("hr", suffix, now[0])
                made[t] = now[0]
            last.append(now)
            outputs.append(torch.stack([made[t] for t in range(len(x))]))
        x = torch.cat(outputs, -1)
    return x, [torch.stack(parts) for parts in zip(*last, strict=True)]


def zeros(layer: nn.RNNBase) -> list[Tensor]:
    """Return the states ``[layers * directions, ...]`` that a sample begins with."""
    count = layer.num_layers * (1 + layer.bidirectional)
    h = torch.zeros(count, layer.proj_size or layer.hidden_size, dtype=torch.float64)
    c = torch.zeros(count, layer.hidden_size, dtype=torch.float64)
    return [h, c] if layer.mode == "LSTM" else [h]
