"""Tests of mono_quant.rounding."""
