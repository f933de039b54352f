"""Tests of mono_quant.schemes."""
