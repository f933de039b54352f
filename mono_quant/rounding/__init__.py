"""Ways to choose a grid point for each weight."""

from mono_quant.rounding.gptq import GPTQ
from mono_quant.rounding.hessian import Hessian, HessianState
from mono_quant.rounding.hqq import HQQ
from mono_quant.rounding.importance import ImportanceWeighted, InputPower, PowerState
from mono_quant.rounding.learned import LearnedRounding
from mono_quant.rounding.nearest import RoundToNearest

__all__ = [
    "GPTQ",
    "HQQ",
    "Hessian",
    "HessianState",
    "ImportanceWeighted",
    "InputPower",
    "LearnedRounding",
    "PowerState",
    "RoundToNearest",
]
