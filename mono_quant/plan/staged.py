"""What modules inside a model return, each found from the stage that it is in."""

from collections.abc import Iterator, Sequence
from itertools import islice, pairwise

from torch import Tensor, nn

from mono_quant.calibration import CalibrationData
from mono_quant.numerics.metrics import times_written
from mono_quant.numerics.nested import tensors_in
from mono_quant.plan.relay import Relay
from mono_quant.plan.request import WeightPlan
from mono_quant.plan.stages import Stage, stages_of


class StagedOutputs:
    """`InnerOutputs` that need not run a model from its beginning for each module in turn.

    The stages of one model are run one after the other, each on what the one before it returned,
    and those that were left are not run again: where modules are asked for in the order in which
    they are called, the time does not grow with the square of their number. Going back, a change of
    what was left behind, a stage that cannot be called again, and any other model: all these run
    the whole of it, up to the module.
    """

    def __init__(self, model: nn.Module, todo: Sequence[WeightPlan], data: CalibrationData) -> None:
        """Know what is run.

        Args:
            model: whose stages are told by the layers of `todo`.
            todo: weights of it.
            data: what it is run on.
        """
        self._model, self._todo, self._data = model, todo, data
        self._stages: tuple[Stage, ...] | None = None
        self._relay = Relay(model, data)
        self._place: int | None = None
        self._behind: list[tuple[int, int]] = []

    def __call__(self, model: nn.Module, of: nn.Module) -> Iterator[Sequence[Tensor]]:
        """Yield what a module inside a model returns for each batch; see `InnerOutputs`."""
        done = 0
        stage = self._reached(of) if model is self._model else None
        if stage is not None:
            for found in self._inside(stage, of):
                if found is None:  # the module was not called
                    break
                done += 1
                yield found
            else:
                return
        yield from islice(self._data.inner_outputs(model, of), done, None)

    def _inside(self, stage: Stage, of: nn.Module) -> Iterator[list[Tensor] | None]:
        """Yield what a module inside a stage returns when it is called first, or None."""
        first: list[list[Tensor]] = []

        def keep(_: nn.Module, __: tuple[object, ...], output: object) -> None:
            if not first:
                first.append(list(tensors_in(output)))

        handle = of.register_forward_hook(keep)
        try:
            for _ in self._relay.outputs(stage):
                yield first.pop() if first else None
        finally:
            handle.remove()

    def _reached(self, of: nn.Module) -> Stage | None:
        """Return the stage of a module, once it can be run by itself; None if it cannot."""
        if self._stages is None:
            self._stages = stages_of(self._model, self._todo, self._data)
        path = next((path for path, one in self._model.named_modules() if one is of), None)
        place = next(
            (place for place, one in enumerate(self._stages) if _holds(one.path, path)), None
        )
        if place is None:
            return None
        if self._place is None or place < self._place or self._behind != self._left(self._place):
            self._relay = Relay(self._model, self._data)
        else:
            for left, then in pairwise(self._stages[self._place : place + 1]):
                self._relay.leave(left, then)
        stage = self._stages[place]
        self._relay.reach(stage)
        if place != self._place:
            self._place, self._behind = place, self._left(place)
        return stage if self._relay.calls is not None else None

    def _left(self, place: int) -> list[tuple[int, int]]:
        """Return the tensors of what is run before a stage, and how often each was written to."""
        assert self._stages is not None  # a place is one of them
        ahead = [stage.path for stage in self._stages[place:]]
        modules = (
            one
            for path, one in self._model.named_modules()
            if not any(_holds(other, path) for other in ahead)
        )
        return [
            (id(tensor), times_written(tensor))
            for one in modules
            for tensor in (*one.parameters(recurse=False), *one.buffers(recurse=False))
        ]


def _holds(stage: str | None, path: str | None) -> bool:
    """Return whether a module is a stage, or lies within it."""
    if stage is None or path is None:
        return False
    return not stage or path == stage or path.startswith(f"{stage}.")
