"""Weights of three values, and a range found by their deviation: importing it is enough."""

from monoquant_ternary.observer import Deviation, Moments
from monoquant_ternary.scheme import Ternary

__all__ = ["Deviation", "Moments", "Ternary"]
