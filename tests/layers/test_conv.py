"""Convolutions of 1 to 3 dimensions against the float layer on the dequantized weight."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mono_quant import Quantizer, SlowPathWarning
from mono_quant.modules import QuantizedConv1d, QuantizedConv2d, QuantizedConv3d
from tests.helpers import (
    GRIDS,
    TOLERANCES,
    WEIGHTS_ONLY,
    assert_like_float,
    assert_near,
    oracle,
    quantized,
)

Make = Callable[[], nn.Module]
SIZES: dict[type[nn.Module], tuple[int, ...]] = {
    nn.Conv1d: (11,),
    nn.Conv2d: (11, 9),
    nn.Conv3d: (7, 8, 6),
}
CASES: dict[str, Make] = {
    "conv1d": lambda: nn.Conv1d(8, 12, 3),
    "conv1d stride, padding, dilation": lambda: nn.Conv1d(8, 12, 3, 2, 2, 2),
    "conv1d same": lambda: nn.Conv1d(8, 12, 3, padding="same"),
    "conv1d same, even kernel": lambda: nn.Conv1d(8, 12, 4, padding="same"),
    "conv1d valid": lambda: nn.Conv1d(8, 12, 3, padding="valid"),
    "conv1d reflect": lambda: nn.Conv1d(8, 12, 3, padding=2, padding_mode="reflect"),
    "conv1d circular, same, dilation": lambda: nn.Conv1d(
        8, 12, 4, padding="same", padding_mode="circular", dilation=2
    ),
    "conv1d replicate": lambda: nn.Conv1d(8, 12, 3, padding=1, padding_mode="replicate"),
    "conv1d groups": lambda: nn.Conv1d(8, 12, 3, groups=4),
    "conv1d depthwise": lambda: nn.Conv1d(8, 8, 3, padding=1, groups=8),
    "conv1d depthwise, two outputs each": lambda: nn.Conv1d(8, 16, 3, groups=8, bias=False),
    "conv1d pointwise": lambda: nn.Conv1d(8, 12, 1),
    "conv2d": lambda: nn.Conv2d(8, 12, 3),
    "conv2d everything uneven": lambda: nn.Conv2d(
        8, 12, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(2, 1)
    ),
    "conv2d same": lambda: nn.Conv2d(8, 12, 3, padding="same", dilation=2),
    "conv2d reflect": lambda: nn.Conv2d(8, 12, 3, padding=(2, 1), padding_mode="reflect"),
    "conv2d circular, stride": lambda: nn.Conv2d(
        8, 12, 3, stride=2, padding=1, padding_mode="circular"
    ),
    "conv2d groups": lambda: nn.Conv2d(8, 12, 3, groups=2, bias=False),
    "conv2d depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "conv3d": lambda: nn.Conv3d(4, 6, 3),
    "conv3d everything": lambda: nn.Conv3d(
        4, 6, (3, 2, 1), stride=(1, 2, 1), padding=(1, 0, 2), dilation=(1, 2, 1), groups=2
    ),
    "conv3d same": lambda: nn.Conv3d(4, 6, 3, padding="same"),
    "conv3d circular": lambda: nn.Conv3d(4, 6, 3, padding=1, padding_mode="circular"),
    "conv3d depthwise": lambda: nn.Conv3d(4, 4, 3, groups=4),
}


def input_of(layer: nn.Module, dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensor:
    """Return a batch of inputs for a convolution."""
    assert isinstance(layer, nn.modules.conv._ConvNd)
    size = next(SIZES[kind] for kind in type(layer).__mro__ if kind in SIZES)
    return torch.randn(batch, layer.in_channels, *size, dtype=dtype)


class PadsFirst(nn.Conv2d):
    """Pads as a mobile network does, then convolves as its parent."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(functional.pad(input, (0, 1, 0, 1), value=0.5))


class Standardized(nn.Conv2d):
    """Convolves with a standardized weight."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return functional.conv2d(input, weight, self.bias)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
@pytest.mark.parametrize("bits", [3, 4, 8, 16])
def test_convolution_computes_what_the_float_layer_does_on_the_dequantized_weight(
    make: Make, bits: int
) -> None:
    source = make()
    assert_like_float(quantized(source, WEIGHTS_ONLY.bits(bits)), source, input_of(source))


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", ["conv1d groups", "conv2d reflect", "conv3d"])
def test_convolution_in_every_dtype(name: str, grid: Quantizer, dtype: torch.dtype) -> None:
    source = CASES[name]().to(dtype)
    assert_like_float(quantized(source, grid), source, input_of(source, dtype))


@pytest.mark.parametrize("name", ["conv1d", "conv2d circular, stride", "conv3d"])
def test_an_empty_batch_is_taken(name: str) -> None:
    source = CASES[name]()
    assert_like_float(quantized(source), source, input_of(source, batch=0))


@pytest.mark.parametrize("name", ["conv1d same", "conv2d groups", "conv3d"])
def test_an_input_without_a_batch_dimension_is_taken(name: str) -> None:
    source = CASES[name]()
    assert_like_float(quantized(source), source, input_of(source)[0])


def test_weights_and_inputs_in_channels_last_order_are_taken() -> None:
    source = nn.Conv2d(8, 12, 3)
    source.weight = nn.Parameter(source.weight.detach().to(memory_format=torch.channels_last))
    assert not source.weight.is_contiguous()
    x = input_of(source).to(memory_format=torch.channels_last)
    assert_like_float(quantized(source), source, x)
    assert_like_float(quantized(source, Quantizer().bits(4)), source, x.transpose(2, 3))


def test_integer_inputs_are_refused_as_torch_refuses_them() -> None:
    model = quantized(nn.Conv1d(8, 12, 3, bias=False))
    with pytest.raises((RuntimeError, TypeError)):
        model(torch.ones(2, 8, 5, dtype=torch.int64))


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_each_output_channel_of_each_group_has_a_scale(groups: int) -> None:
    model = quantized(nn.Conv2d(8, 16, 3, groups=groups))
    assert isinstance(model, QuantizedConv2d)
    scale = model.packed_weights()["weight"].tensors["scale"]
    assert scale.shape == (groups, 16 // groups, 1)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        (nn.Conv1d(8, 12, 3), QuantizedConv1d),
        (nn.Conv2d(8, 12, 3), QuantizedConv2d),
        (nn.Conv3d(8, 12, 3), QuantizedConv3d),
    ],
    ids=["1d", "2d", "3d"],
)
def test_the_result_is_a_convolution_of_the_same_class(
    source: nn.Module, kind: type[nn.Module]
) -> None:
    model = quantized(source)
    assert type(model) is kind
    assert isinstance(model, type(source))


def test_a_subclass_that_pads_and_calls_its_parent_keeps_its_forward() -> None:
    source = PadsFirst(8, 12, 3)
    model = quantized(source)
    assert isinstance(model, PadsFirst)
    assert isinstance(model, QuantizedConv2d)
    x = input_of(source)
    assert model(x).shape == (2, 12, 10, 8)
    assert_like_float(model, source, x)


def test_a_subclass_that_reads_the_weight_gets_the_right_one_and_warns() -> None:
    source = Standardized(8, 12, 3)
    model = quantized(source)
    x = input_of(source)
    expected = oracle(model, source)(x.to(torch.float64))
    with pytest.warns(SlowPathWarning, match="QuantizedStandardized was read by attribute"):
        found = model(x)
    assert_near(found, expected)
