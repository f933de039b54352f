"""The command line, over the same objects as the Python API."""

from mono_quant.cli.main import main

__all__ = ["main"]
