"""Tests of mono_quant.transforms."""
