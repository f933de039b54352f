"""Rounding that is learned: all weights of a block, by what the block returns."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn
from torch.func import functional_call

from mono_quant.base import (
    AnyStatistic,
    BlockCall,
    BlockRounding,
    BlockWeight,
    FittedBlock,
    Grid,
    Rounding,
    Scheme,
    Statistics,
)
from mono_quant.configurable import is_count, register
from mono_quant.errors import ConfigurationError, InputError
from mono_quant.numerics.blocks import meet
from mono_quant.numerics.extremes import all_finite
from mono_quant.numerics.granularity import Shape
from mono_quant.numerics.nested import tensors_in
from mono_quant.numerics.values import QTensor
from mono_quant.rounding.gptq import GPTQ
from mono_quant.rounding.scales import levels_of

_BETAS = (0.9, 0.95)
_NEAR = 0.45
"""How far from its grid point a weight begins at most, in steps: at a half it is another one.

A weight that was put on a grid point further away begins right there.
"""


@register
@attrs.frozen
class LearnedRounding(BlockRounding):
    """Grid points, scales and what stays float of a block, learned to return what float returns.

    The block is run on what the quantized blocks before it make of the data, and its outputs are
    held against those of the float model, so that it also makes up for their error. Learned are

    - the grid point of each weight: its value moves, by one step of the grid at most, and is
      rounded on the way forward as if it were not (a straight-through estimator),
    - its scales, by what they were times ``1 + v``,
    - with `tune_floats`, the parameters of the block that stay float: biases and norms.

    It begins with what another rounding returns, and ends with what left the least error over all
    batches: that, what there was halfway, or the end. So a block is never worse on the data than it
    was.

    All by Adam, at rates that fall to zero. Grid points stay as they are for the first half of the
    steps, so that values move away from them only for what nothing else can mend.

    Source: Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization",
    https://arxiv.org/abs/2004.10568 (rounding against what is returned); Cheng et al. 2023,
    "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs",
    https://arxiv.org/abs/2309.05516 (by block and straight through); Esser et al. 2020, "Learned
    Step Size Quantization", https://arxiv.org/abs/1902.08153 (scales).

    Attributes:
        steps: of one batch each, for each block.
        minutes: stop a block after this long, for a budget of time; results then depend on the
            machine's speed. None for no limit.
        start: the rounding to begin with.
        rounding_rate: rate of the values of weights, in steps of their grid; 0 keeps grid points.
        scale_rate: rate of scales, as a share of them.
        float_rate: rate of what stays float.
        tune_floats: whether biases and norms are learned, too.
        seed: of the order of batches.
    """

    kind: ClassVar[str] = "learned"
    steps: int = 64
    minutes: float | None = None
    start: Rounding = attrs.field(factory=GPTQ)
    rounding_rate: float = 0.001
    scale_rate: float = 1e-3
    float_rate: float = 1e-3
    tune_floats: bool = True
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        """Refuse what is no learning."""
        if not is_count(self.steps, 1):
            raise ConfigurationError(f"steps is a whole number, 1 or more, not {self.steps!r}")
        if not is_count(self.seed, 0):
            raise ConfigurationError(f"seed is a whole number, 0 or more, not {self.seed!r}")
        if self.minutes is not None and not self.minutes > 0:
            raise ConfigurationError(f"minutes is more than 0, not {self.minutes!r}")
        start: object = self.start  # which may come from a configuration, or be a class
        if not isinstance(start, Rounding) or isinstance(start, BlockRounding):
            raise ConfigurationError("start rounds weights one by one: GPTQ() or RoundToNearest()")
        rates = (self.rounding_rate, self.scale_rate, self.float_rate)
        if not all(rate >= 0 for rate in rates):  # NaN is none
            raise ConfigurationError("rates are 0 or more")

    def describe(self) -> str:
        """Return what is learned, and what that takes."""
        what = "grid points, scales" if self.rounding_rate else "scales"
        floats = " and biases" if self.tune_floats else ""
        limit = f" or {self.minutes:g} minutes" if self.minutes is not None else ""
        return (
            f"{self.start.describe()}; then {what}{floats} are learned, each block in "
            f"{self.steps} steps{limit} of one batch, forward and back (its activations are not in "
            "the peak of memory)"
        )

    def work_bytes(self, shape: Shape) -> int:
        """Return what it begins with takes, and a dozen floats for each weight; no activations."""
        return self.start.work_bytes(shape) + 12 * 4 * math.prod(shape)

    @property
    def batches(self) -> int | None:
        """One for each step; not known where minutes are the limit."""
        return self.steps if self.minutes is None else None

    @property
    def needs(self) -> tuple[AnyStatistic, ...]:
        """What the rounding to begin with needs."""
        return self.start.needs

    def refuse(self, scheme: Scheme) -> str | None:
        """Return why the rounding to begin with cannot use a grid, or None."""
        return self.start.refuse(scheme)

    def round(self, weight: Tensor, grid: Grid, statistics: Statistics) -> QTensor:
        """Return what the rounding to begin with returns, for a weight without a block."""
        return self.start.round(weight, grid, statistics)

    def fit(
        self,
        block: nn.Module,
        weights: Mapping[str, BlockWeight],
        calls: Sequence[BlockCall],
        free: Sequence[str],
    ) -> FittedBlock:
        """Return the weights of a block on their grids, and its floats."""
        learned = {name: _LearnedWeight(one, self.start) for name, one in weights.items()}
        floats = {
            name: block.get_parameter(name).detach().to(torch.float32, copy=True)
            for name in (free if self.tune_floats else ())
        }
        trial = _Trial(block, learned, floats)
        if len(calls):
            self._learn(trial, calls)
        return FittedBlock(
            {name: one.rounded() for name, one in learned.items()},
            {
                name: value.to(old.dtype)
                for name, value in floats.items()
                if not torch.equal(value, (old := block.get_parameter(name)).to(torch.float32))
            },
        )

    def _learn(self, trial: "_Trial", calls: Sequence[BlockCall]) -> None:
        """Change what is learned in place: what scales and floats can do first, then all of it."""
        weights = trial.weights.values()
        groups = [
            (self.scale_rate, [one.stretch for one in weights if one.scales]),
            (self.float_rate, list(trial.floats.values())),
        ]
        best = _Best(trial, calls)
        first = 0.5 if self.rounding_rate else 1.0
        clock, order = _Clock(self.steps, self.minutes), self._order(len(calls))
        self._descend(trial, calls, groups, order, clock, first)
        best.offer()
        if self.rounding_rate:
            for one in weights:
                one.release()
            groups.append((self.rounding_rate, [one.moved for one in weights]))
            self._descend(trial, calls, groups, order, clock, 1.0)
            best.offer()
        best.restore()

    def _descend(
        self,
        trial: "_Trial",
        calls: Sequence[BlockCall],
        groups: Sequence[tuple[float, Sequence[Tensor]]],
        order: Iterator[int],
        clock: "_Clock",
        until: float,
    ) -> None:
        """Follow the gradient of some tensors, each group at its rate, which falls to zero.

        Args:
            trial: what is run.
            calls: the batches.
            groups: a rate and its tensors.
            order: of the batches.
            clock: what share of the budget is spent.
            until: which share to stop at.
        """
        groups = [(rate, tensors) for rate, tensors in groups if rate and tensors]
        begun = clock.spent
        if not groups or begun >= until:
            return
        optimizers = [torch.optim.Adam(tensors, betas=_BETAS) for _, tensors in groups]
        tensors = [tensor for _, found in groups for tensor in found]
        for tensor in tensors:
            tensor.requires_grad_(True)
        while (spent := clock.spent) < until:
            trial.learn_from(calls[next(order)], tensors)
            for optimizer, (rate, _) in zip(optimizers, groups, strict=True):
                optimizer.param_groups[0]["lr"] = rate * (until - spent) / (until - begun)
                optimizer.step()
                optimizer.zero_grad()
            clock.tick()
        for tensor in tensors:
            tensor.requires_grad_(False)

    def _order(self, count: int) -> Iterator[int]:
        """Yield which batch each step takes: all once before any again, shuffled each time."""
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield from torch.randperm(count, generator=generator).tolist()


class _Clock:
    """What share of the steps, or of the minutes if there is a limit, is spent."""

    def __init__(self, steps: int, minutes: float | None) -> None:
        """Begin."""
        self._steps, self._seconds = steps, 60 * minutes if minutes is not None else math.inf
        self._done, self._begun = 0, time.monotonic()

    def tick(self) -> None:
        """Count a step."""
        self._done += 1

    @property
    def spent(self) -> float:
        """The share, from 0 to 1."""
        return max(self._done / self._steps, (time.monotonic() - self._begun) / self._seconds)


class _Best:
    """What left the least error of all that was offered, the beginning included."""

    def __init__(self, trial: "_Trial", calls: Sequence[BlockCall]) -> None:
        """Begin with what there is."""
        self._trial, self._calls = trial, calls
        self._error, self._kept = trial.error(calls), trial.state()

    def offer(self) -> None:
        """Keep what there is now, if it is better."""
        error = self._trial.error(self._calls)
        if error < self._error:
            self._error, self._kept = error, self._trial.state()

    def restore(self) -> None:
        """Go back to what was best."""
        self._trial.load(self._kept)


class _LearnedWeight:
    """A weight of which scales and, once it is released, grid points are learned.

    Attributes:
        moved: how far each value is from where it was released, in steps of the grid, at most one,
            ``[G, out, in]``.
        stretch: by which share each scale grew, shaped like the scales.
        scales: whether scales can be learned: values are then levels times scales.
    """

    def __init__(self, weight: BlockWeight, start: Rounding) -> None:
        """Begin with what another rounding returns."""
        self._scheme, self._layout, self._wanted = weight.grid.scheme, weight.layout, weight.stack
        self._q = start.round(weight.stack, weight.grid, weight.statistics)
        self._scale = self._scheme.scales(self._q.qparams)
        self.scales = self._scale is not None
        self.stretch = torch.zeros(()) if self._scale is None else torch.zeros_like(self._scale)
        self.moved = torch.zeros(())
        self._values: Tensor | None = None
        self._size = self.moved

    def release(self) -> None:
        """Let values leave their grid points, each from where the float weight is near it."""
        self._q = self.rounded()
        self._values = self._scheme.dequantize(self._q)
        self._size = self._step_size(self._values)
        near = (self._wanted - self._values).div_(self._size)
        self.moved = near.masked_fill_(~(near.abs() < 0.5), 0).clamp_(-_NEAR, _NEAR)

    def native(self) -> Tensor:
        """Return the weight on its grid, as its layer holds it, with gradients."""
        q = self.rounded()
        values = self._scheme.dequantize(q)
        stored = self._scheme.scales(q.qparams)
        if self._scale is not None and stored is not None:
            levels = levels_of(self._scheme, q, stored)
            blocks, scale = meet(levels, q.qparams.block_size, self._scale * (1 + self.stretch))
            grown = (blocks * scale).reshape(values.shape)
            values = values + (grown - grown.detach())  # its gradient alone
        passed = values + (self.moved - self.moved.detach())  # its gradient alone
        return self._layout.to_native(passed)

    @torch.no_grad()
    def rounded(self) -> QTensor:
        """Return the weight on its grid."""
        qparams = self._q.qparams
        if self._scale is not None:
            qparams = self._scheme.rescaled(qparams, self._scale * (1 + self.stretch))
        if self._values is None:
            return QTensor(self._q.codes, qparams, self._q.dtype)
        moved = self.moved.clamp_(-1, 1)
        return self._scheme.quantize(self._values + moved * self._size, qparams)

    def fix(self, q: QTensor) -> None:
        """Be this weight from now on."""
        self._q, self._values, self.moved = q, None, torch.zeros(())
        if self._scale is not None:
            self.stretch = torch.zeros_like(self._scale)
            self._scale = self._scheme.scales(q.qparams)

    def _step_size(self, values: Tensor) -> Tensor:
        """Return the distance of neighbouring grid points, to meet ``[G, out, in]``."""
        if self._scale is None:
            return values.abs().mean().clamp_min(torch.finfo(torch.float32).tiny)
        scale = (self._scale * (1 + self.stretch)).abs()
        blocks, scale = meet(values, self._q.qparams.block_size, scale)
        return (scale * self._scheme.step).expand_as(blocks).reshape(values.shape)


@attrs.frozen(eq=False)
class _Trial:
    """A block with parameters that are learned, which is run without being changed.

    Attributes:
        block: the float block.
        weights: its weights, by name.
        floats: what stays float, by name.
    """

    block: nn.Module
    weights: Mapping[str, _LearnedWeight]
    floats: Mapping[str, Tensor]

    def state(self) -> tuple[Mapping[str, QTensor], Mapping[str, Tensor]]:
        """Return weights and floats as they are."""
        weights = {name: one.rounded() for name, one in self.weights.items()}
        return weights, {name: value.detach().clone() for name, value in self.floats.items()}

    @torch.no_grad()
    def load(self, state: tuple[Mapping[str, QTensor], Mapping[str, Tensor]]) -> None:
        """Take weights and floats as `state` gave them."""
        weights, floats = state
        for name, q in weights.items():
            self.weights[name].fix(q)
        for name, value in floats.items():
            self.floats[name].copy_(value)

    def learn_from(self, call: BlockCall, tensors: Sequence[Tensor]) -> None:
        """Find the gradients of the error on one batch, as a share of what it should return.

        Args:
            call: the batch.
            tensors: those that are learned; nothing else gets a gradient.

        Raises:
            InputError: the block computes without gradients, or writes over what they need.
        """
        with torch.enable_grad():
            noise, signal = self._error(call)
            share = noise / signal.clamp_min(torch.finfo(torch.float32).tiny)
            try:
                torch.autograd.backward(share, inputs=list(tensors))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                first = str(error).partition("\n")[0]
                raise InputError(f"there is no gradient of its outputs ({first})") from error

    @torch.no_grad()
    def error(self, calls: Sequence[BlockCall]) -> float:
        """Return the squared error of what the block returns, over all batches."""
        return math.fsum(float(self._error(calls[place])[0]) for place in range(len(calls)))

    def _error(self, call: BlockCall) -> tuple[Tensor, Tensor]:
        """Return the squared error of the outputs, and the sum of squares that they should have.

        Of what should be finite: scores that are masked by infinities are no error.
        """
        dtypes = {name: one.dtype for name, one in self.block.named_parameters()}
        changed = {name: one.native() for name, one in self.weights.items()} | dict(self.floats)
        cast = {name: value.to(dtypes[name]) for name, value in changed.items()}
        with _differentiable(self.block):
            outputs = functional_call(self.block, cast, call.args, dict(call.kwargs))
        pairs = [
            _finite_parts(output.to(torch.float32), target.to(torch.float32))
            for output, target in zip(tensors_in(outputs), call.targets, strict=True)
            if target.is_floating_point()
        ]
        noise = torch.stack([(output - target).square().sum() for output, target in pairs]).sum()
        return noise, torch.stack([target.square().sum() for _, target in pairs]).sum()


def _differentiable(block: nn.Module) -> AbstractContextManager[None]:
    """Return what lets a block in eval mode have gradients: cuDNN's recurrent layers have none."""
    if not any(isinstance(module, nn.RNNBase) for module in block.modules()):
        return nullcontext()
    without: AbstractContextManager[None] = torch.backends.cudnn.flags(enabled=False)
    return without


def _finite_parts(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return both with zeros where a target is not finite."""
    if all_finite(target):
        return output, target
    known = target.isfinite()
    return output.where(known, 0.0), target.where(known, 0.0)
