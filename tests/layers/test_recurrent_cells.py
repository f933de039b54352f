"""LSTMCell, GRUCell and RNNCell against torch's own cells and the formulas in float64."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mono_quant import Quantizer, SlowPathWarning, load_model
from mono_quant.modules import QuantizedGRUCell, QuantizedLSTMCell, QuantizedRNNCell
from mono_quant.modules.recurrent_cell import QuantizedRecurrentCell
from tests.helpers import TOLERANCES, assert_near, quantized, same_bits, same_tensors
from tests.layers.recurrences import CELLS, UNITS, WIDTH, Grid, calibrated, decoded, per_row, step

Make = Callable[[], nn.RNNCellBase]
each_cell = pytest.mark.parametrize("make", CELLS.values(), ids=CELLS)
each_mode = pytest.mark.parametrize("mode", [None, "dynamic", "static"])
# It is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")


class Unrolled(nn.Module):
    """Calls a cell for each step of a sequence, as code that needs cells does."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        hidden = None
        for row in x.unbind(1):
            hidden = self.cell(row, hidden)
        assert hidden is not None
        last: Tensor = hidden[0] if isinstance(hidden, tuple) else hidden
        return last


def made(source: nn.RNNCellBase, mode: str | None = None) -> QuantizedRecurrentCell:
    quantizer = Quantizer().activations(mode)
    if mode == "static":
        quantizer = quantizer.fit(torch.randn(8, 3, WIDTH, dtype=source.weight_ih.dtype))
    cell = quantized(Unrolled(source), quantizer).cell
    assert isinstance(cell, QuantizedRecurrentCell)
    return cell


def every(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)  # type: ignore[call-overload]  # a pair


def states(source: nn.RNNCellBase, *shape: int) -> list[Tensor]:
    dtype = source.weight_ih.dtype
    count = 2 if isinstance(source, nn.LSTMCell) else 1
    return [torch.randn(*shape, UNITS, dtype=dtype) for _ in range(count)]


def hidden(given: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    return tuple(given) if len(given) == 2 else given[0]


def kind(source: nn.RNNCellBase) -> str:
    if isinstance(source, nn.RNNCell):
        return f"RNN_{source.nonlinearity.upper()}"
    return "LSTM" if isinstance(source, nn.LSTMCell) else "GRU"


@each_cell
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "states"])
def test_a_cell_computes_what_the_float_cell_does_on_decoded_weights(
    make: Make, dtype: torch.dtype, given: bool
) -> None:
    source = make().to(dtype)
    model = made(source)
    x, start = torch.randn(4, WIDTH).to(dtype), states(source, 4)
    with torch.no_grad():
        twin = decoded(model, source)
        expected = twin(x.double(), *([hidden([one.double() for one in start])] if given else []))
        found = model(x, *([hidden(start)] if given else []))
    for one, other in zip(every(found), every(expected), strict=True):
        assert_near(one, other)


@each_cell
@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_input_and_h_are_quantized_each_row_alone(make: Make, mode: str) -> None:
    source = make().double()
    model = made(source, mode)
    names = ("weight_ih", "weight_hh")
    assert set(model.activations()) == set(names)
    grids: dict[str, Grid] = dict.fromkeys(names, per_row)
    grids = calibrated(model) if mode == "static" else grids
    x, start = torch.randn(4, WIDTH, dtype=torch.float64), states(source, 4)
    twin = decoded(model, source)
    with torch.no_grad():
        found = every(model(x, hidden(start)))
        for place in range(4):
            inputs = twin.weight_ih @ grids["weight_ih"](x[place])
            product = twin.weight_hh @ grids["weight_hh"](start[0][place])
            if twin.bias:
                inputs, product = inputs + twin.bias_ih, product + twin.bias_hh
            made_of = [one[place] for one in start]
            for one, other in zip(found, step(kind(source), inputs, product, made_of), strict=True):
                torch.testing.assert_close(one[place], other, rtol=0, atol=1e-9)


