"""Rounding that is learned: all weights of a block, by what the block returns."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
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
    Statistics,
)
from mono_quant.configurable import register
from mono_quant.errors import ConfigurationError
from mono_quant.numerics.blocks import meet
from mono_quant.numerics.nested import tensors_in
from mono_quant.numerics.values import QTensor
from mono_quant.rounding.gptq import GPTQ

_BETAS = (0.9, 0.95)
_NEAR = 0.45
"""How far from its grid point a weight begins, in steps: beyond a half it would be another one."""


@register
@attrs.frozen
class LearnedRounding(BlockRounding):
    """Grid points, scales and what stays float of a block, learned to return what float returns.

    The block is run on what the quantized blocks before it make of the data, and its outputs are
    held against those of the float model, so that it also makes up for their error. Learned are

    - the grid point of each weight: its value moves by the sign of its gradient, and is rounded on
      the way forward as if it were not (a straight-through estimator),
    - its scales, by what they were times ``1 + v``,
    - with `tune_floats`, the parameters of the block that stay float: biases and norms.

    It begins with what another rounding returns, and ends with the parameters that left the least
    error over all batches of those at the ends of passes, the beginning among them: so the block's
    output is never worse on the data than it was.

    Source: Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent for the
    Quantization of LLMs", https://arxiv.org/abs/2309.05516 (signs of gradients); Nagel et al. 2020,
    "Up or Down? Adaptive Rounding", https://arxiv.org/abs/2004.10568 (rounding against a block's
    output); Esser et al. 2020, "Learned Step Size Quantization", https://arxiv.org/abs/1902.08153.

    Attributes:
        steps: of one batch each, for each block.
        minutes: stop a block after this long, for a budget of time; results then depend on the
            machine's speed. None for no limit.
        start: the rounding to begin with.
        rounding_rate: how far a weight moves in the first step, in steps of its grid; 0 keeps grid
            points as they are.
        scale_rate: rate of scales, as a share of them.
        float_rate: rate of what stays float.
        tune_floats: whether biases and norms are learned, too.
        seed: of the order of batches.
    """

    kind: ClassVar[str] = "learned"
    steps: int = 200
    minutes: float | None = None
    start: Rounding = attrs.field(factory=GPTQ)
    rounding_rate: float = 0.01
    scale_rate: float = 3e-3
    float_rate: float = 1e-3
    tune_floats: bool = True
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        """Refuse what is no learning."""
        if self.steps < 1:
            raise ConfigurationError(f"steps is 1 or more, not {self.steps!r}")
        if self.minutes is not None and not self.minutes > 0:
            raise ConfigurationError(f"minutes is more than 0, not {self.minutes!r}")
        if isinstance(self.start, BlockRounding):
            raise ConfigurationError("start rounds weights one by one: GPTQ() or RoundToNearest()")
        if not min(self.rounding_rate, self.scale_rate, self.float_rate) >= 0:
            raise ConfigurationError("rates are 0 or more")

    @property
    def needs(self) -> tuple[AnyStatistic, ...]:
        """What the rounding to begin with needs."""
        return self.start.needs

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
            {name: value.to(block.get_parameter(name).dtype) for name, value in floats.items()},
        )

    def _learn(self, trial: "_Trial", calls: Sequence[BlockCall]) -> None:
        """Change what is learned in place, and undo all of it if that left no less error."""
        scales = [one.stretch for one in trial.weights.values() if one.scales]
        rates = [(self.scale_rate, scales), (self.float_rate, list(trial.floats.values()))]
        moved = [one.moved for one in trial.weights.values()] if self.rounding_rate else []
        groups = [(rate, tensors) for rate, tensors in rates if rate and tensors]
        learned = [*moved, *(tensor for _, tensors in groups for tensor in tensors)]
        if not learned:
            return
        before = [tensor.clone() for tensor in learned]
        error = trial.error(calls)
        for tensor in learned:
            tensor.requires_grad_(True)
        adaptive = [torch.optim.Adam(tensors, betas=_BETAS) for _, tensors in groups]
        end = math.inf if self.minutes is None else time.monotonic() + 60 * self.minutes
        for step, place in enumerate(self._order(len(calls))):
            left = 1 - step / self.steps
            trial.learn_from(calls[place])
            for optimizer, (rate, _) in zip(adaptive, groups, strict=True):
                optimizer.param_groups[0]["lr"] = rate * left
                optimizer.step()
            for tensor in moved:
                _step(tensor, self.rounding_rate * left)
            for tensor in learned:
                tensor.grad = None
            if time.monotonic() > end:
                break
        for tensor in learned:
            tensor.requires_grad_(False)
        if not trial.error(calls) < error:
            for tensor, old in zip(learned, before, strict=True):
                tensor.copy_(old)

    def _order(self, count: int) -> Iterator[int]:
        """Yield which batch each step takes: all once before any again, shuffled each time."""
        generator = torch.Generator().manual_seed(self.seed)
        places: list[int] = []
        for _ in range(self.steps):
            places = places or torch.randperm(count, generator=generator).tolist()
            yield places.pop()


def _step(moved: Tensor, rate: float) -> None:
    """Move each element against the sign of its gradient, by one step of the grid at most."""
    if moved.grad is not None:
        with torch.no_grad():
            moved.sub_(moved.grad.sign(), alpha=rate).clamp_(-1, 1)


class _LearnedWeight:
    """A weight of which grid points and scales are learned.

    Attributes:
        moved: how far each value is from where it began, in steps of the grid, ``[G, out, in]``.
        stretch: by which share each scale grew, shaped like the scales.
        scales: whether scales can be learned: values are then levels times scales.
    """

    def __init__(self, weight: BlockWeight, start: Rounding) -> None:
        """Begin with what another rounding returns, each value on the side of the float weight."""
        self._scheme, self._layout = weight.grid.scheme, weight.layout
        self._first = start.round(weight.stack, weight.grid, weight.statistics)
        qparams = self._first.qparams
        values = self._scheme.dequantize(self._first)
        self._scale = qparams.scale.to(torch.float32) if qparams.scale is not None else None
        self._unit = None
        if self._scale is not None:
            self._unit = self._scheme.rescaled(qparams, torch.ones_like(self._scale))
        self.scales = self._unit is not None
        self._size = self._step_size(values)
        near = (weight.stack - values).div_(self._size)
        self.moved = near.nan_to_num_(0, 0, 0).clamp_(-_NEAR, _NEAR)
        self.stretch = torch.zeros(()) if self._scale is None else torch.zeros_like(self._scale)
        self._values = values

    def native(self) -> Tensor:
        """Return the weight on its grid, as its layer holds it, with gradients."""
        q = self.rounded()
        if self._unit is None or self._scale is None:
            values = self._scheme.dequantize(q)
        else:
            levels = self._scheme.dequantize(QTensor(q.codes, self._unit, q.dtype))
            scale = self._scale * (1 + self.stretch)
            blocks, scale = meet(levels, q.qparams.block_size, scale)
            values = (blocks * scale).reshape(levels.shape)
        passed = values + (self.moved - self.moved.detach())  # its gradient alone
        return self._layout.to_native(passed)

    @torch.no_grad()
    def rounded(self) -> QTensor:
        """Return the weight on its grid."""
        qparams = self._first.qparams
        if self._unit is not None and self._scale is not None:
            found = self._scheme.rescaled(qparams, self._scale * (1 + self.stretch))
            qparams = found if found is not None else qparams
        return self._scheme.quantize(self._values + self.moved * self._size, qparams)

    def _step_size(self, values: Tensor) -> Tensor:
        """Return the distance of neighbouring grid points, to meet ``[G, out, in]``."""
        if self._scale is None:
            return values.abs().mean().clamp_min(torch.finfo(torch.float32).tiny)
        blocks, scale = meet(values, self._first.qparams.block_size, self._scale.abs())
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

    def learn_from(self, call: BlockCall) -> None:
        """Find the gradients of the error on one batch, as a share of what it should return."""
        with torch.enable_grad():
            noise, signal = self._error(call)
            share = noise / signal.clamp_min(torch.finfo(torch.float32).tiny)
            torch.autograd.backward(share)

    @torch.no_grad()
    def error(self, calls: Sequence[BlockCall]) -> float:
        """Return the squared error of what the block returns, over all batches."""
        return math.fsum(float(self._error(calls[place])[0]) for place in range(len(calls)))

    def _error(self, call: BlockCall) -> tuple[Tensor, Tensor]:
        """Return the squared error of the outputs, and the sum of squares that they should have."""
        dtypes = {name: one.dtype for name, one in self.block.named_parameters()}
        changed = {name: one.native() for name, one in self.weights.items()} | dict(self.floats)
        cast = {name: value.to(dtypes[name]) for name, value in changed.items()}
        outputs = functional_call(self.block, cast, call.args, dict(call.kwargs))
        pairs = [
            (output.to(torch.float32), target.to(torch.float32))
            for output, target in zip(tensors_in(outputs), call.targets, strict=True)
            if target.is_floating_point()
        ]
        noise = torch.stack([(output - target).square().sum() for output, target in pairs]).sum()
        return noise, torch.stack([target.square().sum() for _, target in pairs]).sum()
