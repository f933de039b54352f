"""Quantized modules as modules: moved, copied, compiled, exported."""
