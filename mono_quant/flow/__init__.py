"""Integer flow: a statically quantized model as a graph whose layers pass codes to each other."""

from mono_quant.flow.floats import FLOWING, float_graph
from mono_quant.flow.flow import Flow, integer_flow

__all__ = ["FLOWING", "Flow", "float_graph", "integer_flow"]
