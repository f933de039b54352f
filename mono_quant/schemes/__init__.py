"""Grids of values."""

from mono_quant.schemes.affine import Affine
from mono_quant.schemes.codebook import Codebook, FittedCodebook
from mono_quant.schemes.create import create_scheme
from mono_quant.schemes.float8 import Float8
from mono_quant.schemes.float_cast import FloatCast
from mono_quant.schemes.microscaling import Microscaling
from mono_quant.schemes.outliers import OutlierColumns, Outliers

__all__ = [
    "Affine",
    "Codebook",
    "FittedCodebook",
    "Float8",
    "FloatCast",
    "Microscaling",
    "OutlierColumns",
    "Outliers",
    "create_scheme",
]
