"""Models whose channels can be scaled between modules, and some in which they cannot."""

from collections.abc import Callable
from typing import cast

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional

from mono_quant import (
    Affine,
    Grid,
    MinMax,
    Observer,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Target,
    TransformContext,
)
from mono_quant.transforms.rescaling import kind_of, layout_of
from tests.transforms.models import on

WIDTH = 16
FOUR = Target(Grid(Affine(4, False, PerGroup(8)), MinMax()))
DYNAMIC = Target(Grid(Affine(8), MinMax()), Affine(8, False, PerToken(), torch.float32))
STATIC = Target(
    Grid(Affine(8), MinMax()),
    Affine(8, False, PerTensor(), torch.float32),
    cast("Observer[object]", MinMax()),  # whose state is hidden from mypy, as in a recipe
)


def targets_of(model: nn.Module, target: Target) -> dict[str, Target]:
    """Return what will be done to a model all of whose layers will be quantized alike.

    Rows that groups do not divide have one scale each.
    """
    scheme = target.grid.scheme
    assert isinstance(scheme, Affine)
    rows = attrs.evolve(scheme, granularity=PerChannel())
    by_row = attrs.evolve(target, grid=Grid(rows, MinMax()))
    return {
        f"{path}.weight": by_row if scheme.refuse(layout_of(module).stack) else target
        for path, module in model.named_modules()
        if kind_of(module) is not None
    }


def aimed(model: nn.Module, target: Target, *batches: Tensor) -> TransformContext:
    """Return what a transform knows of such a model where these batches are the example data."""
    return TransformContext(on(*batches).outputs, targets_of(model, target))


class Scaled(nn.Module):
    """A root mean square norm that multiplies by one plus its weight."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class Gated(nn.Module):
    """A norm before two layers, one of which gates the other, before a third."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Scaled()
        self.gate, self.up = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24, bias=False)
        self.down = nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(x)
        result: Tensor = x + self.down(functional.silu(self.gate(hidden)) * self.up(hidden))
        return result


class Attending(nn.Module):
    """Attention of 4 heads that share 2 heads of keys and values, behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH // 2)
        self.value, self.output = nn.Linear(WIDTH, WIDTH // 2), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(x)
        query, key, value = (
            one(hidden).unflatten(-1, (-1, 4)).transpose(1, 2)
            for one in (self.query, self.key, self.value)
        )
        key, value = (one.repeat_interleave(2, dim=1) for one in (key, value))
        mixed = functional.scaled_dot_product_attention(query, key, value)
        result: Tensor = x + self.output(mixed.transpose(1, 2).flatten(2))
        return result


class Multiplied(Attending):
    """The same with products of matrices in place of torch's attention."""

    def forward(self, x: Tensor) -> Tensor:
        hidden, samples, length = self.norm(x), x.shape[0], x.shape[1]
        query, key, value = (
            one(hidden).reshape(samples, length, -1, 4).permute(0, 2, 1, 3)
            for one in (self.query, self.key, self.value)
        )
        scores = query @ key.repeat(1, 2, 1, 1).transpose(-2, -1) / 2
        mixed = torch.matmul(scores.softmax(-1), value.repeat(1, 2, 1, 1))
        result: Tensor = x + self.output(mixed.permute(0, 2, 1, 3).reshape(samples, length, -1))
        return result


class Convolving(nn.Module):
    """Convolutions, grouped and pooled, before a Linear that sees each channel at four places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3, groups=4)
        self.pool, self.head = nn.AvgPool2d(3), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.second(functional.leaky_relu(self.first(x), 0.1)))
        scores: Tensor = self.head(self.pool(hidden).flatten(1))
        return scores


class Joined(nn.Module):
    """Two layers side by side before a third, which also sees the input."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)
        self.last = nn.Linear(16 + WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(torch.cat([self.left(x), torch.tanh(self.right(x)), x], -1))
        return result


def _branching(cls: type[nn.Module]) -> type[nn.Module]:
    """Return a class whose code asks its data which way to go, so that it cannot be traced."""

    class Untraceable(cls):  # type: ignore[misc, valid-type]  # mypy knows no class by a variable
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = super().forward(x * 2 if x.sum() > 1e9 else x)
            return result

    return Untraceable


UntracedGated, UntracedAttending, UntracedConvolving = map(
    _branching, (Gated, Attending, Convolving)
)

WIRINGS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, tuple[str, ...]]]] = {
    "gated": (Gated, (3, 5, WIDTH), {"norm": ("gate", "up"), "up": ("down",)}),
    "attending": (
        Attending,
        (3, 5, WIDTH),
        {"norm": ("query", "key", "value"), "value": ("output",)},
    ),
    "multiplied": (
        Multiplied,
        (3, 5, WIDTH),
        {"norm": ("query", "key", "value"), "value": ("output",)},
    ),
    "convolving": (
        Convolving,
        (3, 3, 10, 10),
        {"first": ("second",), "second": ("head",)},
    ),
    "joined": (Joined, (9, WIDTH), {"left": ("last",)}),
    "untraced gated": (UntracedGated, (3, 5, WIDTH), {"norm": ("gate", "up"), "up": ("down",)}),
    "untraced attending": (
        UntracedAttending,
        (3, 5, WIDTH),
        {"norm": ("query", "key", "value"), "value": ("output",)},
    ),
    "untraced convolving": (
        UntracedConvolving,
        (3, 3, 10, 10),
        {"first": ("second",), "second": ("head",)},
    ),
}
"""By name: the model, the shape of its input, and its groups: layers by their source."""
