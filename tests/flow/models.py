"""Small models in which codes flow past additions, joins, pads and pools."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mono_quant import Quantizer


class Padding(nn.Conv2d):
    """Pads to its input's size over the stride, as TensorFlow does, and calls its parent."""

    def forward(self, input: Tensor) -> Tensor:
        height, width = input.shape[-2:]
        rows, columns = self.missing(height, 0), self.missing(width, 1)
        around = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        return super().forward(functional.pad(input, around))

    def missing(self, length: int, side: int) -> int:
        steps = -(-length // self.stride[side]) - 1
        return max(steps * self.stride[side] + self.kernel_size[side] - length, 0)


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        beside = x if self.shortcut is None else self.shortcut(x)
        hidden = self.relu(self.bn1(self.conv1(x)))
        hidden = self.bn2(self.conv2(hidden))
        hidden += beside
        out: Tensor = self.relu(hidden)
        return out


class ResNet(nn.Module):
    """A stem, residual blocks and a classifier; `widths` [64, 128, 256, 512] is ResNet-18."""

    def __init__(self, widths: tuple[int, ...] = (8, 16), classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        self.pool = nn.MaxPool2d(3, 2, 1)
        blocks: list[nn.Module] = []
        before = widths[0]
        for index, width in enumerate(widths):
            blocks += [Residual(before, width, 1 if index == 0 else 2), Residual(width, width)]
            before = width
        self.blocks = nn.Sequential(*blocks)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(functional.relu(self.norm(self.stem(x))))
        x = self.average(self.blocks(x))
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


class Joined(nn.Module):
    """Branches that are joined, as in an Inception; no addition, so nothing is only near."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Padding(3, 8, 3, 2)
        self.wide = nn.Conv2d(8, 6, 3, padding=1)
        self.narrow = nn.Conv2d(8, 5, 1)
        self.last = nn.Conv2d(19, 7, 3)
        self.pool = nn.MaxPool2d(2)
        self.classifier = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu6(self.stem(x))
        pooled = functional.max_pool2d(x, 3, stride=1, padding=1)
        x = torch.cat([self.wide(x).relu(), self.narrow(x), pooled], 1)
        x = functional.pad(x, (1, 0, 2, 1))
        x = self.pool(self.last(x).clamp(-1, 2))
        logits: Tensor = self.classifier(x.permute(0, 2, 3, 1))
        return logits


def alive(model: nn.Module) -> nn.Module:
    """Return a model in eval mode, its normalizations as if it had been trained."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def static(
    model: nn.Module, *shape: int, quantizer: Quantizer | None = None
) -> tuple[nn.Module, Tensor]:
    """Return a model with static inputs, its class kept, and data that it was not calibrated on."""
    data = [torch.randn(shape) for _ in range(3)]
    chosen = (quantizer or Quantizer()).only("*").activations("static")
    return chosen.fit(data).apply(alive(model), progress=False).model, torch.randn(shape)
