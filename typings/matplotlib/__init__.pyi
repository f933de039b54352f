"""The part of matplotlib that mono_quant.pictures touches."""
