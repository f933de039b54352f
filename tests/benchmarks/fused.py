"""Activations that layers compute in place: the speed beside the same model with them apart."""

import copy
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from mono_quant import Quantizer
from mono_quant.modules import QuantizedLayer
from tests.benchmarks.measure import median_seconds, print_table

REPEATS = 31
_WIDTHS = (32, 192, 64, 384)


def main() -> None:
    """Print how much faster models are whose layers compute the activations that follow."""
    columns = ("model", "activation", "input", "fused", "apart, ms", "speed-up")
    print(f"Ratios of medians of {REPEATS} runs, by turns.\n")
    print_table(columns, _rows())


def narrow_and_wide(activation: nn.Module) -> nn.Sequential:
    """Return convolutions of one tap with a batch normalization and an activation after each."""
    layers: list[nn.Module] = []
    channels = 16
    for width in _WIDTHS:
        layers += [nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)]
        layers.append(copy.deepcopy(activation))
        channels = width
    return nn.Sequential(*layers).eval()


def windows(activation: nn.Module) -> nn.Sequential:
    """Return convolutions of nine taps, pooled."""
    layers: list[nn.Module] = []
    channels = 16
    for width in (64, 128, 256):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        layers += [copy.deepcopy(activation), nn.MaxPool2d(2)]
        channels = width
    return nn.Sequential(*layers).eval()


def matrices(activation: nn.Module) -> nn.Sequential:
    """Return the feed-forward part of a small transformer."""
    return nn.Sequential(nn.Linear(384, 1536), activation, nn.Linear(1536, 384)).eval()


def _rows() -> Iterator[tuple[str, ...]]:
    torch.manual_seed(0)
    images = torch.randn(4, 16, 112, 112).contiguous(memory_format=torch.channels_last)
    small = images[:1, :, :56, :56]
    activations: tuple[nn.Module, ...] = (nn.ReLU(), nn.ReLU(inplace=True), nn.SiLU())
    for activation in activations[:2]:
        yield from _measured("1x1 convolutions", activation, narrow_and_wide(activation), images)
        yield from _measured("3x3 convolutions", activation, windows(activation), small)
    for activation in activations:
        for rows in (1, 512, 4096):
            x = torch.randn(rows, 384)
            yield from _measured("384 -> 1536 -> 384", activation, matrices(activation), x)


@torch.no_grad()
def _measured(
    name: str, activation: nn.Module, model: nn.Module, x: Tensor
) -> Iterator[tuple[str, ...]]:
    fused = Quantizer().activations("static").fit([x]).apply(model, progress=False).model
    apart = copy.deepcopy(fused)
    layers = [one for one in apart.modules() if isinstance(one, QuantizedLayer)]
    count = sum(layer.stand_in is not None for layer in layers)
    for layer in layers:
        layer.give_back()
    actions = [partial(one, x) for one in (apart, fused)]
    slow, fast = median_seconds(actions, REPEATS)
    shape = " x ".join(map(str, x.shape))
    yield (name, str(activation), shape, str(count), f"{slow * 1e3:.2f}", f"{slow / fast:.2f}")
