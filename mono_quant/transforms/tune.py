"""Scales, biases and norms of a whole quantized model, learned by what it returns."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import ClassVar, NamedTuple

import attrs
import torch
from torch import Tensor, nn

from mono_quant.base import (
    BlockCall,
    Change,
    Correction,
    CorrectionContext,
    InnerOutputs,
    PackedTensor,
    QuantizedModule,
)
from mono_quant.configurable import register
from mono_quant.errors import InputError
from mono_quant.learning import (
    Best,
    Clock,
    LazyCalls,
    LearnedWeight,
    Trial,
    check_budget,
    descend,
    shuffled,
)
from mono_quant.numerics.metrics import SquaredError, tensor_bytes
from mono_quant.numerics.nested import tensors_in
from mono_quant.text import format_db

_HELD = 1 << 28  # bytes of outputs of the float model that are held; others are made again


@register
@attrs.frozen
class TuneScales(Correction):
    """Learns the scales of all weights, biases and norms by what the whole model returns.

    Codes stay as they are. Each step runs the model on one batch, forward and back, beside the
    float model's outputs for it; by Adam, at rates that fall to zero. A rounding looks at a layer
    or a block at a time; what is learned here makes up for what all their errors come to. Ends with
    what left the least error over all batches, which is what there was if nothing helped.

    The model is run as its float twin with other weights, and has to compute with gradients. Of a
    batch that calls it several times, the first call counts. Weights that share their memory are
    learned as one. Activations of the whole model are held for one batch, as in training, and the
    arguments of all batches.

    Source: Chen et al. 2024, "EfficientQAT: Efficient Quantization-Aware Training for Large
    Language Models", section 3.3, https://arxiv.org/abs/2407.11062.

    Attributes:
        steps: of one batch each.
        minutes: stop after this long; results then depend on the machine's speed. None for no
            limit.
        scale_rate: rate of scales of 16 levels, as a share of them. It is as many times higher for
            fewer levels, and lower for more, as those lie further or less apart: what scales can
            make up for grows with that.
        float_rate: rate of what stays float.
        seed: of the order of batches.
    """

    kind: ClassVar[str] = "tune_scales"
    steps: int = 64
    minutes: float | None = None
    scale_rate: float = 1e-3
    float_rate: float = 1e-3
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        """Refuse what is no learning."""
        check_budget(self.steps, self.minutes, self.seed, self.scale_rate, self.float_rate)

    def apply(self, model: nn.Module, context: CorrectionContext) -> tuple[Change, ...]:
        """Learn, and return what came of it."""
        outputs = context.outputs
        assert outputs is not None  # a plan without data has refused it
        found = _Found.of(model, context.floats)
        if isinstance(found, str):
            return (_left_alone(found),)
        calls = _Calls.of(context.floats, outputs)
        if isinstance(calls, str):
            return (_left_alone(calls),)
        weights = {
            name: LearnedWeight(packed.unpack(), packed.scheme, packed.layout)
            for name, packed in found.weights.items()
        }
        trial = Trial(context.floats, weights, found.floats, found.inputs_on_grids)
        with _evaluating(context.floats):
            try:
                before, after = self._learn(trial, calls)
            except InputError as reason:
                return (_left_alone(str(reason)),)
        found.put(model, weights)
        text = f"scales, biases and norms are tuned to what the model returns: {before} to {after}"
        return (Change("", text, done=before != after), *found.unseen)

    def _learn(self, trial: Trial, calls: "_Calls") -> tuple[str, str]:
        """Change what is learned in place; return the SQNR of the outputs before and after."""
        stretches: dict[float, list[Tensor]] = {}
        for one in trial.weights.values():
            if one.scales:
                stretches.setdefault(self.scale_rate * one.apart, []).append(one.stretch)
        groups = [*stretches.items(), (self.float_rate, list(trial.floats.values()))]
        best = Best(trial, calls)
        before = best.error
        clock = Clock(self.steps, self.minutes)
        descend(trial, calls, groups, shuffled(len(calls), self.seed), clock, 1.0)
        best.offer()
        best.restore()
        levels = (SquaredError(calls.signal, error).sqnr_db for error in (before, best.error))
        first, last = map(format_db, levels)
        return first, last


class _Found(NamedTuple):
    """What of a quantized model can be learned, by its names in the float twin.

    Attributes:
        twin: the float model.
        weights: on their grids.
        floats: copies of biases and norms, float32.
        layers: the quantized layers by path.
        unseen: layers whose quantized inputs the twin does not show.
    """

    twin: nn.Module
    weights: Mapping[str, PackedTensor]
    floats: Mapping[str, Tensor]
    layers: Mapping[str, QuantizedModule]
    unseen: tuple[Change, ...]

    @classmethod
    def of(cls, model: nn.Module, twin: nn.Module) -> "_Found | str":
        """Return what there is, or why the twin cannot be run in the model's place."""
        known = dict(twin.named_parameters(remove_duplicate=False))
        layers = {
            path: one for path, one in model.named_modules() if isinstance(one, QuantizedModule)
        }
        weights: dict[str, PackedTensor] = {}
        seen: set[int] = set()
        for path, layer in layers.items():
            for name, packed in layer.packed_weights().items():
                key = f"{path}.{name}" if path else name
                if key not in known:
                    return f"{key} is made of other parameters"
                if id(packed.tensors["codes"]) not in seen:
                    seen.add(id(packed.tensors["codes"]))
                    weights[key] = packed
        used = Counter(id(one) for _, one in model.named_parameters(remove_duplicate=False))
        floats: dict[str, Tensor] = {}
        for key, one in model.named_parameters():
            if key not in known:
                return f"{key} was added when it was quantized"
            if one.dim() == 1 and one.is_floating_point() and used[id(one)] == 1:
                floats[key] = one.detach().to(torch.float32, copy=True)
        found = cls(twin, weights, floats, layers, ())
        with ExitStack() as stack:
            unseen = tuple(found._enter(stack))
        return found._replace(unseen=unseen)

    def inputs_on_grids(self) -> ExitStack:
        """Return what has the layers of the twin put their inputs on their grids."""
        stack = ExitStack()
        for _ in self._enter(stack):
            pass
        return stack

    def _enter(self, stack: ExitStack) -> Iterator[Change]:
        """Have layers put their inputs on grids, and yield what to say of those that do not."""
        for path, layer in self.layers.items():
            activations, maker = layer.activations(), layer.made_by
            if not activations:
                continue
            twin = self.twin.get_submodule(path)
            context = maker.quantizing_inputs(twin, activations) if maker is not None else None
            if context is None:
                text = f"the inputs of {path!r} are quantized, which is not seen while scales are "
                yield Change(path, f"{text}tuned", done=False)
            else:
                stack.enter_context(context)

    @torch.no_grad()
    def put(self, model: nn.Module, weights: Mapping[str, LearnedWeight]) -> None:
        """Give the model what was learned: scales in place, biases and norms as new parameters."""
        for key, packed in self.weights.items():
            made = PackedTensor.pack(
                weights[key].rounded(), packed.scheme, packed.layout, packed.dtype
            )
            for name, tensor in packed.tensors.items():
                if name != "codes" and not torch.equal(tensor, made.tensors[name]):
                    tensor.copy_(made.tensors[name])
        for key, value in self.floats.items():
            owner, _, own = key.rpartition(".")
            old = model.get_parameter(key)
            if not torch.equal(value, old.to(torch.float32)):
                fresh = nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad)
                model.get_submodule(owner).register_parameter(own, fresh)


