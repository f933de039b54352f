"""What a package has to offer: ways to put the weights of a network on a grid."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn


class Grid(NamedTuple):
    """How fine a grid is.

    Attributes:
        bits: of a code.
        group: values that share a scale.
        even: whether its steps are; else they are a table's.
    """

    bits: int
    group: int
    even: bool = True

    def __str__(self) -> str:
        kind = f"INT{self.bits}" if self.even else f"{self.bits}-bit tables"
        return f"{kind} g{self.group}"

    def size(self, beside: float) -> float:
        """Return the bits per weight, where each group has so many bits beside its codes."""
        return self.bits + beside / self.group


GRIDS = (Grid(4, 32), Grid(4, 64), Grid(4, 128), Grid(3, 64), Grid(2, 64))
TABLES = tuple(Grid(bits, 32, even=False) for bits in (4, 3, 2))
NETWORKS = ("minilm", "smollm2")


class Task(NamedTuple):
    """A network to quantize.

    Attributes:
        network: its name.
        model: in float32; may be changed.
        names: of the Linears to quantize.
        batches: the inputs of calls, to calibrate on.
    """

    network: str
    model: nn.Module
    names: Sequence[str]
    batches: Sequence[tuple[Tensor, ...]]


class Quantized(NamedTuple):
    """What became of a network.

    Attributes:
        state: what changed in the state of the float model, dequantized.
        bits_per_weight: of the weights that were quantized, with scales and zero points.
    """

    state: Mapping[str, Tensor]
    bits_per_weight: float


Read = Callable[[], Quantized]
"""Dequantizes what was quantized; not timed."""

Quantize = Callable[[], Read]
"""What is timed."""

Way = Callable[[Task, Grid], Quantize]
"""Imports what it needs and prepares the network; not timed."""


class Offer(NamedTuple):
    """A way, and where it can go.

    Attributes:
        way: what is done.
        grids: that it is measured on.
        networks: that it knows.
    """

    way: Way
    grids: Sequence[Grid] = GRIDS
    networks: Sequence[str] = NETWORKS


class Package(NamedTuple):
    """A package and its ways.

    Attributes:
        title: in the table.
        requirements: of its environment; none for the one of these benchmarks.
        offers: its ways by title.
    """

    title: str
    requirements: tuple[str, ...]
    offers: Mapping[str, Offer]


def by_weight(
    module: str,
    quantized: Callable[[Any, Tensor, Grid], Callable[[], Tensor]],
    size: Callable[[Grid], float],
) -> Way:
    """Return a way that takes weights one by one, without data.

    Args:
        module: of the package; what `quantized` is given.
        quantized: quantizes a weight and returns what dequantizes it.
        size: bits per weight.
    """

    def way(task: Task, grid: Grid) -> Quantize:
        package = importlib.import_module(module)
        floats = {name: task.model.get_parameter(name).detach() for name in _weights(task)}

        def quantize() -> Read:
            found = {name: quantized(package, weight, grid) for name, weight in floats.items()}
            return lambda: Quantized({name: read() for name, read in found.items()}, size(grid))

        return quantize

    return way


def _weights(task: Task) -> list[str]:
    return [f"{name}.weight" for name in task.names]
