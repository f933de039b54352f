"""What example data shows of a model: its outputs, and which module hands its result to which."""

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from mono_quant.base import TransformContext
from mono_quant.numerics.metrics import times_written
from mono_quant.transforms.graph import LAYERS, Chain, Graph, Reach, Source, View
from mono_quant.transforms.tracing import is_leaf


def outputs_of(model: nn.Module, context: TransformContext, batches: int) -> list[list[Tensor]]:
    """Return a model's outputs for some batches of the example data; none without data.

    Random numbers of the CPU are the same each time, and go on afterwards as if nothing had run.
    """
    if context.outputs is None:
        return []
    state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        found = islice(context.outputs(model), batches)
        return [[output.detach() for output in outputs] for outputs in found]
    finally:
        torch.set_rng_state(state)


def agree(before: Sequence[Sequence[Tensor]], after: Sequence[Sequence[Tensor]]) -> bool:
    """Return whether outputs are the same but for rounding.

    The norm of their difference is at most the square root of the dtype's precision (3e-4 of
    float32, 0.03 of float16) times their own.
    """
    if [len(outputs) for outputs in before] != [len(outputs) for outputs in after]:
        return False
    pairs = zip(before, after, strict=True)
    return all(_close(x, y) for one, other in pairs for x, y in zip(one, other, strict=True))


def watch(
    model: nn.Module,
    context: TransformContext,
    batches: int,
    steps: frozenset[str] = frozenset(),
) -> tuple[View, ...]:
    """Return what some batches show, a view for each; no proof, for functions are not seen.

    A module follows another if the tensor that it is given is the very tensor that the other one
    returned, which nothing has written to since.

    Args:
        model: the model.
        context: with data; without, nothing is seen.
        batches: how many are run.
        steps: as for `trace`.
    """
    if context.outputs is None:
        return ()
    views: list[View] = []
    with _Watch(model, steps).attached() as watched:
        for _ in islice(context.outputs(model), batches):
            views.append(watched.view())
            watched.clear()
    return tuple(views)


def seen(
    model: nn.Module,
    context: TransformContext,
    reason: str,
    batches: int,
    steps: frozenset[str] = frozenset(),
) -> Graph:
    """Return the graph of a model that cannot be traced, for `reason`, as far as data shows it."""
    if context.outputs is None:
        why = f"{reason}, and without example data it cannot be watched; give some with fit(data)"
        return Graph((), why)
    return Graph(watch(model, context, batches, steps), reason)


class _Watch:
    """Hooks on every module that is one step, and what they saw of one batch."""

    def __init__(self, model: nn.Module, steps: frozenset[str]) -> None:
        """Watch `model`, once attached."""
        self._model = model
        self._steps = steps
        self.clear()

    def clear(self) -> None:
        """Forget what was seen."""
        self._calls: Counter[str] = Counter()
        self._made: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}
        self._edges: list[tuple[str | None, str]] = []
        self._dims: dict[str, set[int]] = {}

    @contextmanager
    def attached(self) -> Iterator["_Watch"]:
        """Watch as long as the context lasts."""
        with ExitStack() as hooks:
            for path, module in self._model.named_modules():
                step = is_leaf(module) or path in self._steps
                if step and not isinstance(module, torch.jit.ScriptModule):
                    hooks.callback(
                        module.register_forward_pre_hook(
                            partial(self._given, path), with_kwargs=True
                        ).remove
                    )
                    hooks.callback(
                        module.register_forward_hook(partial(self._returned, path)).remove
                    )
            yield self

    def view(self) -> View:
        """Return what was seen."""
        takers = Counter(giver for giver, _ in self._edges if giver is not None)
        after = {giver: taker for giver, taker in self._edges if giver is not None}
        chains = {path: self._chain(path, takers, after) for path in self._calls}
        sources = {path: Source(None, "its input comes from no module") for path in self._calls}
        sources |= {
            taker: Source(giver, f"its input comes from {giver!r}")
            for giver, taker in self._edges
            if giver is not None
        }
        flat = {path for path, dims in self._dims.items() if dims == {2}}
        reaches = {path: self._reach(path) for path in self._calls}
        return View(self._calls, chains, sources, reaches, frozenset(flat))

    def _reach(self, path: str) -> Reach:
        takers = [taker for giver, taker in self._edges if giver == path]
        if not takers:
            return Reach((), "its output goes to no module")
        others = [one for one in takers if not isinstance(self._model.get_submodule(one), LAYERS)]
        if others:
            return Reach((), f"its output feeds {others[0]!r}")
        if often := [one for one in takers if self._calls[one] > 1]:
            return Reach((), f"{often[0]!r} is called {self._calls[often[0]]} times")
        return Reach(
            tuple(dict.fromkeys(takers)), None if takers else "its output goes to no module"
        )

    def _chain(self, path: str, takers: Mapping[str, int], after: Mapping[str, str]) -> Chain:
        if takers[path] > 1:
            return Chain(reason=f"its output feeds {takers[path]} modules")
        then = after.get(path)
        if then is None:
            return Chain(reason="its output goes to no module")
        if self._calls[then] > 1:
            return Chain(reason=f"{then!r} is called {self._calls[then]} times")
        return Chain(then=then)

    def _given(
        self, path: str, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        self._calls[path] += 1
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                self._edges.append((self._giver(value), path))
                self._dims.setdefault(path, set()).add(value.dim())

    def _returned(self, path: str, module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor):
            self._made[id(output)] = (weakref.ref(output), times_written(output), path)

    def _giver(self, tensor: Tensor) -> str | None:
        made, version, path = self._made.get(id(tensor), (None, 0, None))
        same = made is not None and made() is tensor and times_written(tensor) == version
        return path if same else None


def _close(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    difference = (x.to("cpu", torch.float64) - y.to("cpu", torch.float64)).norm()
    room = torch.finfo(x.dtype).eps ** 0.5 * x.to("cpu", torch.float64).norm()
    return bool(difference <= room)  # not where one of them is NaN
