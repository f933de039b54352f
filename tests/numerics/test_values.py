"""A layout reads a native weight as rows, each of them what one output channel sees."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mono_quant import ConvQuantizer, ConvTransposeQuantizer, LinearQuantizer
from mono_quant.numerics.values import Layout, QParams, QTensor, WeightView
from tests.helpers import noise

KERNELS = st.lists(st.integers(1, 3), max_size=3).map(tuple)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Draw a layout of a linear layer or a convolution, plain or transposed."""
    groups = draw(st.integers(1, 4))
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    kernel = draw(KERNELS)
    if draw(st.booleans()):
        return Layout.grouped((groups * rows, columns, *kernel), groups)
    return Layout.transposed((groups * columns, rows, *kernel), groups)


@given(layouts())
def test_native_and_stack_are_each_others_inverse(layout: Layout) -> None:
    weight = torch.arange(torch.Size(layout.native).numel()).reshape(layout.native)
    stack = layout.to_stack(weight)
    assert stack.shape == layout.stack
    assert sorted(stack.flatten().tolist()) == weight.flatten().tolist()
    back = layout.to_native(stack)
    assert back.is_contiguous()
    assert torch.equal(back, weight)
    stack = torch.arange(weight.numel()).reshape(layout.stack)
    assert torch.equal(layout.to_stack(layout.to_native(stack)), stack)


def test_a_plain_weight_is_read_as_a_view() -> None:
    weight = noise(8, 4, 3, 3)
    assert Layout.grouped((8, 4, 3, 3), groups=2).to_stack(weight).data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_grouped_weight_has_the_rows_of_torch(groups: int) -> None:
    weight = noise(8, 3, 5)
    stack = Layout.grouped((8, 3, 5), groups).to_stack(weight)
    assert torch.equal(stack.reshape(8, 15), weight.reshape(8, 15))


def test_a_transposed_weight_of_one_group_and_no_kernel_is_the_transpose() -> None:
    weight = noise(6, 4)
    assert torch.equal(Layout.transposed((6, 4)).to_stack(weight), weight.t()[None])


def convolutions() -> list[nn.Module]:
    """Return convolutions of every kind, without bias."""
    layers: list[nn.Module] = []
    for groups in (1, 2, 4):
        layers += [
            nn.Conv1d(8, 12, 3, groups=groups, bias=False),
            nn.Conv2d(8, 12, (3, 2), groups=groups, bias=False),
            nn.Conv3d(4, 8, (1, 2, 3), groups=groups, bias=False),
            nn.ConvTranspose1d(8, 12, 3, groups=groups, bias=False),
            nn.ConvTranspose2d(8, 12, (3, 2), groups=groups, bias=False, stride=2),
            nn.ConvTranspose3d(4, 8, (1, 2, 3), groups=groups, bias=False),
        ]
    depthwise = [
        nn.Conv2d(8, 8, 3, groups=8, bias=False),
        nn.ConvTranspose2d(8, 16, 3, groups=8, bias=False),
    ]
    return [*layers, *depthwise, nn.Linear(8, 12, bias=False)]


def outputs(layer: nn.Module, x: Tensor) -> Tensor:
    """Return a layer's outputs with the channel in front, ``[channels, the rest]``."""
    with torch.no_grad():
        found: Tensor = layer(x)
    return found.transpose(0, 1).flatten(1)


@pytest.mark.parametrize("layer", convolutions(), ids=str)
def test_a_row_of_the_stack_is_all_that_one_output_channel_sees(layer: nn.Module) -> None:
    makers = (LinearQuantizer(), ConvQuantizer(), ConvTransposeQuantizer())
    maker = next(maker for maker in makers if maker.matches(layer))
    layout = maker.layouts(layer)["weight"]
    weight = layer.get_parameter("weight")
    dims = weight.dim() - 2
    inputs = layer.in_channels if isinstance(layer, nn.modules.conv._ConvNd) else 8
    assert isinstance(inputs, int)
    x = noise(3, inputs, *[5] * dims)
    groups, rows, _ = layout.stack
    before = outputs(layer, x)
    assert before.shape[0] == groups * rows
    assert (before.abs().amax(1) > 0).all()
    original = weight.detach().clone()
    for group in range(groups):
        for row in range(rows):
            stack = layout.to_stack(original).clone()
            stack[group, row] = 0
            with torch.no_grad():
                weight.copy_(layout.to_native(stack))
            after = outputs(layer, x)
            channel = group * rows + row
            others = torch.arange(groups * rows) != channel
            assert torch.equal(after[channel], torch.zeros_like(after[channel]))
            assert torch.equal(after[others], before[others])


def test_a_view_reads_half_weights_as_float32_rows_without_gradient() -> None:
    weight = nn.Parameter(noise(4, 6).to(torch.bfloat16))
    stack = WeightView(weight, Layout.grouped((4, 6))).stack()
    assert stack.dtype == torch.float32
    assert not stack.requires_grad
    assert torch.equal(stack, weight.detach().float()[None])


def test_a_view_of_a_float32_weight_copies_nothing() -> None:
    weight = nn.Parameter(noise(4, 6))
    stack = WeightView(weight, Layout.grouped((4, 6))).stack()
    assert stack.data_ptr() == weight.data_ptr()


def test_values_with_tensors_compare_by_identity() -> None:
    qparams = QParams(torch.ones(1, 4, 1), None, (1, 1, 8))
    one = QTensor(torch.zeros(1, 4, 8, dtype=torch.int8), qparams, torch.float32)
    assert one != QTensor(one.codes, qparams, torch.float32)
    assert one.shape == (1, 4, 8)
    assert len({one, one}) == 1
    assert dict(qparams.extra) == {}
