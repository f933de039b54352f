"""Recurrent layers over sequences, stepping on integers."""

from dataclasses import replace

import torch
from torch import Tensor

from mono_quant.base import KernelSpec, PackedTensor
from mono_quant.kernels.codes import has_finite_sum
from mono_quant.kernels.integer import INTEGER, factor_of
from mono_quant.kernels.steps import IntegerStep, knows
from mono_quant.operations import MatrixProduct
from mono_quant.recurrence import Recurrence, States


class IntegerSteps:
    """Multiplies h by the hidden weight as `Integer` does, at each step.

    The reference decodes the weight once for a whole sequence and has the faster steps where the
    floats fit a cache; a large weight is read from memory at each of them, four times as many
    bytes.
    """

    name = INTEGER.name

    def supports(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it cannot: what `Integer` does for quantized h is what it can."""
        operation = spec.operation
        if not isinstance(operation, Recurrence):
            return f"it is a {type(operation).__name__}, not a recurrence"
        if operation.activation is None:
            return "h stays float"
        return INTEGER.supports(_of_step(spec, operation), device, dtype)

    def __call__(
        self, spec: KernelSpec, x: Tensor, weight: PackedTensor, bias: Tensor | None
    ) -> Tensor:
        """Return the states after each step, as `Recurrence` does."""
        operation = spec.operation
        assert isinstance(operation, Recurrence)  # `supports` saw to it
        if made := _finite(operation, x, weight, bias):
            return made[0]
        step = _of_step(spec, operation)
        return operation.join(operation.steps(x, lambda h: INTEGER(step, h, weight, bias)))


def _finite(
    operation: Recurrence, x: Tensor, weight: PackedTensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """Return the states after each step; nothing where h is not finite throughout.

    That is seen of all states once, and the weight is prepared once: `Integer` does both at each
    step.
    """
    activation, (h, *_) = operation.activation, operation.states
    assert activation is not None  # `supports` saw to it
    if not knows(activation) or x.dtype is not torch.float32 or not has_finite_sum(h):
        return ()
    factor = factor_of(weight, bias)
    runs: dict[int, IntegerStep] = {}

    def step(inputs: Tensor, states: States) -> States:
        count = len(inputs)
        if count not in runs:
            runs[count] = IntegerStep(operation.cell, factor, activation, states[0])
        return runs[count](inputs, states)

    made = operation.join(operation.walk(x, step))
    return (made,) if has_finite_sum(made) else ()


def _of_step(spec: KernelSpec, operation: Recurrence) -> KernelSpec:
    return replace(spec, operation=MatrixProduct(), activation=operation.activation)


INTEGER_STEPS = IntegerSteps()
