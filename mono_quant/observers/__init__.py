"""Ways to find the range that a grid covers."""

from mono_quant.numerics.histogram import HistogramState
from mono_quant.observers.auto import Auto, Choice
from mono_quant.observers.create import create_observer
from mono_quant.observers.entropy import Entropy
from mono_quant.observers.histogram import Histogram
from mono_quant.observers.minmax import MinMax, MinMaxState
from mono_quant.observers.moving_average import MovingAverage, MovingAverageState
from mono_quant.observers.mse import MSE
from mono_quant.observers.percentile import Percentile

__all__ = [
    "MSE",
    "Auto",
    "Choice",
    "Entropy",
    "Histogram",
    "HistogramState",
    "MinMax",
    "MinMaxState",
    "MovingAverage",
    "MovingAverageState",
    "Percentile",
    "create_observer",
]
