"""Tests of mono_quant.plan."""
