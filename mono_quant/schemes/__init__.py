"""Grids of values."""

from mono_quant.schemes.affine import Affine
from mono_quant.schemes.float_cast import FloatCast

__all__ = ["Affine", "FloatCast"]