@each_cell
@each_mode
def test_a_single_sample_is_a_batch_of_one(make: Make, mode: str | None) -> None:
    model = made(make(), mode)
    x, start = torch.randn(WIDTH), states(make())
    with torch.no_grad():
        single = every(model(x, hidden(start)))
        of_one = every(model(x[None], hidden([one[None] for one in start])))
    for one, other in zip(single, of_one, strict=True):
        torch.testing.assert_close(one, other[0])


@each_cell
@each_mode
def test_an_empty_batch_gives_an_empty_result(make: Make, mode: str | None) -> None:
    assert [tuple(one.shape) for one in every(made(make(), mode)(torch.randn(0, WIDTH)))] == [
        tuple(one.shape) for one in every(make()(torch.randn(0, WIDTH)))
    ]


@each_cell
@pytest.mark.parametrize(
    ("x", "batch"),
    [
        (torch.randn(4, WIDTH + 1), None),
        (torch.randn(1, 4, WIDTH), None),
        (torch.randn(4, WIDTH), (1,)),
        (torch.randn(4, WIDTH), (2, 4)),
        (torch.ones(4, WIDTH, dtype=torch.int64), None),
    ],
    ids=["width", "3-D", "batch", "3-D state", "integers"],
)
def test_what_does_not_fit_is_refused(make: Make, x: Tensor, batch: tuple[int, ...] | None) -> None:
    source = make()
    given = [hidden(states(source, *batch))] if batch is not None else []
    with pytest.raises((ValueError, RuntimeError)):
        source(x, *given)
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        made(source)(x, *given)


@each_cell
@each_mode
def test_gradients_flow_to_the_input(make: Make, mode: str | None) -> None:
    model = made(make(), mode)
    x = torch.randn(4, WIDTH, requires_grad=True)
    torch.autograd.backward(every(model(x))[0].sum())
    assert x.grad is not None
    assert bool((x.grad != 0).any())


@each_cell
@each_mode
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_cell_comes_back_from_a_file(
    make: Make, mode: str | None, suffix: str, tmp_path: Path
) -> None:
    data = torch.randn(8, 3, WIDTH)
    quantizer = Quantizer().activations(mode).only("*")
    result = (quantizer.fit(data) if mode == "static" else quantizer).apply(Unrolled(make()))
    path = result.save(tmp_path / f"model.{suffix}")
    with torch.device("meta"):
        skeleton = Unrolled(make())
    for fresh in (Unrolled(make()), skeleton):
        loaded = load_model(path, fresh)
        assert same_tensors(loaded, result.model)
        assert same_bits(loaded(data), result.model(data))


@each_cell
def test_a_cell_can_be_copied_moved_traced_and_dequantized(make: Make) -> None:
    source = make()
    model = made(source, "dynamic")
    x = torch.randn(4, WIDTH)
    before = every(model(x))[0]
    assert same_bits(every(copy.deepcopy(model)(x))[0], before)
    assert every(copy.deepcopy(model).double()(x.double()))[0].dtype == torch.float64
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert same_bits(every(compiled(x))[0], before)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(every(program.module()(x))[0], before)
    with pytest.warns(SlowPathWarning, match="weight_hh|was read by attribute"):
        weight = model.weight_hh
    twin = decoded(model, source)
    assert torch.equal(weight.double(), twin.weight_hh)
    floats = model.dequantize()
    assert type(floats) is type(source)
    assert_near(every(floats(x))[0], every(twin(x.double()))[0].detach())


@pytest.mark.parametrize(
    ("source", "become"),
    [
        (nn.LSTMCell(WIDTH, UNITS), QuantizedLSTMCell),
        (nn.GRUCell(WIDTH, UNITS), QuantizedGRUCell),
        (nn.RNNCell(WIDTH, UNITS), QuantizedRNNCell),
    ],
    ids=["LSTM", "GRU", "RNN"],
)
def test_the_result_is_still_a_cell_of_its_kind(
    source: nn.RNNCellBase, become: type[QuantizedRecurrentCell]
) -> None:
    model = made(source)
    assert type(model) is become
    assert {name for name, _ in model.named_parameters()} == {"bias_ih", "bias_hh"}
