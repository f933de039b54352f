"""Transposed convolutions against the float layer on the dequantized weight."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mono_quant import Quantizer
from mono_quant.modules import QuantizedConvTranspose2d
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
    nn.ConvTranspose1d: (7,),
    nn.ConvTranspose2d: (7, 5),
    nn.ConvTranspose3d: (3, 4, 5),
}
CASES: dict[str, Make] = {
    "1d": lambda: nn.ConvTranspose1d(8, 12, 3),
    "1d everything": lambda: nn.ConvTranspose1d(
        8, 12, 4, stride=3, padding=2, output_padding=2, dilation=2
    ),
    "1d groups": lambda: nn.ConvTranspose1d(8, 12, 3, groups=4, bias=False),
    "1d depthwise": lambda: nn.ConvTranspose1d(8, 8, 4, stride=2, padding=1, groups=8),
    "2d": lambda: nn.ConvTranspose2d(8, 12, 3),
    "2d uneven": lambda: nn.ConvTranspose2d(
        8, 12, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), dilation=(1, 2)
    ),
    "2d groups": lambda: nn.ConvTranspose2d(8, 12, 3, stride=2, groups=2),
    "2d depthwise, three outputs each": lambda: nn.ConvTranspose2d(4, 12, 3, groups=4),
    "3d": lambda: nn.ConvTranspose3d(4, 6, 3),
    "3d everything": lambda: nn.ConvTranspose3d(
        4, 6, (2, 3, 1), stride=2, padding=(0, 1, 0), output_padding=1, groups=2
    ),
}


def input_of(layer: nn.Module, dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensor:
    """Return a batch of inputs for a transposed convolution."""
    assert isinstance(layer, nn.modules.conv._ConvTransposeNd)
    size = next(SIZES[kind] for kind in type(layer).__mro__ if kind in SIZES)
    return torch.randn(batch, layer.in_channels, *size, dtype=dtype)


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_transposed_convolution_computes_what_the_float_layer_does_on_the_dequantized_weight(
    make: Make, grid: Quantizer
) -> None:
    source = make()
    assert_like_float(quantized(source, grid), source, input_of(source))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["1d groups", "2d uneven", "3d"])
def test_transposed_convolution_in_every_dtype(name: str, bits: int, dtype: torch.dtype) -> None:
    source = CASES[name]().to(dtype)
    assert_like_float(quantized(source, WEIGHTS_ONLY.bits(bits)), source, input_of(source, dtype))


@pytest.mark.parametrize("group_size", [3, 6, 9, 18])
def test_groups_of_values_run_along_what_reaches_one_output_channel(group_size: int) -> None:
    source = nn.ConvTranspose1d(12, 10, 3, groups=2)
    model = quantized(source, Quantizer().bits(4).group_size(group_size))
    assert_like_float(model, source, input_of(source))


@pytest.mark.parametrize("size", [15, 16])
def test_the_output_size_argument_chooses_among_the_possible_ones(size: int) -> None:
    source = nn.ConvTranspose1d(8, 12, 3, stride=2)
    model = quantized(source)
    x = input_of(source)
    found = model(x, output_size=[size])
    assert found.shape == (2, 12, size)
    assert_near(found, oracle(model, source)(x.to(torch.float64), output_size=[size]))


def test_an_output_size_that_cannot_be_is_refused() -> None:
    source = nn.ConvTranspose2d(8, 12, 3, stride=2)
    with pytest.raises(ValueError, match="requested an output size"):
        quantized(source)(input_of(source), output_size=[40, 40])


@pytest.mark.parametrize("name", ["1d", "2d groups", "3d"])
def test_an_empty_batch_is_taken(name: str) -> None:
    source = CASES[name]()
    assert_like_float(quantized(source), source, input_of(source, batch=0))


def test_an_input_without_a_batch_dimension_is_taken() -> None:
    source = nn.ConvTranspose2d(8, 12, 3, stride=2, output_padding=1)
    assert_like_float(quantized(source), source, input_of(source)[0])


def test_weights_and_inputs_that_are_views_are_taken() -> None:
    source = nn.ConvTranspose2d(8, 12, 3, groups=2)
    source.weight = nn.Parameter(torch.randn(6, 8, 3, 3).transpose(0, 1))
    assert not source.weight.is_contiguous()
    x = torch.randn(5, 7, 8, 2).permute(3, 2, 1, 0)
    for bits in (4, 8):
        assert_like_float(quantized(source, WEIGHTS_ONLY.bits(bits)), source, x)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_each_output_channel_of_each_group_has_a_scale(groups: int) -> None:
    model = quantized(nn.ConvTranspose2d(8, 16, 3, groups=groups))
    assert type(model) is QuantizedConvTranspose2d
    scale = model.packed_weights()["weight"].tensors["scale"]
    assert scale.shape == (groups, 16 // groups, 1)
