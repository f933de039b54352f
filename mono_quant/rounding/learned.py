"""Rounding that is learned: all weights of a block, by what the block returns."""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

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
from mono_quant.configurable import register
from mono_quant.errors import ConfigurationError
from mono_quant.learning import (
    Best,
    Clock,
    LearnedWeight,
    Trial,
    check_budget,
    descend,
    shuffled,
)
from mono_quant.numerics.granularity import Shape
from mono_quant.numerics.values import QTensor
from mono_quant.rounding.gptq import GPTQ


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
        rates = (self.rounding_rate, self.scale_rate, self.float_rate)
        check_budget(self.steps, self.minutes, self.seed, *rates)
        start: object = self.start  # which may come from a configuration, or be a class
        if not isinstance(start, Rounding) or isinstance(start, BlockRounding):
            raise ConfigurationError("start rounds weights one by one: GPTQ() or RoundToNearest()")

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
        learned = {
            name: LearnedWeight(
                self.start.round(one.stack, one.grid, one.statistics), one.grid.scheme, one.layout
            )
            for name, one in weights.items()
        }
        floats = {
            name: block.get_parameter(name).detach().to(torch.float32, copy=True)
            for name in (free if self.tune_floats else ())
        }
        trial = Trial(block, learned, floats)
        if len(calls):
            self._learn(trial, calls, {name: one.stack for name, one in weights.items()})
        return FittedBlock(
            {name: one.rounded() for name, one in learned.items()},
            {
                name: value.to(old.dtype)
                for name, value in floats.items()
                if not torch.equal(value, (old := block.get_parameter(name)).to(torch.float32))
            },
        )

    def _learn(
        self, trial: Trial, calls: Sequence[BlockCall], wanted: Mapping[str, Tensor]
    ) -> None:
        """Change what is learned in place: what scales and floats can do first, then all of it."""
        weights = trial.weights.values()
        groups = [
            (self.scale_rate, [one.stretch for one in weights if one.scales]),
            (self.float_rate, list(trial.floats.values())),
        ]
        best = Best(trial, calls)
        first = 0.5 if self.rounding_rate else 1.0
        clock, order = Clock(self.steps, self.minutes), shuffled(len(calls), self.seed)
        descend(trial, calls, groups, order, clock, first)
        best.offer()
        if self.rounding_rate:
            for name, one in trial.weights.items():
                one.release(wanted[name])
            groups.append((self.rounding_rate, [one.moved for one in weights]))
            descend(trial, calls, groups, order, clock, 1.0)
            best.offer()
        best.restore()
