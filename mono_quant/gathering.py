"""The statistics of layers' inputs, while a model is run."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import cast

import attrs
import torch
from torch import Tensor, nn

from mono_quant.base import AnyStatistic, LayerQuantizer, Statistic, Statistics
from mono_quant.errors import CalibrationError
from mono_quant.numerics.extremes import all_finite
from mono_quant.numerics.metrics import times_written


@attrs.frozen(eq=False)
class Wanted:
    """The statistics of a layer's inputs that are asked for, by the name of the weight they meet.

    Attributes:
        layer: knows how the layer's inputs are read.
        of_rows: statistics of inputs as rows, for roundings.
        of_inputs: statistics of inputs as they come, for their ranges.
    """

    layer: LayerQuantizer
    of_rows: Mapping[str, tuple[AnyStatistic, ...]]
    of_inputs: Mapping[str, tuple[AnyStatistic, ...]]


@attrs.frozen(eq=False)
class Gathered:
    """What calibration learned of the inputs of one weight.

    Attributes:
        rows: the states that roundings asked for.
        inputs: the states that the ranges of inputs are found from.
    """

    rows: Statistics = attrs.field(factory=Statistics)
    inputs: Statistics = attrs.field(factory=Statistics)


class Gathering:
    """The statistics of layers' inputs, while a model is run."""

    def __init__(self, model: nn.Module, wanted: Mapping[str, Wanted]) -> None:
        """Gather what is wanted of the layers of `model`, once attached."""
        self._model, self._wanted = model, wanted
        self._rows: dict[tuple[str, str], dict[AnyStatistic, object]] = {}
        self._inputs: dict[tuple[str, str], dict[AnyStatistic, object]] = {}
        self._last: dict[AnyStatistic, _Fold] = {}

    @contextmanager
    def attached(self) -> Iterator["Gathering"]:
        """Look at every call of the layers as long as the context lasts.

        Raises:
            CalibrationError: an input holds NaN or infinity; names the layer.
        """
        with ExitStack() as hooks:
            for name in self._wanted:
                module = self._model.get_submodule(name)
                observe = partial(self._observe, name)
                hooks.callback(module.register_forward_pre_hook(observe, with_kwargs=True).remove)
            yield self
        self._last.clear()

    def found(self) -> Mapping[tuple[str, str], Gathered]:
        """Return what was gathered by layer and weight; weights that no data reached are absent."""
        return {
            key: Gathered(
                Statistics(self._rows.get(key, {})), Statistics(self._inputs.get(key, {}))
            )
            for key in {**self._rows, **self._inputs}
        }

    def _observe(
        self, path: str, layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        want = self._wanted[path]
        for name, x in want.layer.inputs(layer, args, kwargs):
            if not x.numel():
                continue
            if not all_finite(x):
                raise CalibrationError(f"what reaches {path!r} holds NaN or infinity")
            for statistic in want.of_inputs.get(name, ()):
                self._fold(statistic, x, x, self._inputs.setdefault((path, name), {}))
            rows = want.layer.rows(layer, name, x) if want.of_rows.get(name) else None
            if rows is not None:
                for statistic in want.of_rows[name]:
                    self._fold(statistic, x, rows, self._rows.setdefault((path, name), {}))

    def _fold(
        self, statistic: AnyStatistic, x: Tensor, rows: Tensor, seen: dict[AnyStatistic, object]
    ) -> None:
        """Add one input to what was seen; layers that take the same one share the work."""
        fold = cast("Statistic[object]", statistic)  # the only kind of statistic there is
        before, last = seen.get(statistic), self._last.pop(statistic, None)
        if last is None or not last.repeated_by(x, rows, before):
            state = fold.observe(rows)
            after = fold.merge(before, state) if statistic in seen else state
            last = _Fold(x, times_written(x), rows.shape, before, after)
        seen[statistic] = last.after
        if rows.data_ptr() == x.data_ptr():  # else other layers make other rows of it
            self._last[statistic] = last


@attrs.frozen(eq=False)
class _Fold:
    """The last step of a fold over rows that are a view of an input.

    Attributes:
        x: the input.
        written: how often it had been written to.
        shape: of the rows.
        before: the state before it.
        after: the state with it.
    """

    x: Tensor
    written: int
    shape: torch.Size
    before: object
    after: object

    def repeated_by(self, x: Tensor, rows: Tensor, before: object) -> bool:
        """Return whether another layer's step is this one: the same rows, and the same state."""
        same = self.x is x and self.written == times_written(x) and self.before is before
        return same and self.shape == rows.shape and rows.data_ptr() == x.data_ptr()
