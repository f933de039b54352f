"""What layers are given on the example data: a sample of it, and how large each channel is."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial

import attrs
import torch
from torch import Tensor, nn

from mono_quant.base import TransformContext
from mono_quant.transforms.rescaling import dimensions

ROWS = 256
"""Rows of inputs, or samples of a convolution, that a sample holds at most."""

_VALUES = 1 << 20
"""Values that a sample holds at most, but for its first row."""


Rows = tuple[Tensor, ...]


@attrs.frozen(eq=False)
class Inputs:
    """The inputs of one layer.

    Attributes:
        rows: some of them, float32 ``[in]``, of a convolution ``[in, *positions]``; layers that are
            given one tensor share them.
        mean: mean magnitude in each channel, ``float64 [in]``, on the CPU.
        peak: largest magnitude in each channel, ``float64 [in]``, on the CPU.
    """

    rows: Rows
    mean: Tensor
    peak: Tensor


def inputs_of(
    model: nn.Module, context: TransformContext, layers: Iterable[str]
) -> Mapping[str, Inputs]:
    """Return what some of `LAYERS` are given, from one pass over the data.

    Layers that no data reached are absent.
    """
    if context.outputs is None:
        return {}
    seen = {path: _Seen() for path in layers}
    taken: dict[tuple[int, int, int], Rows] = {}

    def see(
        path: str, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if given is not None and given.numel():
            seen[path].add(module, given.detach(), id(given), taken)

    with ExitStack() as hooks:
        for path in seen:
            module = model.get_submodule(path)
            handle = module.register_forward_pre_hook(partial(see, path), with_kwargs=True)
            hooks.callback(handle.remove)
        for _ in context.outputs(model):
            taken.clear()
    return {path: one.found() for path, one in seen.items() if one.count}


class _Seen:
    """The inputs of one layer so far, of which every so many rows are held.

    Twice as many are passed over whenever the sample is full, so that it stays evenly spread. The
    first row, which often is odd, is always in it.
    """

    def __init__(self) -> None:
        """Nothing was seen yet."""
        self.count = 0  # rows
        self._values = 0  # in each channel
        self._step = 1
        self._rows: list[Tensor] = []
        self._sum: Tensor | float = 0.0
        self._peak: Tensor | None = None

    def add(
        self, layer: nn.Module, x: Tensor, key: int, taken: dict[tuple[int, int, int], Rows]
    ) -> None:
        """Take note of an input; `taken` holds what other layers took of that of the same key."""
        rows = _rows(layer, x)  # [n, in, *positions]
        sizes = rows.abs()
        others = [place for place in range(rows.dim()) if place != 1]
        self._sum = self._sum + sizes.sum(others, dtype=torch.float64).to("cpu")
        peak = sizes.amax(others).to("cpu", torch.float64)
        self._peak = peak if self._peak is None else torch.maximum(self._peak, peak)
        self._values += rows.numel() // rows.shape[1]
        first = -self.count % self._step
        self.count += len(rows)
        held = taken.get((key, first, self._step))
        if held is None:
            held = tuple(one.clone() for one in rows[first :: self._step].to(torch.float32))
            taken[key, first, self._step] = held
        self._rows += held
        while len(self._rows) > max(1, min(ROWS, _VALUES // rows[0].numel())):
            self._rows = self._rows[::2]
            self._step *= 2

    def found(self) -> Inputs:
        """Return what was seen."""
        mean, peak = torch.as_tensor(self._sum) / self._values, self._peak
        return Inputs(tuple(self._rows), mean, mean if peak is None else peak)


def _rows(layer: nn.Module, x: Tensor) -> Tensor:
    """Return an input as ``[n, in, *positions]``."""
    spatial = dimensions(layer)
    if spatial == 0:
        return x.reshape(-1, x.shape[-1])
    return x if x.dim() == spatial + 2 else x[None]
