"""The networks whose weights are quantized, the texts to calibrate on, and how they are judged."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mono_quant.demo import MiniLM, background_articles, batches
from tests.benchmarks import language, minilm
from tests.benchmarks.weight_only.package import GRIDS, TABLES, Grid, Quantized, Task
from tests.models.smollm2 import SmolLM2

ARTICLES = 64
_WINDOWS, _LENGTH, _BATCH = 64, 128, 2
_MEASURED, _COMPARED = 4, 2  # windows

Batches = Sequence[tuple[Tensor, ...]]


class Network(NamedTuple):
    """A network.

    Attributes:
        build: makes it, with no weights of its own.
        original: loads it.
        batches: what is calibrated on.
        grids: what it is measured on.
        columns: what `judge` returns.
        judge: says how a quantized form of it does.
    """

    build: Callable[[], nn.Module]
    original: Callable[[], nn.Module]
    batches: Callable[[], Batches]
    grids: Sequence[Grid]
    columns: tuple[str, ...]
    judge: Callable[[nn.Module, Quantized], tuple[str, ...]]


def write_inputs(name: str, path: Path) -> None:
    """Write the weights of a network and what it is calibrated on.

    Raises:
        AssetUnavailable: it is not to be had here.
    """
    network = NETWORKS[name]
    torch.save((network.original().state_dict(), network.batches()), path)


def task(name: str, path: Path) -> Task:
    """Return a network, and what it is calibrated on, as they were written."""
    state, inputs = torch.load(path, weights_only=True)
    with torch.device("meta"):
        model = NETWORKS[name].build()
    model.load_state_dict(state, assign=True)
    if isinstance(model, SmolLM2):
        model.head.weight = model.embedding.weight
    return Task(name, model.eval(), _names(model), inputs)


def figures(name: str, quantized: Quantized) -> tuple[str, ...]:
    """Return how a quantized network does, in the columns of its network."""
    network = NETWORKS[name]
    model = copy.deepcopy(network.original())
    missing = [one for one in _names(model) if f"{one}.weight" not in quantized.state]
    if missing:
        raise ValueError(f"{missing} were not quantized")
    unknown = model.load_state_dict(quantized.state, strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"{unknown} are not of the network")
    return network.judge(model, quantized)


def _names(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.")
    ]


def _minilm_batches() -> Batches:
    return batches(background_articles()[:ARTICLES], batch_size=8)


def _smollm2_batches() -> Batches:
    return [(ids,) for ids in language.calibration(_WINDOWS, _LENGTH, _BATCH)]


def _judge_minilm(model: nn.Module, quantized: Quantized) -> tuple[str, ...]:
    weights = {name: layer.weight for name, layer in minilm.linears(model).items()}
    found = minilm.figures(model, weights, quantized.bits_per_weight)
    return f"{found.weight_sqnr:.2f}", f"{found.output_sqnr:.2f}", f"{found.pearson:.4f}"


def _judge_smollm2(model: nn.Module, _: Quantized) -> tuple[str, ...]:
    found = language.judged(language.logits(model, _MEASURED), _COMPARED)
    return (
        f"{found.divergence:.4f}",
        f"{found.perplexity:.2f}",
        f"{found.output_sqnr:.2f}",
        f"{found.agreement:.4f}",
    )


NETWORKS: Mapping[str, Network] = {
    "minilm": Network(
        MiniLM,
        minilm.original,
        _minilm_batches,
        (*GRIDS, *TABLES),
        ("weight SQNR, dB", "output SQNR, dB", "Lee Pearson"),
        _judge_minilm,
    ),
    "smollm2": Network(
        SmolLM2,
        language.original,
        _smollm2_batches,
        (*(grid for grid in GRIDS if grid.group != 128), *TABLES),  # 576 is no multiple of 128
        ("mean KL, nats", "perplexity", "logits SQNR, dB", "top-1"),
        _judge_smollm2,
    ),
}
