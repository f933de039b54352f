"""Small models to try an extension on; the same numbers each time."""

import torch
from torch import Tensor, nn


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Return normal noise, the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fill(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter and running statistic numbers that look as if they were trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not tensor.is_floating_point():
                continue
            values = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                values = 0.5 + values.abs()
            elif tensor.dim() > 1:
                values = values / (tensor[0].numel() ** 0.5)
            elif name.endswith("weight"):  # of a norm
                values = 1 + values / 4
            tensor.copy_(values)


class Perceptron(nn.Sequential):
    """Three linear layers, the inputs of whose first are of unequal strength and dependent."""

    def __init__(self) -> None:
        """Make it, in eval mode."""
        super().__init__(
            nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16)
        )
        fill(self)
        self.eval()

    def example(self) -> Tensor:
        """Return a batch of 128."""
        return noise(128, 64, seed=1) @ noise(64, 64, seed=2) * torch.linspace(0.05, 0.5, 64)


class Convolutions(nn.Sequential):
    """Convolutions, one of them depthwise, with batch normalizations that were trained."""

    def __init__(self) -> None:
        """Make it, in eval mode."""
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 10),
        )
        fill(self)
        self.eval()

    def example(self) -> Tensor:
        """Return a batch of 8 images."""
        return noise(8, 3, 12, 12, seed=1)


class Tied(nn.Module):
    """A language model in small: its head shares the weight of its embedding."""

    def __init__(self) -> None:
        """Make it, in eval mode."""
        super().__init__()
        self.embedding = nn.Embedding(64, 64)
        self.middle = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 64, bias=False)
        self.head.weight = self.embedding.weight
        fill(self)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the next token."""
        hidden: Tensor = self.norm(self.middle(self.embedding(x)))
        scores: Tensor = self.head(hidden)
        return scores

    def example(self) -> Tensor:
        """Return a batch of token numbers."""
        return torch.arange(64).reshape(4, 16)
