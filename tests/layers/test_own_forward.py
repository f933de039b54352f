"""Subclasses whose forward changes the input: inputs are calibrated where they are quantized."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mono_quant import QuantizationResult, Quantizer, SlowPathWarning
from mono_quant.evidence import LayerReport
from mono_quant.layers import LinearQuantizer
from mono_quant.modules import QuantizedLayer


class Scales(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * 10)


class ScalesInside(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found: Tensor = super()._conv_forward(input * 10, weight, bias)
        return found


class ScalesTransposed(nn.ConvTranspose2d):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(input * 10, output_size)


class ScalesRows(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * 10)


class Places(nn.Conv2d):
    """Appends a channel that its input does not have."""

    def forward(self, input: Tensor) -> Tensor:
        place = torch.linspace(-20, 20, input.shape[-1]).expand_as(input[:, :1])
        return super().forward(torch.cat([input, place], 1))


class Multiplies(nn.Conv2d):
    """Does not ask its parent."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.conv2d(input, self.weight, self.bias)


class Standardizes(nn.Conv2d):
    """Hands on a weight of its own."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found: Tensor = super()._conv_forward(input, weight - weight.mean(), bias)
        return found


class Centers(nn.Conv2d):
    """Hands on a weight of its own from its forward."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean()
        found: Tensor = self._conv_forward(input, weight, self.bias)
        return found


class Asks(nn.Conv2d):
    """Hands on its weight from its forward."""

    def forward(self, input: Tensor) -> Tensor:
        found: Tensor = self._conv_forward(input * 10, self.weight, self.bias)
        return found


class Counts(nn.Conv2d):
    """Hands on its weight and counts."""

    def __init__(self) -> None:
        super().__init__(3, 8, 3, padding=4, padding_mode="reflect")
        self.register_buffer("calls", torch.zeros(()))

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self.get_buffer("calls").add_(1)
        assert not self.training
        found: Tensor = super()._conv_forward(input, weight, bias)
        return found


class Normalizes(nn.Conv2d):
    """Hands on its weight to a module inside it, which has statistics."""

    def __init__(self) -> None:
        super().__init__(3, 8, 3)
        self.norm = nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(8))

    def forward(self, input: Tensor) -> Tensor:
        found: Tensor = self.norm(self._conv_forward(input, self.weight, self.bias))
        return found


class Borrows(nn.Conv2d):
    """Convolves with another layer's weight."""

    def __init__(self, lender: nn.Conv2d) -> None:
        super().__init__(3, 8, 3)
        self.lender = [lender]

    def forward(self, input: Tensor) -> Tensor:
        found: Tensor = self._conv_forward(input, self.lender[0].weight, self.bias)
        return found


class Conditioned(nn.Conv2d):
    """Takes more than an input."""

    def forward(self, input: Tensor, gain: Tensor) -> Tensor:  # type: ignore[override]  # so it is
        found: Tensor = self._conv_forward(input * gain, self.weight, self.bias)
        return found


STATIC = Quantizer().activations("static").layer(LinearQuantizer(own_forward=True))
BY_MODE = {"static": Quantizer(), "dynamic": Quantizer().activations("dynamic")}
"""Static by default where there is data: asked for, it would be an error of these layers."""
PAIRS: dict[str, tuple[nn.Module, nn.Module]] = {
    "conv": (Scales(3, 8, 3), nn.Conv2d(3, 8, 3)),
    "conv, inside": (ScalesInside(3, 8, 3), nn.Conv2d(3, 8, 3)),
    "conv, asked": (Asks(3, 8, 3), nn.Conv2d(3, 8, 3)),
    "conv, parametrized": (
        nn.utils.parametrizations.weight_norm(Scales(3, 8, 3)),
        nn.Conv2d(3, 8, 3),
    ),
    "transposed": (ScalesTransposed(3, 8, 3), nn.ConvTranspose2d(3, 8, 3)),
    "linear": (ScalesRows(8, 4), nn.Linear(8, 4)),
}


def only_row(result: QuantizationResult[nn.Sequential]) -> LayerReport:
    """Return what is said of the one weight."""
    (row,) = result.report.quantized
    return row


def grid_of(layer: nn.Module, data: Tensor) -> tuple[Tensor, ...]:
    """Return the calibrated scale and zero point."""
    quantized = STATIC.fit(data).apply(nn.Sequential(layer).eval()).model[0]
    assert isinstance(quantized, QuantizedLayer)
    return tuple(quantized.activations()["weight"].tensors.values())


@pytest.mark.filterwarnings("ignore::mono_quant.SlowPathWarning")
@pytest.mark.parametrize("name", PAIRS)
def test_the_range_is_that_of_what_the_product_is_given(name: str) -> None:
    own, plain = PAIRS[name]
    x = torch.randn(4, 3, 8, 8)
    found, expected = grid_of(own, x), grid_of(plain, 10 * x)
    assert len(found) == len(expected) == 2
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_channels_that_the_forward_adds_are_seen(mode: str) -> None:
    model = nn.Sequential(Places(4, 16, 3)).eval()
    result = Quantizer().activations(mode).fit(torch.randn(4, 3, 16, 16)).apply(model)
    row = only_row(result)
    assert (row.output_sqnr_db or 0) > 35
    assert row.inputs[0].high == 20


def test_a_graph_rounds_what_the_product_is_given() -> None:
    model = nn.Sequential(Scales(3, 16, 3)).eval()
    result = Quantizer().fit(torch.randn(4, 3, 16, 16)).graph().apply(model)
    assert (result.report.output_sqnr_db or 0) > 35


