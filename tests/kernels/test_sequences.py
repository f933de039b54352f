"""Recurrent layers that step on integers, against the reference."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from mono_quant import Quantizer, kernels
from mono_quant.base import Activation, KernelSpec
from mono_quant.kernels import REFERENCE, IntegerSteps, select
from mono_quant.modules import QuantizedRecurrent
from mono_quant.operations import MatrixProduct
from mono_quant.recurrence import Recurrence
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


def quantized(name: str, mode: str) -> nn.Module:
    torch.manual_seed(0)
    quantizer = Quantizer().bits(8).activations(mode)
    if mode == "static":
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
@pytest.mark.parametrize("mode", ["dynamic", "static"])
@torch.no_grad()
def test_states_are_those_of_the_reference_but_for_a_code_of_h(name: str, mode: str) -> None:
    model = quantized(name, mode)
    for x in (noise(9, 4, 64), pack_sequence([noise(n, 64, seed=n) for n in (7, 5, 1)])):
        with kernels.use("reference"):
            expected = outputs(model, x)
        with kernels.use("integer"):
            found = outputs(model, x)
        # The sums are exact where those of floats round, so h may come to the neighbouring code.
        step = 2 * float(expected.abs().max()) / 255
        assert (found - expected).abs().max() <= step
        assert (found - expected).abs().mean() <= step / 20


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
