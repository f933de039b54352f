"""Roundings that take a whole block of layers at once."""

from collections import Counter
from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor, nn

from mono_quant.base import BlockCall, BlockRounding, BlockWeight, Change, PackedTensor, Rounding
from mono_quant.calibration import CalibrationData, Kept, evaluating
from mono_quant.checkpoint import copy_structure
from mono_quant.errors import InputError, Mend
from mono_quant.gathering import Gathered
from mono_quant.learning import LazyCalls
from mono_quant.plan.checks import check_finite, check_gathered
from mono_quant.plan.relay import Calls, Relay
from mono_quant.plan.request import WeightPlan
from mono_quant.plan.simulate import QuantizedInputs
from mono_quant.plan.stages import Stage

_PARAMETRIZED = "parametrizations"


@attrs.frozen(eq=False)
class _BlockCalls(LazyCalls):
    """Calls of a block beside what its float original returned."""

    calls: Calls
    targets: Kept

    def __len__(self) -> int:
        return len(self.targets)

    def at(self, place: int) -> BlockCall:
        """Return what is to be called, and what for."""
        args, kwargs = self.calls.arguments(place)
        return BlockCall(args, kwargs, self.targets[place])


@attrs.frozen(eq=False)
class BlockFit:
    """What is known of a stage before its layers are quantized.

    Attributes:
        weights: on their grids, by name: those whose rounding takes blocks.
        parameters: new values of what stays float, by name.
        changes: what to say of both.
    """

    weights: Mapping[str, PackedTensor] = attrs.field(factory=dict)
    parameters: Mapping[str, Tensor] = attrs.field(factory=dict)
    changes: tuple[Change, ...] = ()

    def put(self, model: nn.Module) -> None:
        """Give a model the new values, in tensors of its own."""
        for name, value in self.parameters.items():
            owner, _, own = name.rpartition(".")
            fresh = nn.Parameter(value, requires_grad=model.get_parameter(name).requires_grad)
            model.get_submodule(owner).register_parameter(own, fresh)


