"""Small models with batch normalization, their statistics far from the ones they are made with."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from mono_quant import TransformContext

ModelT = TypeVar("ModelT", bound=nn.Module)
AnyNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


def lived_in(model: ModelT) -> ModelT:
    """Return a model in eval mode and float64, as if it had been trained."""
    torch.manual_seed(0)
    for module in model.modules():
        if not isinstance(module, AnyNorm):
            continue
        if module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 3)
        if module.affine:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.double().eval()


def on(*batches: Tensor) -> TransformContext:
    """Return what a transform knows where these batches are the example data."""

    def outputs(model: nn.Module) -> Iterator[Sequence[Tensor]]:
        for batch in batches:
            with torch.no_grad():
                yield [model(batch)]

    return TransformContext(outputs)


class Block(nn.Module):
    """Two convolutions beside a shortcut, as in a residual network."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        hidden = self.relu(self.bn1(self.conv1(x)))
        hidden = self.bn2(self.conv2(hidden))
        hidden += shortcut
        result: Tensor = self.relu(hidden)
        return result


class ResNet(nn.Module):
    """A residual network of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layers = nn.Sequential(Block(8, 8), Block(8, 16, stride=2))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layers(functional.relu(self.bn1(self.conv1(x))))
        scores: Tensor = self.fc(functional.adaptive_avg_pool2d(hidden, 1).flatten(1))
        return scores


class Branching(nn.Module):
    """Asks its data which way to go, so that it cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 4, 1)
        self.head_bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.bn(self.conv(x))
        if hidden.sum() > 1e9:
            hidden = hidden * 2
        scores = self.head(hidden)
        result: Tensor = self.head_bn(scores) + scores  # a use that no hook sees
        return result


class Pair(nn.Module):
    """A convolution and its normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.bn(self.conv(x))
        return result


class TwoConsumers(Pair):
    """Normalizes a tensor that is also used as it is."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv(x)
        result: Tensor = self.bn(hidden) + hidden
        return result


class Twice(nn.Module):
    """Calls one convolution twice, with a normalization of its own each time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(3)
        self.bn2 = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.bn2(self.conv(self.bn1(self.conv(x))))
        return result


class Optional(nn.Module):
    """Normalizes only if it is given something to add, or not told to leave it."""

    def __init__(self, flag: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.flag = flag

    def forward(self, x: Tensor, extra: Tensor | None = None, raw: bool = False) -> Tensor:
        hidden: Tensor = self.conv(x)
        if (raw if self.flag else extra is None) is False:
            hidden = self.bn(hidden)
        return hidden if extra is None else hidden + extra
