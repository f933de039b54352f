"""Tests of mono_quant.numerics."""