def test_hooks_of_the_layer_are_called_once_for_a_batch() -> None:
    layer, calls = Scales(3, 8, 3), 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    layer.register_forward_hook(count)
    plan = STATIC.fit(torch.randn(2, 3, 8, 8)).plan(nn.Sequential(layer).eval())
    plain = nn.Conv2d(3, 8, 3)
    plan.run()
    own, calls = calls, 0
    plain.register_forward_hook(count)
    STATIC.fit(torch.randn(2, 3, 8, 8)).apply(nn.Sequential(plain).eval())
    assert own == calls > 0


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_a_forward_that_multiplies_itself_keeps_float_inputs_and_says_so(mode: str) -> None:
    model = nn.Sequential(Multiplies(3, 8, 3)).eval()
    plan = BY_MODE[mode].fit(torch.randn(2, 3, 8, 8)).plan(model)
    with pytest.warns(SlowPathWarning):
        row = only_row(plan.run())
    said = "float inputs: the forward of Multiplies reads the weight and multiplies itself"
    assert row.activation == said


def calls_of_kernels(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return how often one call of a model asks for a kernel."""
    calls, run = 0, QuantizedLayer.run

    def counted(self: QuantizedLayer, *args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        return run(self, *args, **kwargs)  # type: ignore[arg-type]  # handed on as they came

    monkeypatch.setattr(QuantizedLayer, "run", counted)
    model(x)
    return calls


@pytest.mark.filterwarnings("ignore::mono_quant.SlowPathWarning")
@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("cls", [Standardizes, Centers])
@pytest.mark.parametrize("parametrized", [False, True])
def test_inputs_that_meet_another_weight_are_float_and_the_plan_says_why(
    cls: type[nn.Conv2d], mode: str, parametrized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = cls(3, 8, 3)
    if parametrized:
        layer = nn.utils.parametrizations.weight_norm(layer)
    model, x = nn.Sequential(layer).eval(), torch.randn(2, 3, 8, 8)
    plan = BY_MODE[mode].fit(x).plan(model)
    said = f"float inputs: {type(layer).__name__} convolves with a weight that it computes itself"
    assert plan.outline.report.quantized[0].activation == said
    result = plan.run()
    assert only_row(result).activation == said
    assert only_row(result).inputs == ()
    assert calls_of_kernels(result.model, x, monkeypatch) == 0


@pytest.mark.filterwarnings("ignore::mono_quant.SlowPathWarning")
@pytest.mark.parametrize("layer", [Asks(3, 8, 3), ScalesInside(3, 8, 3), Counts()], ids=type)
def test_inputs_that_meet_the_weight_handed_on_are_quantized(
    layer: nn.Conv2d, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = nn.Sequential(layer).eval(), torch.randn(2, 3, 8, 8)
    result = STATIC.fit(x).apply(model)
    assert (only_row(result).activation or "").startswith("static")
    assert calls_of_kernels(result.model, x, monkeypatch) == 1


def test_a_plan_changes_nothing_of_a_layer_that_it_tries() -> None:
    layer = Counts().train()
    plan = Quantizer().activations("dynamic").plan(nn.Sequential(layer))
    assert (plan.outline.report.quantized[0].activation or "").startswith("dynamic")
    assert layer.training
    assert layer.get_buffer("calls") == 0


def test_a_plan_changes_nothing_inside_a_layer_that_it_tries() -> None:
    model = nn.Sequential(Normalizes().train())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = Quantizer().activations("dynamic").only("*").plan(model)
    assert (plan.outline.report.quantized[0].activation or "").startswith("dynamic")
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.filterwarnings("ignore::mono_quant.SlowPathWarning")
@pytest.mark.parametrize("compiled", [False, True])
def test_the_weight_of_another_layer_stays_that_layers(compiled: bool) -> None:
    quantizer, x = Quantizer().activations(None).only("*"), torch.randn(2, 3, 8, 8)
    lender = quantizer.apply(nn.Conv2d(3, 8, 3)).model
    borrower = quantizer.apply(Borrows(lender)).model
    borrower.lender = [lender]
    expected = functional.conv2d(x, lender.weight, borrower.bias)
    torch.compiler.reset()
    forward = torch.compile(borrower, backend="eager") if compiled else borrower
    with torch.no_grad():
        torch.testing.assert_close(forward(x), expected)


def test_a_layer_that_cannot_be_tried_keeps_float_inputs_and_says_why() -> None:
    (row,) = Quantizer().plan(nn.Sequential(Conditioned(3, 8, 3))).outline.report.quantized
    assert "float inputs: what reaches the weight is not known: Conditioned" in str(row.activation)
    assert "missing 1 required positional argument: 'gain'" in str(row.activation)


@pytest.mark.filterwarnings("ignore::mono_quant.SlowPathWarning")
@pytest.mark.parametrize(
    "layer", [Asks(3, 8, 3), ScalesInside(3, 8, 3), Standardizes(3, 8, 3)], ids=type
)
def test_what_a_forward_hands_on_is_the_same_when_compiled(layer: nn.Conv2d) -> None:
    x = torch.randn(2, 3, 8, 8)
    model = Quantizer().fit(x).apply(nn.Sequential(layer).eval()).model
    torch.compiler.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="eager")(x), model(x))


@pytest.mark.filterwarnings("ignore::mono_quant.SlowPathWarning")
@pytest.mark.parametrize("cls", [Asks, ScalesInside])
def test_layers_of_one_class_share_what_is_compiled(cls: type[nn.Conv2d]) -> None:
    x = torch.randn(2, 3, 8, 8)
    layers = [cls(3, 3, 1) for _ in range(10)]  # more than torch compiles a function anew
    model = Quantizer().fit(x).only("*").apply(nn.Sequential(*layers).eval()).model
    torch.compiler.reset()
    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        assert torch.equal(torch.compile(model, backend="eager")(x), model(x))
