"""What quantizers say of the rows that a weight meets: its product with them is the layer's."""

import pytest
import torch
from torch import Tensor, nn

from mono_quant.base import LayerQuantizer
from mono_quant.layers import BUILT_IN_LAYERS
from tests.helpers import noise

CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d": (nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 11)),
    "1d grouped, dilated": (nn.Conv1d(6, 9, 3, padding=2, dilation=2, groups=3), (2, 6, 11)),
    "2d": (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0)), (2, 4, 7, 8)),
    "2d same": (nn.Conv2d(4, 6, (3, 5), padding="same", dilation=2), (2, 4, 7, 8)),
    "2d reflecting": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 8)),
    "2d depthwise": (nn.Conv2d(5, 10, 3, groups=5), (2, 5, 7, 8)),
    "2d of one sample": (nn.Conv2d(4, 6, 3), (4, 7, 8)),
    "3d": (nn.Conv3d(2, 4, 2, stride=2, dilation=2, groups=2), (2, 2, 6, 7, 8)),
    "transposed 1d": (nn.ConvTranspose1d(6, 4, 3, stride=2, padding=1), (2, 6, 7)),
    "transposed 2d": (
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        (2, 4, 5, 6),
    ),
    "transposed 2d, cut": (nn.ConvTranspose2d(4, 6, 3, padding=3, dilation=1), (1, 4, 9, 9)),
    "transposed 3d": (nn.ConvTranspose3d(2, 3, 2, stride=3, dilation=2), (1, 2, 3, 4, 3)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_rows_of_a_convolution_times_its_weight_are_its_output(name: str) -> None:
    layer, shape = CONVOLUTIONS[name]
    layer, x = layer.double(), noise(*shape).double()
    found = product(quantizer_of(layer), layer, x)  # [G, n, out / G]
    output = layer(x)
    channel = output.dim() - len(shape) + (1 if name != "2d of one sample" else 0)
    positions = output.movedim(channel, -1).flatten(0, -2)  # [n, out]
    bias = layer.get_parameter("bias")
    torch.testing.assert_close(found.movedim(0, 1).flatten(1) + bias, positions)


def test_the_rows_of_a_linear_times_its_weight_are_its_output() -> None:
    layer, x = nn.Linear(6, 4, bias=False).double(), noise(2, 3, 6).double()
    found = product(quantizer_of(layer), layer, x)[0]
    torch.testing.assert_close(found, layer(x).flatten(0, 1))


def product(maker: LayerQuantizer, layer: nn.Module, x: Tensor) -> Tensor:
    """Return the rows of an input times those of the weight, [G, n, out / G]."""
    ((name, met),) = maker.inputs(layer, (x,), {})
    rows = maker.rows(layer, name, met)
    assert rows is not None
    view = maker.weights(layer)[name]
    stack = view.layout.to_stack(view.native.detach())
    return (rows if rows.dim() == 3 else rows[None]) @ stack.mT


def quantizer_of(layer: nn.Module) -> LayerQuantizer:
    return next(one for one in BUILT_IN_LAYERS if one.matches(layer))
