"""Tests of mono_quant.testing, by which all built-in strategies are tested too."""
