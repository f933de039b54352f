"""Ways to choose a grid point for each weight."""

from mono_quant.rounding.hqq import HQQ
from mono_quant.rounding.nearest import RoundToNearest

__all__ = ["HQQ", "RoundToNearest"]
