"""Weights with zero points: what the integer operators do not know is made up for."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mono_quant import Quantizer
from mono_quant.base import PackedTensor
from mono_quant.flow import integer_flow
from mono_quant.flow.arithmetic import signed_codes
from mono_quant.flow.layer import IntegerLayer
from mono_quant.numerics.metrics import sqnr_db
from tests.flow.marks import needs_integers
from tests.flow.models import Joined, ResNet, alive, static

ASYMMETRIC = Quantizer().asymmetric()
CONVOLUTIONS = {
    "plain": nn.Conv2d(6, 10, 3, padding=1),
    "pointwise": nn.Conv2d(6, 9, 1, bias=False),
    "depthwise": nn.Conv2d(6, 6, 3, padding=1, groups=6),
    "depthwise, one channel": nn.Conv2d(1, 1, 3, padding=1),
    "two of each": nn.Conv2d(6, 12, 3, groups=6, stride=2, padding=2, bias=False),
    "grouped": nn.Conv2d(6, 8, (3, 2), groups=2, padding=(2, 0), stride=(1, 2)),
    "dilated": nn.Conv2d(6, 4, 3, dilation=2, padding=2),
}


def shifted(layer: nn.Module) -> nn.Module:
    """Return a layer whose channels lie on one side of zero, or mostly: each has its zero point."""
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            if name.endswith("weight"):
                aside = torch.linspace(-1, 1, len(weight)).view(-1, *[1] * (weight.dim() - 1))
                weight.add_(aside * weight.abs().amax())
    return layer.eval()


def formula(layer: IntegerLayer, codes: Tensor) -> Tensor:
    """Return what a convolution or a product computes, from its definition in float64."""
    packed: PackedTensor = layer.weight
    q = packed.unpack()
    assert q.qparams.scale is not None
    assert q.qparams.zero_point is not None
    values = (q.codes.double() - q.qparams.zero_point.double()) * q.qparams.scale.double()
    weight = packed.layout.to_native(values)
    x = (codes.double() - layer.inputs.zero_point) * layer.inputs.scale
    bias = layer.bias.double() if layer.bias is not None else None
    if weight.dim() == 2:
        return functional.linear(x, weight, bias)
    place = vars(layer.operation)
    return functional.conv2d(x, weight, bias, **place)


def only_layer(model: nn.Module, path: str = "0") -> IntegerLayer:
    found = model.get_submodule(path)
    assert isinstance(found, IntegerLayer)
    assert found.in_float is None
    return found


@needs_integers
@torch.no_grad()
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_convolution_is_the_float64_formula(name: str, bits: int) -> None:
    conv = shifted(CONVOLUTIONS[name])
    shape = (2, 1 if "one channel" in name else 6, 9, 8)
    model = nn.Sequential(conv, nn.Conv2d(conv.out_channels, 2, 1))  # type: ignore[arg-type]  # of a convolution
    kept, _ = static(model, *shape, quantizer=ASYMMETRIC.bits(bits))
    layer = only_layer(integer_flow(kept).model)
    zeros = layer.weight.qparams.zero_point
    assert zeros is not None
    assert int(zeros.max()) > int(zeros.min()) or zeros.numel() == 1
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    exact, output = formula(layer, codes), layer.output
    assert output is not None
    wanted = (exact / output.scale + output.zero_point).round().clamp(0, 255)
    apart = (layer(codes).double() - wanted).abs()
    assert apart.max() <= 1
    assert (apart > 0).double().mean() < 5e-3, "only where a value lies on a half"
    layer.output = None
    reach = formula(layer, codes).abs().max()  # sums of both signs cancel
    torch.testing.assert_close(layer(codes).double(), exact, rtol=0, atol=float(reach) * 2e-5)
    torch.testing.assert_close(layer(codes[0]), layer(codes)[0], rtol=0, atol=1e-5)


@needs_integers
@torch.no_grad()
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7)])
def test_a_linear_layer_is_the_float64_formula(shape: tuple[int, ...]) -> None:
    model = shifted(nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 3)))
    kept, _ = static(model, 16, 7, quantizer=ASYMMETRIC)
    layer = only_layer(integer_flow(kept).model)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    exact, output = formula(layer, codes), layer.output
    assert output is not None
    wanted = (exact / output.scale + output.zero_point).round().clamp(0, 255)
    assert (layer(codes).double() - wanted).abs().max() <= 1
    layer.output = None
    torch.testing.assert_close(layer(codes).double(), exact, rtol=1e-5, atol=1e-5)


@needs_integers
def test_codes_are_within_one_of_the_reference_through_a_network() -> None:
    kept, x = static(Joined(), 2, 3, 17, 22, quantizer=ASYMMETRIC)
    flow = integer_flow(kept)
    assert not any("computed in float" in line for line in flow.lines)
    exact = integer_flow(kept, reference=True).model
    with torch.no_grad():
        codes = torch.randint(0, 256, x.shape, dtype=torch.uint8)
        one, other = (model.get_submodule("stem")(codes) for model in (flow.model, exact))
        assert (one.int() - other.int()).abs().max() <= 1
        assert sqnr_db(exact(x), flow.model(x)) > 40


def test_shortcuts_are_added_before_rounding() -> None:
    model = alive(ResNet())
    kept, x = static(model, 4, 3, 64, 64, quantizer=ASYMMETRIC)
    flow = integer_flow(kept)
    assert sum("added" in line for line in flow.lines) > 0
    reference = integer_flow(kept, reference=True).model
    with torch.no_grad():
        exact = model(x)
        assert sqnr_db(exact, flow.model(x)) > sqnr_db(exact, reference(x)) - 0.5


@torch.no_grad()
def test_an_addition_that_broadcasts_is_computed_too() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 1, 1)
            self.last = nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.one(x) + self.two(x).relu())
            return out

    kept, x = static(shifted(Scaled()), 2, 3, 9, 9, quantizer=ASYMMETRIC)
    found, expected = integer_flow(kept).model(x), integer_flow(kept, reference=True).model(x)
    assert sqnr_db(expected, found) > 35


@needs_integers
def test_an_output_grid_of_fewer_bits_is_kept_to() -> None:
    quantizer = ASYMMETRIC.activations("static", bits=4)
    data = [torch.randn(4, 8) for _ in range(3)]
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    kept = quantizer.only("*").fit(data).apply(model, progress=False).model
    layer = only_layer(integer_flow(kept).model)
    codes = layer(torch.randint(0, 16, (64, 8), dtype=torch.uint8))
    assert (int(codes.min()), int(codes.max())) == (0, 15)


def test_signed_bytes_are_a_way_to_unsigned_ones() -> None:
    values = torch.tensor([-1e9, -128.6, -128, -127.5, -0.5, 0.5, 1.5, 126.6, 200])
    expected = (values.double().round() + 128).clamp(0, 255).to(torch.uint8)
    assert torch.equal(signed_codes(values.clone(), 255), expected)
    assert int(signed_codes(values.clone(), 15).max()) == 15
