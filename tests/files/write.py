"""Writes the files of this version: `python -m tests.files.write`, once for each release.

A release adds a folder of its own name and leaves all others alone. Each file has what its layers
return beside it, as floats in JSON, so that a reader that computes other values is noticed.
"""

import json
from collections.abc import Callable
from pathlib import Path

import attrs
import torch
from torch import Tensor, nn

from mono_quant import (
    GPTQ,
    Affine,
    Codebook,
    Entropy,
    FittedCodebook,
    Float8,
    Histogram,
    ImportanceWeighted,
    Microscaling,
    MinMax,
    MovingAverage,
    OutlierColumns,
    PerChannel,
    PerGroup,
    Quantizer,
    Rotate,
    __version__,
)

FOLDER = Path(__file__).parent


@attrs.frozen
class Written:
    """A file that every release writes.

    Attributes:
        quantizer: what made it.
        make: makes the float model of its architecture.
        batch: what the model is run on.
    """

    quantizer: Quantizer
    make: Callable[[], nn.Module]
    batch: Tensor


class Tied(nn.Module):
    """An embedding whose table is the head too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(24, 16)
        self.head = nn.Linear(16, 24, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.table(ids))
        return found


class Attended(nn.Module):
    """An encoder layer of a transformer, which is a container and a layer in one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found


class Recurrent(nn.Module):
    """An LSTM, whose layer has several weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)[0]
        return found


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3)
    )


ROWS = torch.linspace(-1, 1, 5 * 16).reshape(5, 16)
IMAGES = torch.linspace(-1, 1, 2 * 4 * 25).reshape(2, 4, 5, 5)
STEPS = torch.linspace(-1, 1, 2 * 3 * 16).reshape(2, 3, 16)
WEIGHTS = Quantizer().activations(None)

EIGHT = Quantizer().only("*")
STATISTICS: dict[str, Quantizer] = {
    "ranges": EIGHT.observer(activations=MinMax()).override(
        "2", activation_observer=MovingAverage()
    ),
    "histograms": EIGHT.observer(activations=Histogram(64)).override(
        "2", activation_observer=Entropy(300)
    ),
    "rows": EIGHT.bits(4).rounding(GPTQ()).outliers(2).override("2", rounding=ImportanceWeighted()),
}
"""By the names of files of statistics that every release writes, what they are used by."""
KEPT = "kept"
"""The folder of them in that of a version, and of the settings of what used them."""

WRITTEN: dict[str, Written] = {
    **{
        f"affine{bits}": Written(WEIGHTS.bits(bits).group_size(8), linear, ROWS)
        for bits in range(2, 8)
    },
    "affine8": Written(WEIGHTS.bits(8), linear, ROWS),
    "affine8-asymmetric": Written(WEIGHTS.bits(8).asymmetric(), linear, ROWS),
    "affine4-symmetric": Written(WEIGHTS.bits(4).symmetric().granularity("tensor"), linear, ROWS),
    "affine4-float-zero-point": Written(WEIGHTS.bits(4).float_zero_point(), linear, ROWS),
    "affine4-float32": Written(
        WEIGHTS.scheme(Affine(4, granularity=PerChannel(), scale_dtype=torch.float32)), linear, ROWS
    ),
    "float16": Written(WEIGHTS.bits(16), linear, ROWS),
    "nf4": Written(WEIGHTS.scheme(Codebook.nf4(PerGroup(8))), linear, ROWS),
    "fitted": Written(
        WEIGHTS.scheme(FittedCodebook(3, PerGroup(8), torch.float8_e4m3fn)), linear, ROWS
    ),
    "fp8": Written(WEIGHTS.scheme(Float8()), linear, ROWS),
    "nvfp4": Written(WEIGHTS.scheme(Microscaling.nvfp4()), linear, ROWS),
    "outliers": Written(WEIGHTS.bits(4).outliers(OutlierColumns(2)), linear, ROWS),
    "dynamic": Written(Quantizer().activations("dynamic"), linear, ROWS),
    "static": Written(Quantizer().activations("static").fit(ROWS), linear, ROWS),
    "folded": Written(Quantizer().activations("static").fit(IMAGES), convolutions, IMAGES),
    "tied": Written(WEIGHTS.bits(4), Tied, torch.arange(24)),
    "attention": Written(WEIGHTS.bits(8), Attended, STEPS),
    "lstm": Written(WEIGHTS.bits(8), Recurrent, STEPS[..., :8]),
    "turned": Written(
        Quantizer().activations("static").fit(ROWS).transform(Rotate()), linear, ROWS
    ),
}


def main() -> None:
    """Write all of them into the folder of this version, alternately in either format."""
    folder = FOLDER / __version__
    folder.mkdir()
    for place, (name, one) in enumerate(WRITTEN.items()):
        torch.manual_seed(0)
        result = one.quantizer.only("*").apply(one.make().eval())
        result.save(folder / f"{name}{('.safetensors', '.pt')[place % 2]}")
        with torch.no_grad():
            output: Tensor = result.dequantize()(one.batch)
        (folder / f"{name}.json").write_text(json.dumps(output.tolist()) + "\n")
    write_kept(folder / KEPT)


def write_kept(folder: Path) -> None:
    """Write statistics, settings, and what a model made with them returns."""
    folder.mkdir()
    for name, quantizer in STATISTICS.items():
        torch.manual_seed(0)
        model = linear().eval()
        known = quantizer.fit(ROWS).plan(model).calibrate(progress=False)
        path = known.save(folder / f"{name}.safetensors")
        result = quantizer.statistics(path).apply(model, progress=False)
        with torch.no_grad():
            output: Tensor = result.dequantize()(ROWS)
        state = {key: one.tolist() for key, one in model.state_dict().items()}
        written = {"settings": quantizer.to_config(), "model": state, "output": output.tolist()}
        (folder / f"{name}.json").write_text(json.dumps(written) + "\n")


if __name__ == "__main__":
    main()
