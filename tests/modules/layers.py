"""A layer of each kind, with an input: what must hold of all of them is asked of all of them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from mono_quant import LinearLikeQuantizer, Quantizer


class PadsFirst(nn.Conv2d):
    """A convolution with a forward of its own, which calls its parent's."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(functional.pad(input, (0, 1, 0, 1)))


class Product(nn.Module):
    """A third party's layer that computes a product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 64))
        self.bias = nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (nn.Linear(64, 12), torch.randn(3, 64)),
    "conv1d": lambda: (nn.Conv1d(8, 12, 3, padding="same"), torch.randn(2, 8, 9)),
    "conv2d": lambda: (
        nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect", groups=2),
        torch.randn(2, 8, 6, 5),
    ),
    "conv3d": lambda: (nn.Conv3d(4, 6, 2), torch.randn(2, 4, 3, 4, 5)),
    "conv transpose": lambda: (
        nn.ConvTranspose2d(8, 12, 3, stride=2, groups=2),
        torch.randn(2, 8, 4, 5),
    ),
    "embedding": lambda: (nn.Embedding(20, 64, padding_idx=0), torch.arange(20)),
    "embedding bag": lambda: (
        nn.EmbeddingBag(20, 64, padding_idx=3),
        torch.arange(20).reshape(4, 5),
    ),
    "own forward": lambda: (PadsFirst(8, 12, 3), torch.randn(2, 8, 6, 5)),
    "third party": lambda: (Product(), torch.randn(3, 64)),
}

TAUGHT = Quantizer().layer(LinearLikeQuantizer(f"{__name__}.Product")).only("*")
"""A quantizer that knows all of them and skips none."""

FLOAT_INPUTS = TAUGHT.activations(None)
"""The same with inputs left in float: what a layer computes is then what its float twin does."""


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an input in another dtype; indices as they are."""
    return x.to(dtype) if x.is_floating_point() else x
