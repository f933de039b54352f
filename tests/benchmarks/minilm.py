"""MiniLM with the Linears of its blocks quantized: what its benchmarks and tests share."""

import statistics
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mono_quant import QuantizationResult, Quantizer
from mono_quant.demo import (
    MiniLM,
    batches,
    encode,
    lee_documents,
    load_minilm,
    pearson_with_humans,
    polarity_lines,
)
from tests.benchmarks.measure import fresh, one_thread, sqnr

_DOCUMENTS = 50
_PROBED = 8


class Figures(NamedTuple):
    """What one way of quantizing comes to.

    Attributes:
        bits_per_weight: of the 36 Linears, everything counted.
        weight_sqnr: mean over their weights, in dB.
        output_sqnr: of the embeddings of 50 documents and 200 lines, in dB.
        pearson: correlation of the documents' similarities with what people said.
    """

    bits_per_weight: float
    weight_sqnr: float
    output_sqnr: float
    pearson: float


class Filed(NamedTuple):
    """What became of a model that was saved.

    Attributes:
        bytes: size of the file.
        equal: whether a fresh process loads it and computes the same, to the bit.
    """

    bytes: int
    equal: bool


def in_blocks(quantizer: Quantizer) -> Quantizer:
    """Return a quantizer of nothing but the 36 Linears."""
    return quantizer.only("blocks")


@cache
def original() -> MiniLM:
    """Return the float model."""
    return load_minilm()


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the Linears of the blocks by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.")
    }


@cache
def reference() -> Tensor:
    """Return the embeddings of the texts by the float model, [250, 384]."""
    return embeddings(original())


def embeddings(model: nn.Module) -> Tensor:
    """Return the embeddings of 50 documents and 200 lines of reviews, [250, 384]."""
    return encode(model, [*lee_documents(), *(line.text for line in polarity_lines())])


def figures(model: nn.Module, weights: Mapping[str, Tensor], bits_per_weight: float) -> Figures:
    """Return the figures of a quantized model.

    Args:
        model: what is run.
        weights: its dequantized weights by the names of their layers.
        bits_per_weight: taken over.
    """
    floats = linears(original())
    if set(floats) != set(weights):
        raise ValueError(f"expected weights of {sorted(floats)}, got {sorted(weights)}")
    outputs = embeddings(model)
    return Figures(
        bits_per_weight,
        statistics.mean(sqnr([floats[name].weight], [weights[name]]) for name in floats),
        sqnr([reference()], [outputs]),
        pearson_with_humans(outputs[:_DOCUMENTS]),
    )


def figures_of(result: QuantizationResult[MiniLM]) -> Figures:
    """Return the figures of a model that this package quantized."""
    weights = {name: layer.weight for name, layer in linears(result.dequantize()).items()}
    return figures(result.model, weights, result.report.bits_per_weight)


def payload(bits: int, group: int | None, each: int, beside: int = 0) -> float:
    """Return the bytes that shapes say: codes, what each group has, the float rest.

    Args:
        bits: of a code; 16 is a cast.
        group: values that share a scale, or None for a row.
        each: bits of a scale and of its zero point; 0 for a cast.
        beside: bytes that each weight has once.
    """
    weights = [layer.weight for layer in linears(original()).values()]
    total = 4.0 * sum(parameter.numel() for parameter in original().parameters())
    for weight in weights:
        groups = weight.numel() / (group or weight.shape[1])
        total += (weight.numel() * (bits - 32) + groups * each) / 8 + beside
    return total


def filed(result: QuantizationResult[MiniLM]) -> Filed:
    """Save a quantized model, and have a fresh process load it and repeat one batch."""
    (batch,) = batches(lee_documents()[:_PROBED], batch_size=_PROBED)
    with tempfile.TemporaryDirectory(prefix="mono_quant_") as folder:
        path, probe = Path(folder) / "model.safetensors", Path(folder) / "probe.pt"
        result.save(path)
        with one_thread(), torch.no_grad():
            torch.save((*batch, result.model(*batch)), probe)
        found, _ = fresh("reload", path, probe)
        return Filed(path.stat().st_size, bool(found["equal"]))
