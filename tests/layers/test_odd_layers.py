"""Layers that are not what their class says: computed right, or left float with the reason."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mono_quant import InputError, QuantizedLayer, Quantizer
from tests.helpers import (
    WEIGHTS_ONLY,
    assert_like_float,
    layer_rows,
    noise,
    same_bits,
    same_tensors,
)


class Same(nn.Conv2d):
    """Pads in `_conv_forward`, as torch lets a subclass do."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padded = functional.pad(input, (1, 1, 1, 1))
        found: Tensor = super()._conv_forward(padded, weight, bias)
        return found


class Standardized(nn.Conv2d):
    """Computes the weight that it convolves with."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std()
        found: Tensor = super()._conv_forward(input, weight, bias)
        return found


class Flagged(nn.Conv2d):
    """Has an attribute that a quantized layer might have been given."""

    def __init__(self) -> None:
        super().__init__(8, 16, 3)
        self.quantized = False

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * (0 if self.quantized else 1)


@pytest.mark.filterwarnings("ignore::mono_quant.SlowPathWarning")
@pytest.mark.parametrize("make", [Same, Standardized])
def test_a_convolution_of_a_subclass_keeps_its_own_conv_forward(
    make: Callable[[int, int, int], nn.Conv2d],
) -> None:
    source = make(8, 16, 3)
    model = WEIGHTS_ONLY.apply(source).model
    assert isinstance(model, QuantizedLayer)
    assert_like_float(model, source, noise(2, 8, 9, 9))


def test_a_flag_called_quantized_stays_what_it_is() -> None:
    source = Flagged()
    model = WEIGHTS_ONLY.apply(source).model
    assert model.quantized is False
    assert_like_float(model, source, noise(2, 8, 9, 9))


@pytest.mark.parametrize("name", ["quantized_weights", "quantized_inputs"])
@pytest.mark.parametrize("make", [nn.Linear, nn.LSTM, nn.GRUCell])
def test_a_layer_that_uses_a_name_of_ours_stays_float(
    make: Callable[[int, int], nn.Module], name: str
) -> None:
    source = nn.Sequential(make(64, 64))
    setattr(source[0], name, 3)
    rows = layer_rows(Quantizer(), source)
    assert {row.reason for at, row in rows.items() if "weight" in at} == {
        f"it has an attribute called {name}, which a quantized layer needs"
    }


@pytest.mark.filterwarnings("error")
def test_a_complex_weight_stays_float_and_runs() -> None:
    source = nn.Sequential(nn.Linear(64, 64, dtype=torch.cfloat))
    result = Quantizer().apply(source)
    assert result.report.layers[0].reason == "its weight is complex64"
    x = torch.randn(3, 64, dtype=torch.cfloat)
    assert torch.equal(result.model(x), source(x))


@pytest.mark.parametrize("layer", [nn.Linear(64, 64), nn.Conv1d(8, 64, 8), nn.Embedding(64, 64)])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_forward_replaced_on_the_object_is_not_passed_over(
    layer: nn.Module, in_place: bool
) -> None:
    layer = copy.deepcopy(layer)
    before = layer.forward

    def shifted(*args: Tensor) -> Tensor:
        found: Tensor = before(*args)
        return found + 1

    layer.forward = shifted
    model = nn.Sequential(layer)
    reason = "its forward was replaced on the object, and would not be asked"
    assert layer_rows(Quantizer(), model)["0.weight"].reason == reason
    if not in_place:
        with pytest.raises(InputError, match=r"forward of 0 was replaced.*apply_"):
            Quantizer().apply(model)
        return
    result = Quantizer().apply_(model)
    assert type(result.model[0]) is type(layer)
    assert not result.report.quantized


def test_a_pruned_layer_has_the_shape_of_its_weight() -> None:
    source = nn.Linear(64, 64)
    source.weight = nn.Parameter(source.weight.detach()[:32].clone())
    source.bias = nn.Parameter(source.bias.detach()[:32].clone())
    model = WEIGHTS_ONLY.apply(source).model
    assert_like_float(model, source, noise(3, 64))


def test_a_resized_embedding_has_the_shape_of_its_weight() -> None:
    source = nn.Embedding(20, 64)
    source.weight = nn.Parameter(noise(50, 64))
    model = WEIGHTS_ONLY.apply(source).model
    assert_like_float(model, source, torch.arange(50))


def test_a_weight_of_as_many_values_in_another_shape_keeps_its_shape() -> None:
    source = nn.Linear(64, 32, bias=False)
    source.weight = nn.Parameter(noise(64, 32))
    result = WEIGHTS_ONLY.apply(source)
    assert result.dequantize().weight.shape == (64, 32)
    assert_like_float(result.model, source, noise(3, 32))


@pytest.mark.parametrize(
    ("quantizer", "model"),
    [
        (Quantizer().scale_dtype(torch.float32), nn.Sequential(nn.Linear(1, 64))),
        (Quantizer().bits(16), nn.Sequential(nn.Linear(64, 64).bfloat16())),
        (Quantizer(), nn.Sequential(nn.Linear(64, 64).to(torch.float8_e4m3fn))),
    ],
    ids=["one column", "a cast of half precision", "float8"],
)
def test_a_weight_that_would_not_become_smaller_stays_float(
    quantizer: Quantizer, model: nn.Module
) -> None:
    assert layer_rows(quantizer, model)["0.weight"].reason == "it would not become smaller"
    assert same_tensors(quantizer.apply(model).model, model)
    asked = layer_rows(quantizer.only("0"), model)["0.weight"]
    assert asked.scheme is not None
    assert asked.bytes >= asked.float_bytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_half_precision_on_a_processor_is_computed_in_float32(
    dtype: torch.dtype, bits: int
) -> None:
    """And rounded once, at the end; some processors die of products in bfloat16."""
    linear, conv = nn.Linear(64, 16).to(dtype), nn.Conv1d(8, 16, 3).to(dtype)
    x, image = noise(5, 64).to(dtype), noise(2, 8, 9).to(dtype)
    quantizer = WEIGHTS_ONLY.bits(bits).only("*")
    one, other = quantizer.apply(linear).model, quantizer.apply(conv).model
    assert isinstance(one, QuantizedLayer)
    assert isinstance(other, QuantizedLayer)
    weight = one.packed_weights()["weight"].dequantize(torch.float32)
    expected = functional.linear(x.float(), weight, linear.bias.float())
    assert same_bits(one(x), expected.to(dtype))
    weight = other.packed_weights()["weight"].dequantize(torch.float32)
    assert conv.bias is not None
    expected = functional.conv1d(image.float(), weight, conv.bias.float())
    assert same_bits(other(image), expected.to(dtype))
