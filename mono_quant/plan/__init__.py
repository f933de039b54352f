"""Plans: decided, shown, then run."""

from mono_quant.plan.duration import TimeEstimate
from mono_quant.plan.graph import GraphPlan, GraphResult, resolve_graph
from mono_quant.plan.plan import Plan
from mono_quant.plan.request import Request, WeightPlan
from mono_quant.plan.resolve import resolve

__all__ = [
    "GraphPlan",
    "GraphResult",
    "Plan",
    "Request",
    "TimeEstimate",
    "WeightPlan",
    "resolve",
    "resolve_graph",
]
