"""Plans: decided, shown, then run."""

from mono_quant.plan.plan import Plan
from mono_quant.plan.request import Request, WeightPlan
from mono_quant.plan.resolve import resolve

__all__ = ["Plan", "Request", "WeightPlan", "resolve"]
