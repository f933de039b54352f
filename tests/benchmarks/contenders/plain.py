"""Networks of torch's own modules, each called once, which tracers of other packages understand."""

from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, fx, nn

from tests.models.efficientnet_lite0 import (
    EfficientNetLite0,
    InvertedResidual,
    SamePaddingConv2d,
)


class Residual(nn.Module):
    """Layers one after the other, with a shortcut around them or without."""

    def __init__(self, layers: nn.Sequential, *, shortcut: bool) -> None:
        """Take the layers."""
        super().__init__()
        self.layers = layers
        self.shortcut = shortcut

    def forward(self, images: Tensor) -> Tensor:
        """Return what the layers make of feature maps."""
        found: Tensor = self.layers(images)
        return images + found if self.shortcut else found


def plain(model: EfficientNetLite0, images: Tensor) -> nn.Module:
    """Return the same network of torch's own modules, each called once.

    Tracers of other packages know no subclass of a convolution and take two calls of one ReLU6 for
    one step. The padding is that of the given images.
    """
    copied = deepcopy(model)
    paddings: dict[str, tuple[int, ...]] = {}

    def see(name: str, layer: SamePaddingConv2d, args: tuple[Tensor, ...], output: Tensor) -> None:
        (x,) = args
        found: list[int] = []
        for place in (1, 0):
            steps, stride = output.shape[place - 2] - 1, layer.stride[place]
            missing = steps * stride + layer.kernel_size[place] - x.shape[place - 2]
            found += [max(missing, 0) // 2, max(missing, 0) - max(missing, 0) // 2]
        paddings[name] = tuple(found)

    padded = {
        name: layer
        for name, layer in copied.named_modules()
        if isinstance(layer, SamePaddingConv2d)
    }
    handles = [layer.register_forward_hook(partial(see, name)) for name, layer in padded.items()]
    with torch.no_grad():
        expected = copied(images)
    for handle in handles:
        handle.remove()
    for name, layer in padded.items():
        conv = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            (layer.kernel_size[0], layer.kernel_size[1]),
            stride=(layer.stride[0], layer.stride[1]),
            groups=layer.groups,
            bias=False,
        )
        conv.weight = layer.weight
        left, right, top, bottom = paddings[name]
        pad = nn.ZeroPad2d((left, right, top, bottom))
        copied.set_submodule(name, nn.Sequential(pad, conv))
    network = nn.Sequential(
        *_activated(copied.stem, copied.stem_norm),
        *(_block(block) for block in copied.blocks),
        *_activated(copied.head, copied.head_norm),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        copied.classifier,
    ).eval()
    with torch.no_grad():
        torch.testing.assert_close(network(images), expected)
    return network


def _activated(convolution: nn.Module, norm: nn.Module) -> tuple[nn.Module, ...]:
    return convolution, norm, nn.ReLU6()


def _block(block: nn.Module) -> Residual:
    assert isinstance(block, InvertedResidual)
    layers: list[nn.Module] = []
    if block.expand is not None and block.expand_norm is not None:
        layers += _activated(block.expand, block.expand_norm)
    layers += _activated(block.depthwise, block.depthwise_norm)
    layers += (block.project, block.project_norm)
    return Residual(nn.Sequential(*layers), shortcut=block.has_shortcut)


def apart(model: nn.Module) -> nn.Module:
    """Return a model in which each call of a module has a module of its own."""
    traced = fx.symbolic_trace(model)
    met: set[str] = set()
    for node in traced.graph.nodes:
        node.meta.clear()  # of which module it was, which export goes by
        if node.op == "call_module" and isinstance(node.target, str):
            if node.target in met:
                copied = deepcopy(traced.get_submodule(node.target))
                node.target = f"{node.target}_{len(met)}"
                traced.add_submodule(node.target, copied)
            met.add(node.target)
    traced.recompile()
    return traced
