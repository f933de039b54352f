"""Running a model stage by stage, each on what the one before it returned."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import cast

import attrs
import torch
from torch import Tensor, nn

from mono_quant.calibration import CalibrationData, Kept, evaluating, of_batch
from mono_quant.numerics.nested import each, tensors_in
from mono_quant.plan.stages import Slot, Stage, plain, taken_apart


@attrs.frozen(eq=False)
class Calls:
    """What a stage is called with, a call for each batch.

    Attributes:
        forms: the arguments of each, with slots for tensors.
        tensors: what fills them.
    """

    forms: list[object] = attrs.field(factory=list)
    tensors: Kept = attrs.field(factory=Kept)

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.tensors)

    def add(self, form: object, tensors: list[Tensor]) -> None:
        """Keep one more call."""
        self.forms.append(form)
        self.tensors.add(tensors)

    def arguments(self, place: int) -> tuple[tuple[object, ...], Mapping[str, object]]:
        """Return positional and keyword arguments for one batch."""
        tensors = self.tensors[place]

        def fill(value: object) -> object:
            return tensors[value.number] if isinstance(value, Slot) else value

        return cast(
            "tuple[tuple[object, ...], Mapping[str, object]]", each(self.forms[place], fill)
        )  # as they were taken apart

    def lead_to(self, stage: Stage) -> bool:
        """Return whether it is known what a stage is called with after this one, if it follows.

        Not where batches differ in form here, which two of them need not have shown.
        """
        return stage.follows is not None and all(form == self.forms[0] for form in self.forms)

    def after(self, stage: Stage, outputs: Iterable[list[Tensor]]) -> "Calls":
        """Return what a stage that this one leads to is called with.

        Each of these calls is forgotten as soon as its outputs are there.

        Args:
            stage: the one that follows.
            outputs: what this one returns for each batch, in memory or as it is computed.
        """
        assert stage.follows is not None  # `lead_to` says so
        found = Calls()
        for place, returned in enumerate(outputs):
            sources = self.tensors[place], returned
            found.add(stage.form, [sources[which][number] for which, number in stage.follows])
            self.tensors.forget(place)
        return found


class Relay:
    """A model that is run stage by stage while it is changed.

    Where a stage takes nothing but what the one before it took and returned, it alone is run on
    that, which is kept up to a bound in memory and on disk past it. Else the whole model is run up
    to it.
    """

    def __init__(self, model: nn.Module, data: CalibrationData) -> None:
        """Run `model` on `data`."""
        self._model, self._data = model, data
        self._calls: Calls | None = None

    def visit(self, stage: Stage) -> None:
        """Run a stage on every batch, for the hooks that are in it."""
        if not self.reach(stage):
            for _ in self.outputs(stage):
                pass

    def reach(self, stage: Stage) -> bool:
        """Find out what a stage is called with; return whether it ran for that.

        Layers that no stage calls run with the whole model, on all batches: two of them, which have
        shown the stages, need not have reached what some others do.
        """
        if self._calls is not None:
            return False
        if stage.path is None:
            for _ in self._data.outputs(self._model):
                pass
            return True
        module = self._model.get_submodule(stage.path)
        calls, repeatable = Calls(), stage.form is not None

        def keep(_: nn.Module, args: object, kwargs: object) -> None:
            nonlocal repeatable
            repeatable = repeatable and plain((args, kwargs))  # two batches have shown it, not all
            if repeatable:
                calls.add(*taken_apart(args, kwargs))

        with ExitStack() as hooks:
            if stage.form is not None:
                hooks.callback(module.register_forward_pre_hook(keep, with_kwargs=True).remove)
            for _ in self._data.inner_outputs(self._model, module, calls=stage.calls):
                pass
        self._calls = calls if repeatable else None
        return True

    @property
    def calls(self) -> Calls | None:
        """What the stage is called with that was reached; None where it cannot be repeated."""
        return self._calls

    def leave(self, stage: Stage, then: Stage | None, outputs: Kept | None = None) -> None:
        """Go on to the stage that comes after one.

        Args:
            stage: the one that was reached.
            then: the next; None after the last.
            outputs: what the first returns as it is now, where that is known.
        """
        calls = self._calls
        if calls is None or then is None or not calls.lead_to(then):
            self._calls = None
            return
        self._calls = calls.after(then, self.outputs(stage) if outputs is None else outputs)

    def outputs(self, stage: Stage) -> Iterator[list[Tensor]]:
        """Yield what a stage that was visited returns for each batch, as it is now."""
        calls = self._calls
        if calls is None or stage.path is None:
            return
        module = self._model.get_submodule(stage.path)
        with evaluating(module):
            for place in range(len(calls)):
                args, kwargs = calls.arguments(place)
                with of_batch(place), torch.no_grad():
                    found = list(tensors_in(module(*args, **kwargs)))
                yield found
