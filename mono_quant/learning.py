"""Scales, grid points and floats of a module, learned by what the module returns."""

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import overload

import attrs
import torch
from torch import Tensor, nn
from torch.func import functional_call

from mono_quant.base import BlockCall, Scheme
from mono_quant.configurable import is_count
from mono_quant.errors import ConfigurationError, InputError
from mono_quant.numerics.blocks import meet
from mono_quant.numerics.extremes import all_finite
from mono_quant.numerics.nested import tensors_in
from mono_quant.numerics.values import Layout, QTensor

_FLOAT_BITS = 16  # of codes that are floats themselves
_BETAS = (0.9, 0.95)
_NEAR = 0.45
"""How far from its grid point a weight begins at most, in steps: at a half it is another one.

A weight that was put on a grid point further away begins right there.
"""


def descend(
    trial: "Trial",
    calls: Sequence[BlockCall],
    groups: Sequence[tuple[float, Sequence[Tensor]]],
    order: Iterator[int],
    clock: "Clock",
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


def shuffled(count: int, seed: int) -> Iterator[int]:
    """Yield which batch each step takes: all once before any again, shuffled each time."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


class Clock:
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


class LazyCalls(Sequence[BlockCall]):
    """Calls of a module, each made when it is asked for."""

    @abstractmethod
    def at(self, place: int) -> BlockCall:
        """Return the call of one batch, from 0 on."""

    @overload
    def __getitem__(self, place: int) -> BlockCall: ...

    @overload
    def __getitem__(self, place: slice) -> list[BlockCall]: ...

    def __getitem__(self, place: int | slice) -> BlockCall | list[BlockCall]:
        if isinstance(place, slice):
            return [self.at(one) for one in range(len(self))[place]]
        return self.at(range(len(self))[place])


def check_budget(steps: int, minutes: float | None, seed: int, *rates: float) -> None:
    """Refuse what is no learning.

    Raises:
        ConfigurationError: says which is wrong.
    """
    if not is_count(steps, 1):
        raise ConfigurationError(f"steps is a whole number, 1 or more, not {steps!r}")
    if not is_count(seed, 0):
        raise ConfigurationError(f"seed is a whole number, 0 or more, not {seed!r}")
    if minutes is not None and not minutes > 0:
        raise ConfigurationError(f"minutes is more than 0, not {minutes!r}")
    if not all(rate >= 0 for rate in rates):  # NaN is none
        raise ConfigurationError("rates are 0 or more")


class Best:
    """What left the least error of all that was offered, the beginning included.

    Attributes:
        error: squared, over all batches.
    """

    def __init__(self, trial: "Trial", calls: Sequence[BlockCall]) -> None:
        """Begin with what there is."""
        self._trial, self._calls = trial, calls
        self.error, self._kept = trial.error(calls), trial.state()

    def offer(self) -> None:
        """Keep what there is now, if it is better."""
        error = self._trial.error(self._calls)
        if error < self.error:
            self.error, self._kept = error, self._trial.state()

    def restore(self) -> None:
        """Go back to what was best."""
        self._trial.load(self._kept)


class LearnedWeight:
    """A weight of which scales and, once it is released, grid points are learned.

    Attributes:
        moved: how far each value is from where it was released, in steps of the grid, at most one,
            ``[G, out, in]``.
        stretch: by which share each scale grew, shaped like the scales.
        scales: whether scales can be learned: values are then levels times scales.
    """

    def __init__(self, q: QTensor, scheme: Scheme, layout: Layout) -> None:
        """Begin with a stack on the grid of `scheme`, and know its native shape."""
        self._q, self._scheme, self._layout = q, scheme, layout
        self._scale = self._scheme.scales(self._q.qparams)
        self.scales = self._scale is not None
        self.stretch = torch.zeros(()) if self._scale is None else torch.zeros_like(self._scale)
        self.moved = torch.zeros(())
        self._values: Tensor | None = None
        self._size = self.moved

    @property
    def apart(self) -> float:
        """How far levels lie apart, in distances of 16 that are spread over as wide a range."""
        levels = 1 << (self._scheme.code_bits or _FLOAT_BITS)
        return 15 / (levels - 1)

    def release(self, wanted: Tensor) -> None:
        """Let values leave their grid points, each from where the float stack is near it."""
        self._q = self.rounded()
        self._values = self._scheme.dequantize(self._q)
        self._size = self._step_size(self._values)
        near = (wanted - self._values).div_(self._size)
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
class Trial:
    """A block with parameters that are learned, which is run without being changed.

    Attributes:
        block: the float block.
        weights: its weights, by name.
        floats: what stays float, by name.
        running: makes what is to be entered while the block runs.
    """

    block: nn.Module
    weights: Mapping[str, LearnedWeight]
    floats: Mapping[str, Tensor]
    running: Callable[[], AbstractContextManager[object]] = nullcontext

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
        with _differentiable(self.block), self.running():
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


def levels_of(scheme: Scheme, q: QTensor, scales: Tensor) -> Tensor:
    """Return what the scales multiply, shaped like the codes; zeros where a scale is zero."""
    values, scales = meet(scheme.dequantize(q), q.qparams.block_size, scales)
    levels = (values / scales).masked_fill_(scales == 0, 0.0)
    return levels.reshape(q.codes.shape)
