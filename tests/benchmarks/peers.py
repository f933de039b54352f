"""INT4 and INT8 of optimum-quanto and torchao on the same model, where they are installed.

They need no more than `pip install --no-deps optimum-quanto torchao`. The Linears of MiniLM's
blocks are quantized and its embeddings are compared with the float model's, all in one run.
"""

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mono_quant import Quantizer
from mono_quant.demo import batches, lee_documents, load_minilm
from tests.benchmarks.measure import median_seconds, print_table
from tests.benchmarks.minilm import (
    figures,
    figures_of,
    in_blocks,
    linears,
    original,
    reference,
)

REPEATS = 7
_DOCUMENTS = 8


class Peer(NamedTuple):
    """One way of another package.

    Attributes:
        title: in the table.
        distribution: of the package.
        package: that has to be importable.
        quantize: changes a model in place.
    """

    title: str
    distribution: str
    package: str
    quantize: Callable[[nn.Module], object]


def main() -> None:
    """Print the figures of this package and of its peers."""
    reference()
    print("Bits per weight as each package stores them; SQNR in dB; times as shares of float.\n")
    columns = ("package", "weights", "bits/weight", "weight SQNR", "output SQNR", "Lee Pearson")
    print_table((*columns, "quantize s", "time of 8 documents"), _rows())


def _rows() -> Iterator[tuple[str, ...]]:
    for title, quantizer in (
        ("INT4 g64, asymmetric", Quantizer().bits(4).group_size(64)),
        ("INT4 g128, asymmetric", Quantizer().bits(4).group_size(128)),
        ("INT8 per channel", Quantizer().bits(8)),
    ):
        ours = in_blocks(quantizer)
        result = ours.apply(original())
        (seconds,) = median_seconds([partial(ours.apply, original(), progress=False)], 3)
        yield ("mono_quant", title, *_cells(figures_of(result), seconds, result.model))
    for peer in PEERS:
        try:
            importlib.import_module(peer.package)
        except ImportError as reason:
            yield (peer.distribution, peer.title, f"skipped: {reason}", *[""] * 5)
            continue
        package = f"{peer.distribution} {metadata.version(peer.distribution)}"
        yield (package, peer.title, *_measured(peer))


def _measured(peer: Peer) -> tuple[str, ...]:
    model = load_minilm()
    (seconds,) = median_seconds([lambda: peer.quantize(model)], 1)
    layers = linears(model)
    size = sum(_stored(layer.weight) for layer in layers.values())
    count = sum(layer.weight.numel() for layer in layers.values())
    weights = {name: _dequantized(layer.weight) for name, layer in layers.items()}
    return _cells(figures(model, weights, 8 * size / count), seconds, model)


def _cells(found: tuple[float, ...], seconds: float, model: nn.Module) -> tuple[str, ...]:
    bits, weight, output, pearson = found
    (batch,) = batches(lee_documents()[:_DOCUMENTS], batch_size=_DOCUMENTS)

    def run(which: nn.Module) -> Callable[[], object]:
        return lambda: which(*batch)

    with torch.no_grad():
        floats, taken = median_seconds([run(original()), run(model)], REPEATS)
    shown = (f"{bits:.3f}", f"{weight:.2f}", f"{output:.2f}", f"{pearson:.4f}")
    return (*shown, f"{seconds:.2f}", f"{taken / floats:.2f}")


def _stored(tensor: Tensor) -> int:
    """Return the bytes of a tensor, or of the plain tensors that a tensor subclass is made of."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return tensor.numel() * tensor.element_size()
    names, _ = flatten()
    return sum(_stored(getattr(tensor, name)) for name in names)


def _dequantized(weight: Tensor) -> Tensor:
    return weight.dequantize()


def _in_blocks(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name.startswith("blocks.")


def _quanto(dtype: str) -> Callable[[nn.Module], object]:
    def quantize(model: nn.Module) -> None:
        quanto = importlib.import_module("optimum.quanto")
        quanto.quantize(model, weights=getattr(quanto, dtype), include=["blocks.*"])
        quanto.freeze(model)

    return quantize


def _torchao(config: str, group: int | None = None) -> Callable[[nn.Module], object]:
    def quantize(model: nn.Module) -> None:
        torchao = importlib.import_module("torchao.quantization")
        settings = {}
        if group is not None:
            settings = {
                "weight_dtype": getattr(torch, "int4"),  # noqa: B009  # not in torch's own stubs
                "granularity": torchao.PerGroup(group),
                "mapping_type": torchao.MappingType.ASYMMETRIC,
            }
        torchao.quantize_(model, getattr(torchao, config)(**settings), filter_fn=_in_blocks)

    return quantize


PEERS = (
    Peer("INT4 g128, float zero point", "optimum-quanto", "optimum.quanto", _quanto("qint4")),
    Peer("INT8 per channel", "optimum-quanto", "optimum.quanto", _quanto("qint8")),
    Peer(
        "INT4 g64, asymmetric",
        "torchao",
        "torchao.quantization",
        _torchao("IntxWeightOnlyConfig", 64),
    ),
    Peer(
        "INT4 g128, asymmetric",
        "torchao",
        "torchao.quantization",
        _torchao("IntxWeightOnlyConfig", 128),
    ),
    Peer("INT8 per channel", "torchao", "torchao.quantization", _torchao("Int8WeightOnlyConfig")),
)
