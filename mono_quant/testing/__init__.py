"""Laws that an extension must keep, for its author to run: a conformance kit.

Nothing of the core imports this package. `check` needs nothing beside the package itself;
`parametrize_with_checks` needs pytest, and `mono_quant.testing.strategies` hypothesis.

Example:
    ``print(check(MyScheme()))``
"""

from mono_quant.testing.checks import (
    Outcome,
    Verdict,
    check,
    checks_for,
    parametrize_with_checks,
)
from mono_quant.testing.containers import ContainerCase
from mono_quant.testing.kernels import KernelCase
from mono_quant.testing.law import Broken, Check, DoesNotApply
from mono_quant.testing.layers import LayerCase
from mono_quant.testing.schemes import check_stack
from mono_quant.testing.transforms import CorrectionCase, TransformCase

__all__ = [
    "Broken",
    "Check",
    "ContainerCase",
    "CorrectionCase",
    "DoesNotApply",
    "KernelCase",
    "LayerCase",
    "Outcome",
    "TransformCase",
    "Verdict",
    "check",
    "check_stack",
    "checks_for",
    "parametrize_with_checks",
]
