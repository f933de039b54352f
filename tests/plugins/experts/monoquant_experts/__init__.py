"""A layer of experts, how it is quantized, and files that are zip archives."""

from monoquant_experts.layer import Experts, ExpertsQuantizer, QuantizedExperts
from monoquant_experts.serializer import ZipSerializer

__all__ = ["Experts", "ExpertsQuantizer", "QuantizedExperts", "ZipSerializer"]
