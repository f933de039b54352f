"""Integer flow: a statically quantized model as a graph whose layers pass codes to each other."""

from mono_quant.flow.flow import Flow, integer_flow

__all__ = ["Flow", "integer_flow"]