class BlockRun:
    """Fits the blocks of a model one after the other, beside a float twin of it."""

    def __init__(self, model: nn.Module, todo: Sequence[WeightPlan], data: CalibrationData) -> None:
        """Fit blocks of `model`, which is float still, where roundings of `todo` ask for it."""
        self.changes = [
            change
            for weight in todo
            if (why := _unfit(weight)) is not None
            for change in unlearned([weight], why)
        ]
        self._model = model
        self._twin = Relay(copy_structure(model), data) if _asked(todo) else None

    def fit(
        self,
        stage: Stage,
        gathered: Mapping[tuple[str, str], Gathered],
        calls: Calls | None,
        then: Stage | None,
    ) -> BlockFit:
        """Return what a stage's layers are to be quantized to, where their rounding takes blocks.

        Args:
            stage: whose layers are float still.
            gathered: what is known of inputs, by layer and weight.
            calls: what it is called with; None where it cannot be called again.
            then: the stage after it.
        """
        if self._twin is None:
            return BlockFit()
        if stage.path is None:
            why = "neither the first nor the last batch shows it"
            return BlockFit(changes=tuple(unlearned(stage.weights, why)))
        self._twin.reach(stage)
        weights: dict[str, PackedTensor] = {}
        parameters: dict[str, Tensor] = {}
        changes: list[Change] = []
        targets: Kept | None = None
        for rounding, asked in _asked(stage.weights).items():
            if calls is None or self._twin.calls is None:
                text = f"{stage.path!r} is not fitted as a block, since a batch calls it more than "
                text += "once, or with what cannot be kept, as a cache, or is written into; its "
                text += "weights are rounded one by one"
                changes.append(Change(stage.path, text, done=False))
                continue
            if targets is None:
                targets = Kept()
                targets.add_all(self._twin.outputs(stage))
            told = _BlockCalls(calls, targets)
            with QuantizedInputs(self._model, stage.weights, gathered) as inputs:
                found = self._fit(stage.path, rounding, asked, gathered, told)
            changes += (one for one in inputs.changes if one not in changes)
            weights |= found.weights
            parameters |= found.parameters
            changes += found.changes
        self._twin.leave(stage, then, targets)
        return BlockFit(weights, parameters, tuple(changes))

    def skip(self, stage: Stage, then: Stage | None) -> None:
        """Go past a stage that was fitted before."""
        if self._twin is not None and stage.path is not None:
            self._twin.reach(stage)
            self._twin.leave(stage, then)

    def _fit(
        self,
        path: str,
        rounding: BlockRounding,
        weights: Sequence[WeightPlan],
        gathered: Mapping[tuple[str, str], Gathered],
        calls: Sequence[BlockCall],
    ) -> BlockFit:
        block, prefix = self._model.get_submodule(path), f"{path}." if path else ""
        names = {weight.key.removeprefix(prefix): weight for weight in weights}
        asked: dict[str, BlockWeight] = {}
        dtypes: dict[str, torch.dtype] = {}
        for name, weight in names.items():
            view = weight.maker.weights(self._model.get_submodule(weight.path))[weight.name]
            assert weight.recipe is not None  # it is asked for by its rounding
            statistics = gathered.get((weight.path, weight.name), Gathered()).rows
            check_gathered(weight, statistics)
            stack = view.stack()
            check_finite(weight.key, stack)
            asked[name] = BlockWeight(stack, view.layout, weight.recipe.grid, statistics)
            dtypes[name] = view.native.dtype
        try:
            with evaluating(block):
                fitted = rounding.fit(block, asked, calls, self._free(block))
        except InputError as reason:
            text = f"{path!r} cannot be fitted as a block: {reason}"
            raise InputError(text, Mend.ROUNDING, layer=path or "*") from reason
        packed = {
            names[name].key: PackedTensor.pack(
                q, asked[name].grid.scheme, asked[name].layout, dtypes[name]
            )
            for name, q in fitted.weights.items()
        }
        parameters = {f"{prefix}{name}": value for name, value in fitted.parameters.items()}
        text = f"{path!r} is fitted with {len(parameters)} of its biases and norms"
        return BlockFit(packed, parameters, (Change(path, text),) if parameters else ())

    def _free(self, block: nn.Module) -> list[str]:
        """Return names of the vectors of a block that nothing else in the model shares."""
        used = Counter(id(one) for _, one in self._model.named_parameters(remove_duplicate=False))
        return [
            name
            for name, one in block.named_parameters()
            if one.dim() == 1
            and one.is_floating_point()
            and used[id(one)] == 1
            and _PARAMETRIZED not in name.split(".")
        ]


def _asked(todo: Sequence[WeightPlan]) -> Mapping[BlockRounding, list[WeightPlan]]:
    """Return the weights that are fitted in blocks, by their rounding."""
    found: dict[BlockRounding, list[WeightPlan]] = {}
    for weight in todo:
        rounding = _rounding(weight)
        if isinstance(rounding, BlockRounding) and _unfit(weight) is None and not weight.tied_to:
            found.setdefault(rounding, []).append(weight)
    return found


def unlearned(todo: Sequence[WeightPlan], why: str) -> list[Change]:
    """Return that weights whose rounding takes blocks are rounded one by one, and why."""
    own = [weight for weight in todo if weight.tied_to is None]  # others are what they share
    keys = [weight.key for weight in own if isinstance(_rounding(weight), BlockRounding)]
    text = "is rounded apart from its block"
    return [Change(key, f"{key} {text}: {why}", done=False) for key in keys]


def on_floats(todo: Sequence[WeightPlan]) -> list[Change]:
    """Return that roundings see other inputs than they want, where statistics are given."""
    kinds = {type(one).__name__: one for weight in todo if (one := _rounding(weight)) is not None}
    return [
        Change(
            "",
            f"{name} sees the inputs that the float model makes, as the statistics have them, and "
            "not those that quantized blocks make of the data",
            done=False,
        )
        for name, one in kinds.items()
        if one.sequential
    ]


def _rounding(weight: WeightPlan) -> Rounding | None:
    return weight.recipe.rounding if weight.recipe is not None else None


def _unfit(weight: WeightPlan) -> str | None:
    """Return why a weight cannot be changed in a block that is run, or None."""
    if weight.sources != (weight.key,):
        return "it is made of other parameters"
    if weight.recipe is not None and weight.recipe.grid.scheme.columns_apart is not None:
        return "some of its columns are kept apart"
    return None
