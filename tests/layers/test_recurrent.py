"""LSTM, GRU and RNN against torch's own layer and against loops in float64."""

from collections.abc import Callable
from typing import ClassVar

import attrs
import pytest
import torch
from torch import Tensor, nn

from mono_quant import LayerReport, Layout, Quantizer, RecurrentQuantizer
from mono_quant.modules import QuantizedGRU, QuantizedLSTM, QuantizedRecurrent, QuantizedRNN
from tests.helpers import GRIDS, TOLERANCES, assert_near
from tests.layers.recurrences import (
    LAYERS,
    UNITS,
    WIDTH,
    Grid,
    calibrated,
    decoded,
    naive,
    per_row,
    recurrent,
    zeros,
)

Make = Callable[[], nn.RNNBase]
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
pytestmark = [
    # The float layer says it too.
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),  # it is deprecated
]


@attrs.frozen
class WithoutFirst(RecurrentQuantizer):
    """Leaves the first input weight in float."""

    kind: ClassVar[str] = "recurrent-without-first"

    def layouts(self, layer: nn.Module) -> dict[str, Layout]:
        found = RecurrentQuantizer.layouts(self, layer)
        return {name: layout for name, layout in found.items() if name != "weight_ih_l0"}


@attrs.frozen
class InputsOnly(RecurrentQuantizer):
    """Leaves the weights of h in float, and projections."""

    kind: ClassVar[str] = "recurrent-inputs-only"

    def layouts(self, layer: nn.Module) -> dict[str, Layout]:
        found = RecurrentQuantizer.layouts(self, layer)
        return {name: layout for name, layout in found.items() if name.startswith("weight_ih")}


def flat(result: object) -> list[Tensor]:
    """Return output, h and c of a layer's result."""
    assert isinstance(result, tuple)
    output, hidden = result
    return [output, *([hidden] if isinstance(hidden, Tensor) else hidden)]


def assert_same(found: object, expected: object) -> None:
    for one, other in zip(flat(found), flat(expected), strict=True):
        assert_near(one, other)


def loops(twin: nn.RNNBase, x: Tensor, grids: dict[str, Grid]) -> list[Tensor]:
    """Return what a layer computes of a batch in its own form, sample by sample."""
    batch = 0 if twin.batch_first else 1
    made = [naive(twin, sample, zeros(twin), grids) for sample in x.double().unbind(batch)]
    states = [torch.stack(parts, 1) for parts in zip(*(last for _, last in made), strict=True)]
    return [torch.stack([output for output, _ in made], batch), *states]


@each_layer
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_layer_computes_what_the_float_layer_does_on_decoded_weights(
    make: Make, dtype: torch.dtype
) -> None:
    source = make().to(dtype)
    model = recurrent(source)
    x = torch.randn(4, 5, WIDTH).to(dtype)
    with torch.no_grad():
        assert_same(model(x), decoded(model, source)(x.double()))


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_every_grid_computes_on_decoded_weights(grid: Quantizer) -> None:
    source = nn.LSTM(64, 32, 2)
    model = recurrent(source, grid)
    x = torch.randn(4, 5, 64)
    with torch.no_grad():
        assert_same(model(x), decoded(model, source)(x.double()))


