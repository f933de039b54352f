"""Recurrent layers that step on integers, against the reference."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from mono_quant import QuantizedLayer, Quantizer, kernels
from mono_quant.base import Activation, KernelSpec
from mono_quant.kernels import REFERENCE, IntegerSteps, select
from mono_quant.kernels.integer import factor_of
from mono_quant.kernels.steps import Codes, IntegerStep, knows
from mono_quant.modules import QuantizedRecurrent
from mono_quant.numerics.granularity import PerTensor, PerToken
from mono_quant.operations import MatrixProduct
from mono_quant.recurrence import GATES, Recurrence, advance
from mono_quant.schemes import Affine
from tests.helpers import noise
from tests.kernels.cases import CPU

UNITS = 160
pytestmark = [
    # The float layer says it too.
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
]
LAYERS: dict[str, Callable[[], nn.RNNBase]] = {
    "LSTM": lambda: nn.LSTM(64, UNITS, num_layers=2, bidirectional=True),
    "projected LSTM": lambda: nn.LSTM(64, 640, proj_size=UNITS),
    "GRU": lambda: nn.GRU(64, UNITS, bias=False),
    "RNN": lambda: nn.RNN(64, 512, nonlinearity="relu"),
}
each_layer = pytest.mark.parametrize("name", LAYERS)

GRIDS = {
    "dynamic": Quantizer().activations("dynamic"),
    "dynamic symmetric": Quantizer().activations("dynamic", symmetric=True),
    "dynamic of all rows": Quantizer().activations("dynamic", granularity="tensor"),
    "dynamic 6-bit": Quantizer().activations("dynamic", bits=6),
    "asymmetric weight": Quantizer().activations("dynamic").asymmetric(),
    "static": Quantizer().activations("static"),
    "static symmetric": Quantizer().activations("static", symmetric=True),
}


def quantized(name: str, grid: str) -> nn.Module:
    torch.manual_seed(0)
    quantizer = GRIDS[grid].bits(8)
    if "static" in grid:
        quantizer = quantizer.fit([noise(9, 4, 64)])
    return quantizer.apply(LAYERS[name]()).model


def outputs(model: nn.Module, x: Tensor | PackedSequence) -> Tensor:
    output = model(x)[0]
    return output.data if isinstance(output, PackedSequence) else torch.as_tensor(output)


def recurrence(activation: Activation | None) -> Recurrence:
    h = torch.zeros(4, UNITS)
    return Recurrence("LSTM", (4, 4, 2), (h, h), activation=activation)


def spec_of(model: nn.Module, activation: Activation | None) -> KernelSpec:
    assert isinstance(model, QuantizedRecurrent)
    weight = model.packed_weights()["weight_hh_l0"]
    return KernelSpec(recurrence(activation), weight.scheme, weight.layout)


@each_layer
@pytest.mark.parametrize("grid", GRIDS)
@torch.no_grad()
def test_states_are_those_of_the_reference_but_for_a_code_of_h(name: str, grid: str) -> None:
    model = quantized(name, grid)
    steps = 63 if "6-bit" in grid else 255
    packed = pack_sequence([noise(n, 64, seed=n) for n in (7, 5, 1)])
    singles = [noise(9, 1, 64, seed=seed) for seed in (5, 6, 7, 8)]
    off = []
    given: list[Tensor | PackedSequence] = [noise(9, 4, 64), packed, *singles]
    for x in given:
        with kernels.use("reference"):
            expected = outputs(model, x)
        with kernels.use("integer"):
            found = outputs(model, x)
        # The sums are exact where those of floats round, so h may come to the neighbouring code,
        # and is off in all steps of the sample from there on.
        step = 2 * float(expected.abs().max()) / steps
        off.append((found - expected).abs().flatten() / step)
    assert torch.cat(off).max() <= 1
    assert torch.cat(off).mean() <= 1 / 20


@torch.no_grad()
def test_the_kernel_is_asked_for_each_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Recurrence] = []
    plain = IntegerSteps.__call__

    def seen(
        self: IntegerSteps, spec: KernelSpec, x: Tensor, weight: object, bias: Tensor | None
    ) -> Tensor:
        assert isinstance(spec.operation, Recurrence)
        calls.append(spec.operation)
        return plain(self, spec, x, weight, bias)  # type: ignore[arg-type]  # passed on

    monkeypatch.setattr(IntegerSteps, "__call__", seen)
    with kernels.use("integer"):
        quantized("LSTM", "dynamic")(noise(9, 4, 64))
    assert [call.reverse for call in calls] == [False, True, False, True]


ACTIVATIONS = {
    "per token": Activation(Affine(8, False, PerToken(), torch.float32)),
    "per token, symmetric": Activation(Affine(8, True, PerToken(), torch.float32)),
    "per tensor": Activation(Affine(8, False, PerTensor(), torch.float32)),
    "per tensor, 4-bit": Activation(Affine(4, False, PerTensor(), torch.float32)),
    "static": Activation(
        Affine(8, False, PerTensor(), torch.float32), torch.tensor(0.01), torch.tensor(90)
    ),
    "static, symmetric": Activation(
        Affine(8, True, PerTensor(), torch.float32), torch.tensor(0.01)
    ),
}
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)


@each_activation
@pytest.mark.parametrize("rows", [1, 5])
def test_codes_are_those_of_the_scheme_but_for_neighbours_on_a_half(
    activation: Activation, rows: int
) -> None:
    h = noise(rows, 3000) / 2
    codes = Codes.of(activation, h)
    for values in (h, h.abs(), -h.abs(), torch.zeros_like(h), h * 1e-30):
        codes.take(values)
        scheme = activation.scheme
        expected = scheme.quantize(values, activation.qparams(values)).codes.int()
        assert isinstance(scheme, Affine)
        off = codes.codes.int() - (128 if scheme.symmetric else 0) - expected
        assert off.abs().max() <= 1
        assert (off != 0).float().mean() < 1e-3


@each_activation
@pytest.mark.parametrize("cell", GATES)
@pytest.mark.parametrize("rows", [1, 5])
@torch.no_grad()
def test_a_step_is_that_of_the_formulas_on_what_the_codes_mean(
    activation: Activation, cell: str, rows: int
) -> None:
    torch.manual_seed(0)
    source = nn.Linear(UNITS, GATES[cell] * UNITS)
    layer: nn.Module = Quantizer().only("*").apply(source).model
    assert isinstance(layer, QuantizedLayer)
    weight = layer.packed_weights()["weight"]
    h, c = noise(rows, UNITS, seed=1) / 3, noise(rows, UNITS, seed=2)
    inputs = noise(rows, GATES[cell] * UNITS, seed=3)
    states = (h, c) if cell == "LSTM" else (h,)
    for bias in (source.bias, None):
        step = IntegerStep(cell, factor_of(weight, bias), activation, h)
        met = activation.fake_quantize(h).double()
        hidden = met @ weight.dequantize(torch.float64).t()
        if bias is not None:
            hidden = hidden + bias
        given = tuple(state.double() for state in states)
        expected = advance(cell, inputs.double(), hidden, given)
        before = [tensor.clone() for tensor in (inputs, *states)]
        first = step(inputs, states)
        kept = [state.clone() for state in first]
        step(inputs, first)
        assert all(map(torch.equal, first, kept)), "a later step writes into none before"
        assert all(map(torch.equal, (inputs, *states), before))
        for found, right in zip(first, expected, strict=True):
            assert (found - right).abs().max() <= 0.02  # what a code is off makes of a gate
            assert (found - right).abs().mean() <= 1e-4


@pytest.mark.parametrize("grid", ["dynamic", "static"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@torch.no_grad()
def test_what_is_not_finite_stays_in_its_sample(grid: str, value: float) -> None:
    model, x = quantized("GRU", grid), noise(9, 3, 64)
    h = noise(1, 3, UNITS) / 3
    with kernels.use("integer"):
        whole = model(x, h)[0]
        h[0, 1, 7] = value
        found = model(x, h)[0]
    with kernels.use("reference"):
        expected = model(x, h)[0]
    assert not expected[:, 1].isfinite().all()
    assert torch.equal(found.isfinite(), expected.isfinite())
    for other in (0, 2):
        assert (found[:, other] - whole[:, other]).abs().max() < 0.02


def test_scales_of_half_precision_are_not_found_in_place() -> None:
    model = quantized("GRU", "dynamic")
    halves = Activation(Affine(8, False, PerToken(), torch.float16))
    assert not knows(halves)
    x = noise(10, 3 * UNITS)
    assert isinstance(model, QuantizedRecurrent)
    weight = model.packed_weights()["weight_hh_l0"]
    operation = Recurrence("GRU", (4, 4, 2), (noise(4, UNITS) / 3,), activation=halves)
    spec = KernelSpec(operation, weight.scheme, weight.layout)
    found = IntegerSteps()(spec, x, weight, None)
    torch.testing.assert_close(found, operation(x, weight, None), rtol=0, atol=0.02)


def test_float_h_other_operations_and_gradients_are_left_to_others() -> None:
    model, kernel = quantized("GRU", "dynamic"), IntegerSteps()
    activation = Activation(Affine(8, symmetric=False))
    spec = spec_of(model, activation)
    assert kernel.supports(spec_of(model, None), CPU, torch.float32) == "h stays float"
    assert kernel.supports(spec, CPU, torch.float64) == "inputs are torch.float64"
    product = KernelSpec(MatrixProduct(), spec.scheme, spec.layout, activation)
    assert kernel.supports(product, CPU, torch.float32) == (
        "it is a MatrixProduct, not a recurrence"
    )
    followed = noise(10, 3 * UNITS).requires_grad_()
    with kernels.use("integer"):
        assert select(spec, CPU, torch.float32, 4, followed) is REFERENCE


def test_gradients_reach_the_inputs_and_the_first_states() -> None:
    model = quantized("GRU", "dynamic")
    x, h = noise(5, 4, 64).requires_grad_(), noise(1, 4, UNITS).requires_grad_()
    with kernels.use("integer"):
        model(x, h)[0].sum().backward()
    for tensor in (x, h):
        assert tensor.grad is not None
        assert tensor.grad.abs().max() > 0


@torch.no_grad()
def test_what_is_fastest_is_measured_against_decoding_once() -> None:
    model = quantized("GRU", "dynamic")
    spec = spec_of(model, Activation(Affine(8, symmetric=False)))
    assert select(spec, CPU, torch.float32, 4) in (REFERENCE, *kernels.KERNELS)
    with kernels.use("reference"):
        assert select(spec, CPU, torch.float32, 4) is REFERENCE
