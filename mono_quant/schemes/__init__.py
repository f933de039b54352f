"""Grids of values."""

from mono_quant.schemes.affine import Affine
from mono_quant.schemes.float_cast import FloatCast
from mono_quant.schemes.outliers import OutlierColumns, Outliers

__all__ = ["Affine", "FloatCast", "OutlierColumns", "Outliers"]