@each_layer
def test_dynamic_inputs_are_quantized_row_by_row_and_h_at_each_step(make: Make) -> None:
    source = make().double()
    model = recurrent(source, Quantizer().activations("dynamic"))
    x = torch.randn(4, 5, WIDTH, dtype=torch.float64)
    twin = decoded(model, source)
    names = model.packed_weights()
    assert set(model.activations()) == set(names)
    with torch.no_grad():
        found, expected = flat(model(x)), loops(twin, x, dict.fromkeys(names, per_row))
        unquantized = flat(twin(x))
    for one, other, without in zip(found, expected, unquantized, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
        assert not torch.allclose(one, without, rtol=0, atol=1e-5)


@each_layer
def test_static_inputs_are_quantized_by_what_was_calibrated(make: Make) -> None:
    source = make().double()
    x = torch.randn(4, 5, WIDTH, dtype=torch.float64)
    model = recurrent(source, Quantizer().activations("static").fit(x))
    grids = calibrated(model)
    assert set(grids) == set(model.packed_weights())
    with torch.no_grad():
        found, expected = flat(model(x)), loops(decoded(model, source), x, grids)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@each_layer
def test_the_calibrated_ranges_are_those_of_what_each_weight_meets(make: Make) -> None:
    source = make()
    x = torch.randn(4, 5, WIDTH)
    model = recurrent(source, Quantizer().activations("static").fit(x))
    seen: dict[str, list[Tensor]] = {}

    def watcher(name: str) -> Grid:
        def watch(row: Tensor) -> Tensor:
            seen.setdefault(name, []).append(row)
            return row

        return watch

    with torch.no_grad():
        loops(source.double(), x, {name: watcher(name) for name in model.packed_weights()})
    for name, activation in model.activations().items():
        rows = torch.stack(seen[name])
        low, high = rows.min().clamp(max=0), rows.max().clamp(min=0)
        assert activation.scale is not None
        torch.testing.assert_close(
            activation.scale.double().squeeze(), (high - low) / 255, rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("name", ["LSTM projected", "GRU all of it", "tanh plain"])
@pytest.mark.parametrize("maker", [WithoutFirst(), InputsOnly()], ids=["hidden", "inputs"])
@pytest.mark.parametrize("mode", [None, "dynamic", "static"])
def test_any_of_the_weights_may_stay_float(
    name: str, maker: RecurrentQuantizer, mode: str | None
) -> None:
    source = LAYERS[name]().double()
    x = torch.randn(4, 5, WIDTH, dtype=torch.float64)
    quantizer = Quantizer().layer(maker).activations(mode)
    model = recurrent(source, quantizer.fit(x) if mode == "static" else quantizer)
    names = set(model.packed_weights())
    assert names == set(maker.layouts(source))
    floats = set(RecurrentQuantizer().layouts(source)) - names
    assert floats == {key for key, _ in model.named_parameters() if key.startswith("weight")}
    grids: dict[str, Grid] = {}
    if mode is not None:
        grids = calibrated(model) if mode == "static" else dict.fromkeys(names, per_row)
    with torch.no_grad():
        found, expected = flat(model(x)), loops(decoded(model, source), x, grids)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@each_layer
def test_a_result_depends_on_no_other_sample_of_the_batch(make: Make) -> None:
    model = recurrent(make(), Quantizer().activations("dynamic"))
    batch = 0 if model.batch_first else 1
    x = torch.randn(4, 5, WIDTH)
    loud = x.clone()
    loud.select(batch, 0).mul_(100)
    with torch.no_grad():
        one, other = model(x)[0].unbind(batch)[1:], model(loud)[0].unbind(batch)[1:]
    for quiet, beside in zip(one, other, strict=True):
        torch.testing.assert_close(quiet, beside, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_wide_and_returned_narrow(dtype: torch.dtype) -> None:
    model = recurrent(nn.LSTM(WIDTH, UNITS, 2), Quantizer().activations("dynamic"))
    x = torch.randn(4, 5, WIDTH).to(dtype)
    with torch.no_grad():
        expected = flat(model(x.float()))
        found = flat(model.to(dtype)(x))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.float(), other, rtol=0, atol=2e-2)


@each_layer
@pytest.mark.parametrize("mode", [None, "dynamic"])
def test_gradients_flow_to_input_states_and_biases(make: Make, mode: str | None) -> None:
    source = make()
    model = recurrent(source, Quantizer().activations(mode))
    x = torch.randn(4, 5, WIDTH, requires_grad=True)
    twin = decoded(model, source).float()
    torch.autograd.backward(flat(model(x))[0].square().sum())
    found = x.grad
    assert found is not None
    assert all(parameter.grad is not None for parameter in model.parameters())
    wide = x.detach().requires_grad_()
    torch.autograd.backward(flat(twin(wide))[0].square().sum())
    assert wide.grad is not None
    room = 1e-5 if mode is None else 0.05 * float(wide.grad.abs().max())
    torch.testing.assert_close(found, wide.grad, rtol=0, atol=room)


@pytest.mark.parametrize("mode", [None, "dynamic"])
def test_layers_are_dropped_out_in_train_mode_and_not_in_eval(mode: str | None) -> None:
    model = recurrent(nn.GRU(WIDTH, UNITS, 2, dropout=0.5).train(), Quantizer().activations(mode))
    x = torch.randn(4, 5, WIDTH)
    model.train()
    assert not torch.equal(model(x)[0], model(x)[0])
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])


def test_a_row_of_the_report_says_each_weight_and_its_inputs() -> None:
    result = Quantizer().only("*").apply(nn.LSTM(WIDTH, UNITS, proj_size=3, bidirectional=True))
    rows: dict[str, LayerReport] = {row.name: row for row in result.report.layers if row.shape}
    assert {name: row.shape for name, row in rows.items()} == {
        "weight_ih_l0": (32, WIDTH),
        "weight_hh_l0": (32, 3),
        "weight_hr_l0": (3, UNITS),
        "weight_ih_l0_reverse": (32, WIDTH),
        "weight_hh_l0_reverse": (32, 3),
        "weight_hr_l0_reverse": (3, UNITS),
    }
    assert {row.activation for row in rows.values()} == {
        "dynamic 8-bit asymmetric per-token inputs"
    }


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        (nn.LSTM(WIDTH, UNITS), QuantizedLSTM),
        (nn.GRU(WIDTH, UNITS), QuantizedGRU),
        (nn.RNN(WIDTH, UNITS), QuantizedRNN),
    ],
    ids=["LSTM", "GRU", "RNN"],
)
def test_the_result_is_still_a_layer_of_its_kind(
    source: nn.RNNBase, kind: type[QuantizedRecurrent]
) -> None:
    model = recurrent(source)
    assert type(model) is kind
    assert isinstance(model, type(source))
    assert (model.input_size, model.hidden_size, model.mode) == (WIDTH, UNITS, source.mode)
