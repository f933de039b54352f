"""The parts of a model that are quantized one after the other, and what is handed between them."""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import attrs
import torch
from torch import Tensor, nn

from mono_quant.calibration import CalibrationData
from mono_quant.numerics.metrics import times_written
from mono_quant.numerics.nested import each, tensors_in
from mono_quant.plan.request import WeightPlan

_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)

Place = tuple[bool, int]
"""Which of the tensors that a module returned (or else was given)."""


@attrs.frozen
class Slot:
    """Where a tensor stands among arguments, by its number."""

    number: int


_PLAIN = {type(None), bool, int, float, str, torch.dtype, torch.device}
"""Exactly these: a subclass may hold anything."""

_MAPPINGS = {dict, OrderedDict}
"""Those that a plain one can stand in for."""


def taken_apart(args: object, kwargs: object) -> tuple[object, list[Tensor]]:
    """Return arguments with slots in place of tensors, and the tensors, each of them once."""
    found: list[Tensor] = []
    numbers: dict[int, int] = {}

    def slot(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        number = numbers.setdefault(id(value), len(found))
        if number == len(found):
            found.append(value)
        return Slot(number)

    return each((args, kwargs), slot), found


def plain(value: object) -> bool:
    """Return whether arguments are tensors and plain values, in nothing but plain containers."""
    if isinstance(value, Mapping):
        return type(value) in _MAPPINGS and all(map(plain, value.values()))
    if isinstance(value, list):
        return type(value) is list and all(map(plain, value))
    if isinstance(value, tuple):
        return all(map(plain, value))
    return isinstance(value, Tensor) or type(value) in _PLAIN


@attrs.frozen(eq=False)
class Stage:
    """A part of a model, with the weights in it.

    Attributes:
        path: dotted name of the module; None for layers that no data reaches.
        weights: those that are quantized with it.
        calls: how often a batch calls it; 0 if batches differ in that.
        form: its arguments, with slots for tensors, where it is called once and can be called again
            with the same ones: tensors and plain values, none of which it writes to; else None.
        follows: where each tensor that it takes stood in the one call of the stage before it; None
            where something else makes one, or where batches differ in form.
    """

    path: str | None
    weights: tuple[WeightPlan, ...]
    calls: int = 0
    form: object = None
    follows: tuple[Place, ...] | None = None


def stages_of(
    model: nn.Module, todo: Sequence[WeightPlan], data: CalibrationData
) -> tuple[Stage, ...]:
    """Return the stages of a model, in the order in which it calls them.

    Blocks are the entries of the outermost lists of modules (`nn.ModuleList`, `nn.Sequential`,
    `nn.ModuleDict`) in which several have weights to quantize; outside of those a layer is a block.
    The model runs on two batches, which show the order and what is handed from block to block.

    A layer that shares the weight of another one waits for it.
    """
    blocks = {weight.path: block_of(model, weight.path, todo) for weight in todo}
    seen = _Watch(model, set(blocks.values()), data)
    places = {path: seen.place(block) for path, block in blocks.items()}
    for weight in todo:  # those that share come after those that they share with
        if weight.tied_to is not None:
            places[weight.path] = max(places[weight.path], places[weight.tied_to.path])
    found = []
    for place, block in enumerate([*seen.order, None]):
        here = tuple(weight for weight in todo if places[weight.path] == place)
        if not here:
            continue
        stage = seen.stage(block, here)
        if any(blocks[weight.path] != block for weight in here):  # those that waited
            stage = attrs.evolve(stage, follows=None)  # are reached by the whole model alone
        found.append(stage)
    return tuple(found)


def block_of(model: nn.Module, path: str, todo: Iterable[WeightPlan]) -> str:
    """Return the name of the block that a layer belongs to: itself, or an entry of a list."""
    names = path.split(".") if path else []
    for depth in range(len(names)):
        above = ".".join(names[:depth])
        if not isinstance(model.get_submodule(above), _LISTS):
            continue
        prefix = f"{above}." if above else ""
        entries = {
            weight.path.removeprefix(prefix).partition(".")[0]
            for weight in todo
            if weight.path.startswith(prefix)
        }
        entry = ".".join(names[: depth + 1])
        if len(entries) > 1 and not isinstance(model.get_submodule(entry), _LISTS):
            return entry
    return path


@attrs.frozen(eq=False)
class _Call:
    """One call of a block, while its tensors live.

    Attributes:
        block: its name.
        form: its arguments, with slots for tensors.
        given: the tensors in its arguments.
        returned: those in its result.
        versions: how often each of all these had been written to when the call ended, by identity.
        repeatable: whether nothing but tensors and plain values came in, and it wrote to none.
    """

    block: str
    form: object
    given: list[Tensor]
    returned: list[Tensor]
    versions: Mapping[int, int]
    repeatable: bool

    def place(self, tensor: Tensor) -> Place | None:
        """Return where a tensor stood in this call, unless it was written to since."""
        if self.versions.get(id(tensor)) != times_written(tensor):
            return None
        for returned, known in ((True, self.returned), (False, self.given)):
            for number, one in enumerate(known):
                if one is tensor:
                    return returned, number
        return None


class _Watch:
    """How a model calls its blocks."""

    def __init__(self, model: nn.Module, blocks: set[str], data: CalibrationData) -> None:
        """Run the model on two batches, and note the calls of `blocks`."""
        self._counts: dict[str, set[int]] = {}
        self._calls: dict[str, list[_Call]] = {}
        self._follows: dict[tuple[str, str], set[tuple[Place, ...] | None]] = {}
        for batch in data.first_and_last():
            calls = _calls_of(model, blocks, batch)
            for block, count in Counter(call.block for call in calls).items():
                self._counts.setdefault(block, set()).add(count)
            for place, call in enumerate(calls):
                self._calls.setdefault(call.block, []).append(call)
                if place:
                    before = calls[place - 1]
                    places = [before.place(one) for one in call.given]
                    known = tuple(found for found in places if found is not None)
                    self._follows.setdefault((before.block, call.block), set()).add(
                        known if len(known) == len(places) else None
                    )

    @property
    def order(self) -> list[str]:
        """The blocks that were called, first calls first."""
        return list(self._calls)

    def place(self, block: str) -> int:
        """Return the number of a block in `order`; behind all others if it was not called."""
        return self.order.index(block) if block in self._calls else len(self._calls)

    def stage(self, block: str | None, weights: tuple[WeightPlan, ...]) -> Stage:
        """Return a block with its weights."""
        if block is None:
            return Stage(None, weights)
        counts, calls = self._counts[block], self._calls[block]
        often = max(counts) if len(counts) == 1 else 0
        form = calls[0].form
        if often != 1 or not all(call.repeatable for call in calls):
            return Stage(block, weights, often)
        if any(call.form != form for call in calls):
            return Stage(block, weights, often, form)
        place = self.place(block)
        ways = self._follows.get((self.order[place - 1], block), {None}) if place else {None}
        return Stage(block, weights, often, form, ways.pop() if len(ways) == 1 else None)


def _calls_of(model: nn.Module, blocks: set[str], batch: CalibrationData) -> list[_Call]:
    """Return the calls of blocks on one batch, in their order, with the tensors kept alive."""
    calls: list[_Call] = []
    entered: dict[str, dict[int, int]] = {}

    def enter(block: str, _: nn.Module, args: object, kwargs: object) -> None:
        entered[block] = _versions(taken_apart(args, kwargs)[1])

    def leave(block: str, _: nn.Module, args: object, kwargs: object, output: object) -> None:
        form, given = taken_apart(args, kwargs)
        returned = list(tensors_in(output))
        versions = _versions((*given, *returned))
        written = any(versions.get(key, times) != times for key, times in entered[block].items())
        repeatable = not written and plain((args, kwargs))
        calls.append(_Call(block, form, given, returned, versions, repeatable))

    with ExitStack() as hooks:
        for block in blocks:
            module = model.get_submodule(block)
            first = module.register_forward_pre_hook(partial(enter, block), with_kwargs=True)
            last = module.register_forward_hook(partial(leave, block), with_kwargs=True)
            hooks.callback(first.remove)
            hooks.callback(last.remove)
        for _ in batch.outputs(model):
            pass
    return calls


def _versions(tensors: Iterable[Tensor]) -> dict[int, int]:
    return {id(tensor): times_written(tensor) for tensor in tensors}
