"""Reports as pages and pictures, drawn by code of our own: nothing is fetched from anywhere."""

from mono_quant.pictures.depth import Depth
from mono_quant.pictures.notebook import compact
from mono_quant.pictures.page import KeyFigure, Page

__all__ = ["Depth", "KeyFigure", "Page", "compact"]
