"""What layers are given on the example data: a sample of it, and how large each channel is."""

import weakref
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
    taken = _Taken()

    def see(
        path: str, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if given is not None and given.numel():
            seen[path].add(module, given, taken)

    with ExitStack() as hooks:
        for path in seen:
            module = model.get_submodule(path)
            handle = module.register_forward_pre_hook(partial(see, path), with_kwargs=True)
            hooks.callback(handle.remove)
        for _ in context.outputs(model):
            pass
    return {path: one.found() for path, one in seen.items() if one.count}


class _Taken:
    """The rows that were last taken of a tensor, for others that are given the same one."""

    def __init__(self) -> None:
        """None was taken yet."""
        self._of: weakref.ref[Tensor] | None = None
        self._places = (0, 0)
        self._rows: Rows = ()

    def rows(self, given: Tensor, rows: Tensor, first: int, step: int) -> Rows:
        """Return copies of every `step`-th of the rows of `given`, in float32."""
        if self._of is None or self._of() is not given or self._places != (first, step):
            self._of, self._places = weakref.ref(given), (first, step)
            self._rows = tuple(one.clone() for one in rows[first::step].to(torch.float32))
        return self._rows


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

    def add(self, layer: nn.Module, given: Tensor, taken: _Taken) -> None:
        """Take note of an input."""
        rows = _rows(layer, given.detach())  # [n, in, *positions]
        sizes = rows.abs()
        others = [place for place in range(rows.dim()) if place != 1]
        self._sum = self._sum + sizes.sum(others, dtype=torch.float64).to("cpu")
        peak = sizes.amax(others).to("cpu", torch.float64)
        self._peak = peak if self._peak is None else torch.maximum(self._peak, peak)
        self._values += rows.numel() // rows.shape[1]
        first = -self.count % self._step
        self.count += len(rows)
        self._rows += taken.rows(given, rows, first, self._step)
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