class _Calls(LazyCalls):
    """The calls of the float model, with what it returned: held up to a bound, or made again.

    Attributes:
        signal: sum of the squared outputs.
    """

    def __init__(self, floats: nn.Module) -> None:
        self._floats = floats
        self._given: list[tuple[tuple[object, ...], dict[str, object]]] = []
        self._targets: dict[int, list[Tensor]] = {}
        self._left = _HELD
        self.signal = 0.0

    @classmethod
    def of(cls, floats: nn.Module, outputs: InnerOutputs) -> "_Calls | str":
        """Return the calls that the data makes, or why they cannot be made again."""
        calls = cls(floats)

        def see(
            _: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], out: object
        ) -> None:
            calls._see(args, kwargs, list(tensors_in(out)))

        handle = floats.register_forward_hook(see, with_kwargs=True)
        try:
            count = sum(1 for _ in outputs(floats, floats))
        finally:
            handle.remove()
        return calls if len(calls) == count else "a batch does not call the model itself"

    def _see(
        self, args: tuple[object, ...], kwargs: dict[str, object], found: Sequence[Tensor]
    ) -> None:
        place, found = len(self._given), [one.detach() for one in found]
        self._given.append((args, kwargs))
        floats = [one for one in found if one.is_floating_point()]
        self.signal += sum(SquaredError.between(one, one).signal for one in floats)
        self._left -= sum(map(tensor_bytes, found))
        if self._left >= 0:
            self._targets[place] = [one.clone() for one in found]

    def __len__(self) -> int:
        return len(self._given)

    def at(self, place: int) -> BlockCall:
        """Return a call and what the float model returns for it."""
        args, kwargs = self._given[place]
        targets = self._targets.get(place)
        if targets is None:
            with torch.no_grad():
                targets = list(tensors_in(self._floats(*args, **kwargs)))
        return BlockCall(args, kwargs, targets)


def _left_alone(reason: str) -> Change:
    return Change("", f"scales are not tuned to what the model returns: {reason}", done=False)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Have a model in eval mode, and every module back in its own afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
