"""The valid files that mutants are made of."""

import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import attrs
import numpy
import torch
from torch import nn

from mono_quant import (
    GPTQ,
    HQQ,
    BiasCorrection,
    Entropy,
    FittedCodebook,
    Histogram,
    ImportanceWeighted,
    LearnedRounding,
    MinMax,
    MovingAverage,
    OutlierColumns,
    PerGroup,
    Quantizer,
)
from mono_quant.plan.journal import Journal
from mono_quant.serializers import write_state_dict
from tests.helpers import TiedModel
from tests.serializers.files import small


def seeded() -> nn.Sequential:
    """Return a small model, the same each time."""
    torch.manual_seed(0)
    return small()


@attrs.frozen
class Sample:
    """A valid file.

    Attributes:
        name: what it holds, and its format.
        suffix: of its path.
        content: its bytes.
        role: what it is for, which says who reads it: "quantized", "plain", "statistics", "block",
            "array" or "settings".
        make: makes the float model that it is of.
        quantizer: that wrote it, where it serves no other one.
    """

    name: str
    suffix: str
    content: bytes
    role: str
    make: Callable[[], nn.Module] = seeded
    quantizer: Quantizer | None = None


DATA = torch.linspace(-1, 1, 8 * 64).reshape(8, 64)
QUANTIZED: dict[str, tuple[Quantizer, Callable[[], nn.Module]]] = {
    "4-bit": (Quantizer().bits(4), small),
    "static": (Quantizer().fit(DATA), small),
    "outliers": (Quantizer().outliers(OutlierColumns(2)), small),
    "tables": (Quantizer().scheme(FittedCodebook(4, PerGroup(8), torch.float8_e4m3fn)), small),
    "tied": (Quantizer().bits(3), TiedModel),
}
_EIGHT, _FOUR = Quantizer().only("*"), Quantizer().bits(4).only("*")
STATISTICS = {
    "ranges": _EIGHT.observer(activations=MinMax()).override(
        "2", activation_observer=MovingAverage()
    ),
    "histograms": _EIGHT.observer(activations=Histogram(64)).override(
        "2", activation_observer=Entropy(300)
    ),
    "rows": _FOUR.rounding(GPTQ()).outliers(2).override("2", rounding=ImportanceWeighted()),
}
BLOCKS = {"gptq": _FOUR.rounding(GPTQ()), "learned": _FOUR.rounding(LearnedRounding(steps=2))}
BLOCK = "stage-00000.safetensors"
"""How the file of a first block is called."""
SETTINGS = (
    Quantizer()
    .bits(4)
    .observer("mse")
    .rounding(GPTQ())
    .skip("1")
    .override("0", bits=3, activations="static", activation_observer=Histogram(64), rounding=HQQ())
    .transform(BiasCorrection())
    .on_damage("keep")
)
TOML = b"""\
only = ["*"]
on_damage = "keep"
fold = true

[settings]
bits = 4
granularity = {kind = "per_group", size = 16}
observer = {kind = "mse", steps = 40, smallest = 0.5}
rounding = {kind = "importance", steps = 8}
outliers = 2

[[overrides]]
selector = "0"
bits = 8
activations = {kind = "activations", mode = "dynamic", bits = 8}

[[corrections]]
kind = "bias_correction"
"""


@functools.cache
def samples() -> tuple[Sample, ...]:
    """Return all of them; the same bytes each time."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return (
            *_checkpoints(folder),
            *_statistics(folder),
            *_blocks(folder),
            *_arrays(folder),
            Sample(
                "settings .json", ".json", json.dumps(SETTINGS.to_config()).encode(), "settings"
            ),
            Sample("settings .toml", ".toml", TOML, "settings"),
        )


def _checkpoints(folder: Path) -> Iterator[Sample]:
    for kind, (quantizer, make) in QUANTIZED.items():
        for suffix in (".safetensors", ".pt"):
            torch.manual_seed(0)
            path = quantizer.only("*").apply(make()).save(folder / f"model{suffix}")
            yield Sample(f"{kind} {suffix}", suffix, path.read_bytes(), "quantized", make)
    state = seeded().state_dict()
    path = folder / "plain.safetensors"
    write_state_dict(path, state)
    yield Sample("plain .safetensors", path.suffix, path.read_bytes(), "plain")
    for kind, new in (("plain", True), ("old plain", False)):
        path = folder / "plain.pt"
        torch.save(state, path, _use_new_zipfile_serialization=new)
        yield Sample(f"{kind} .pt", path.suffix, path.read_bytes(), "plain")


def _statistics(folder: Path) -> Iterator[Sample]:
    path = folder / "statistics.safetensors"
    for kind, quantizer in STATISTICS.items():
        quantizer.fit(DATA).plan(seeded()).calibrate(progress=False).save(path)
        yield Sample(
            f"statistics of {kind}",
            path.suffix,
            path.read_bytes(),
            "statistics",
            quantizer=quantizer,
        )


def _blocks(folder: Path) -> Iterator[Sample]:
    for kind, quantizer in BLOCKS.items():
        with patch.object(Journal, "close"):  # which removes them
            quantizer.fit(DATA).apply(seeded(), resume=folder / kind, progress=False)
        path = folder / kind / BLOCK
        yield Sample(
            f"block of {kind}", path.suffix, path.read_bytes(), "block", quantizer=quantizer
        )


def _arrays(folder: Path) -> Iterator[Sample]:
    array = DATA.numpy()
    numpy.save(folder / "array.npy", array)
    numpy.savez(folder / "arrays.npz", input=numpy.asfortranarray(array))
    numpy.savez_compressed(folder / "packed.npz", input=array)
    for name in ("array.npy", "arrays.npz", "packed.npz"):
        path = folder / name
        yield Sample(name, path.suffix, path.read_bytes(), "array")
