"""Packages that quantize weights alone, each in a file: the same weights and texts for all."""
