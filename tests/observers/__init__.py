"""Tests of mono_quant.observers."""
