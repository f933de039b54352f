"""How the error grows from a model's input to its output, layer by layer."""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

import attrs
import torch
from torch import Tensor, nn

from mono_quant.calibration import CalibrationData, output_error
from mono_quant.numerics.histogram import evenly_spread
from mono_quant.numerics.metrics import SquaredError
from mono_quant.numerics.nested import tensors_in

KEPT = 1 << 22
"""Values that are kept of what all layers return for one batch, 17 MB in float32."""


@attrs.frozen(eq=False)
class Accumulated:
    """The error of what each layer returns inside the quantized model, against the float model.

    Both go through the data by turns, batch by batch, so that no more is kept than what the float
    layers returned for one batch; of much, values that are evenly spread.

    Attributes:
        model: the quantized one.
        layers: how many are looked at, which share the memory.
        errors: by the layers' names, after the data was gone through; layers that no data reached,
            or that the two models call differently, are absent.
        order: the layers' places in the order in which the float model first called them.
    """

    model: nn.Module
    layers: int
    errors: dict[str, SquaredError] = attrs.field(factory=dict)
    order: dict[str, int] = attrs.field(factory=dict)
    _kept: dict[str, list["_Sample"]] = attrs.field(factory=dict, init=False)
    _unlike: set[str] = attrs.field(factory=set, init=False)

    def keep(self, path: str, output: object) -> None:
        """Keep some values of what a float layer returned, for the same call in the other model."""
        self.order.setdefault(path, len(self.order))
        calls = self._kept.setdefault(path, [])
        left = KEPT // self.layers - sum(x.numel() for call in calls for x in call.values)
        calls.append(_Sample.of(output, left // max(1, len(_floats(output)))))

    def outputs(self, data: CalibrationData, progress: str | None) -> Iterator[list[Tensor]]:
        """Yield the outputs of the quantized model, each after the float model has seen the batch.

        It is looked at while it runs, and not while somebody runs a layer of it alone.
        """
        runs = data.outputs(self.model, progress)
        while True:
            with ExitStack() as hooks:
                for path in self._kept:
                    module = self.model.get_submodule(path)
                    hooks.callback(module.register_forward_hook(partial(self._see, path)).remove)
                found = next(runs, None)
            if found is None:
                break
            self._unlike.update(path for path, calls in self._kept.items() if calls)
            self._kept.clear()
            yield found
            del found  # before the next ones are made
        for path in self._unlike:
            self.errors.pop(path, None)

    def _see(self, path: str, _: nn.Module, __: tuple[object, ...], output: object) -> None:
        calls = self._kept[path]
        if not calls:
            self._unlike.add(path)
            return
        kept = calls.pop(0)
        found = _Sample.of(output, kept.share)
        if kept.shapes != found.shapes:
            self._unlike.add(path)
            return
        error = output_error(kept.values, found.values)
        self.errors[path] = self.errors.get(path, SquaredError()) + error


@attrs.frozen(eq=False)
class _Sample:
    """Some values of what a layer returned.

    Attributes:
        share: how many of each of its float tensors, at most.
        shapes: of the tensors.
        values: evenly spread, and all of them where there are few.
    """

    share: int
    shapes: list[torch.Size]
    values: list[Tensor]

    @classmethod
    def of(cls, output: object, share: int) -> "_Sample":
        """Return up to `share` values of each float tensor, copied: later ones write in place."""
        floats = _floats(output)
        values = [evenly_spread(x.reshape(-1), share).clone() for x in floats if share]
        return cls(share, [x.shape for x in floats], values)


def _floats(output: object) -> list[Tensor]:
    return [x.detach() for x in tensors_in(output) if x.is_floating_point() and x.numel()]
