"""Ways to find the range that a grid covers."""

from mono_quant.observers.minmax import MinMax, MinMaxState
from mono_quant.observers.mse import MSE

__all__ = ["MSE", "MinMax", "MinMaxState"]
