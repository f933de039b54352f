"""Tests of mono_quant."""
