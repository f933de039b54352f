"""Static W8A8 of EfficientNet-Lite0: every observer, what corrects, peers, memory, overhead.

Calibrated on 20 ImageNet images and 44 crops of them; measured on 130 crops of the photos of
scikit-image, against the float model's logits. With 130 crops of 26 photos, agreement is known to
about six points; the SQNR tells more.
"""

import copy
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mono_quant import (
    MSE,
    Auto,
    BiasCorrection,
    Entropy,
    EqualizeLayers,
    FoldBatchNorm,
    Histogram,
    MinMax,
    MovingAverage,
    Percentile,
    Quantizer,
    RangeEstimator,
)
from mono_quant.calibration import CalibrationData
from mono_quant.plan.measure import gather_for
from tests.benchmarks.measure import (
    MB,
    fresh,
    median_seconds,
    memory,
    print_table,
    reset_peak,
    sqnr,
)
from tests.models import AssetUnavailable, efficientnet_lite0
from tests.models.efficientnet_lite0 import EfficientNetLite0

SIDE = 168
CROPS = 44
BATCH = 16
SMALL_BATCH = 4
REPEATS = 5
OBSERVERS: tuple[RangeEstimator, ...] = (
    MinMax(),
    MovingAverage(),
    Histogram(),
    Percentile(99.99),
    Percentile(99.999),
    MSE(),
    Entropy(),
    Auto(),
)
CORRECTED = (MinMax(), Percentile(99.999), MSE(), Auto())
STATIC = Quantizer().activations("static")


class Score(NamedTuple):
    """How near a quantized classifier is to the float one.

    Attributes:
        sqnr: of the logits, in dB.
        agreement: share of the crops whose first class is the same.
    """

    sqnr: float
    agreement: float

    @property
    def cells(self) -> tuple[str, str]:
        """Both as texts."""
        return f"{self.sqnr:.2f}", f"{self.agreement:.4f}"


@cache
def network() -> EfficientNetLite0:
    """Return the float model."""
    return efficientnet_lite0.load()


@cache
def calibration_images() -> Tensor:
    """Return the 20 labelled images and 44 crops of them, [64, 3, 224, 224]."""
    images, _ = efficientnet_lite0.labelled_images()
    generator = torch.Generator().manual_seed(0)
    room = images.shape[-1] - SIDE
    crops = []
    for index in range(CROPS):
        top, left = torch.randint(0, room + 1, (2,), generator=generator).tolist()
        crop = images[index % len(images), :, top : top + SIDE, left : left + SIDE]
        crops.append(
            functional.interpolate(
                crop[None], images.shape[-2:], mode="bilinear", align_corners=False
            )
        )
    return torch.cat([images, *crops])


@cache
def reference() -> Tensor:
    """Return the float model's logits of the 130 crops."""
    return logits(network())


@torch.no_grad()
def logits(model: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a model's logits of the 130 crops."""
    return torch.cat([model(batch) for batch in torch.split(_crops(), BATCH)])


def score(outputs: Tensor) -> Score:
    """Return how near logits of the 130 crops are to the float model's."""
    same = outputs.argmax(dim=1) == reference().argmax(dim=1)
    return Score(sqnr([reference()], [outputs]), same.double().mean().item())


def score_of(quantizer: Quantizer, images: int = 64, batch: int = BATCH) -> Score:
    """Return how near the model comes by a quantizer, calibrated on the first of the images."""
    fitted = quantizer.fit(list(torch.split(calibration_images()[:images], batch)))
    return score(logits(fitted.apply(network(), progress=False).model))


def score_without_data(quantizer: Quantizer) -> Score:
    """Return how near the model comes by a quantizer that sees no data."""
    return score(logits(quantizer.apply(network(), progress=False).model))


SETTINGS: Mapping[str, Callable[[], Score]] = {
    "weights alone, symmetric": lambda: score_of(Quantizer().activations(None).fold()),
    "weights alone, asymmetric": lambda: score_of(
        Quantizer().asymmetric().activations(None).fold()
    ),
    "weights alone, asymmetric, BiasCorrection": lambda: score_of(
        Quantizer().asymmetric().activations(None).fold().transform(BiasCorrection())
    ),
    "weights alone, symmetric, BiasCorrection without data": lambda: score_without_data(
        Quantizer().activations(None).fold().transform(BiasCorrection())
    ),
    "weights alone, asymmetric, BiasCorrection without data": lambda: score_without_data(
        Quantizer().asymmetric().activations(None).fold().transform(BiasCorrection())
    ),
    "W8A8 dynamic, asymmetric, BiasCorrection without data": lambda: score_without_data(
        Quantizer()
        .asymmetric()
        .activations("dynamic", granularity="tensor")
        .transform(BiasCorrection())
    ),
    "W8A8, symmetric, BiasCorrection": lambda: score_of(STATIC.transform(BiasCorrection())),
    "W8A8, asymmetric, BiasCorrection, on 16 whole images": lambda: score_of(
        STATIC.asymmetric().transform(BiasCorrection()), images=16, batch=8
    ),
    "W8A8, asymmetric, EqualizeLayers": lambda: score_of(
        STATIC.asymmetric().transform(EqualizeLayers())
    ),
    "W8A8, asymmetric, MSE weights": lambda: score_of(STATIC.asymmetric().observer(weights=MSE())),
    "W8A8, asymmetric, MSE weights, BiasCorrection": lambda: score_of(
        STATIC.asymmetric().observer(weights=MSE()).transform(BiasCorrection())
    ),
    "W8A8, asymmetric, dynamic inputs": lambda: score_of(
        Quantizer().asymmetric().activations("dynamic", granularity="tensor").fold()
    ),
}


def main() -> None:
    """Print all tables."""
    try:
        reference()
        calibration_images()
    except AssetUnavailable as reason:
        print(f"skipped: {reason}")
        return
    print("Static 8-bit inputs, weights by channel, batch normalizations folded.\n")
    figures = ("SQNR, dB", "agreement")
    columns = ("observer of inputs", *(f"{one}, symmetric weights" for one in figures))
    print_table((*columns, *(f"{one}, asymmetric" for one in figures)), _observers())
    print_table(("setting, inputs by MinMax", *figures), _settings())
    print("Asymmetric weights and BiasCorrection:\n")
    print_table(("observer of inputs", *figures), _corrected())
    print("Peak memory beyond what is resident once the model and all images are loaded:\n")
    print_table(("what", "images", "a batch", "VmHWM, MB", "RssAnon, MB"), _memory())
    print(f"Calibrating beside the plain forward passes; medians of {REPEATS}, by turns.\n")
    print_table(("observer", "of the plain forward"), _overhead())


def child(what: str, images: str, batch: str) -> None:
    """Print what one call takes, as JSON."""
    batches = list(torch.split(calibration_images()[: int(images)], int(batch)))
    model = network()
    quantizer = STATIC.asymmetric().fit(batches)
    if what == "BiasCorrection":
        quantizer = quantizer.transform(BiasCorrection())
    reset_peak()
    resident, private = memory("VmRSS"), memory("RssAnon")
    if what == "plain forward":
        with torch.no_grad():
            for one in batches:
                model(one)
    else:
        quantizer.apply(model, progress=False)
    print(json.dumps({"peak": memory("VmHWM") - resident, "private": private}))


def _observers() -> Iterator[tuple[str, ...]]:
    for observer in OBSERVERS:
        watched = STATIC.observer(activations=observer)
        found = score_of(watched), score_of(watched.asymmetric())
        yield (repr(observer), *found[0].cells, *found[1].cells)


def _corrected() -> Iterator[tuple[str, ...]]:
    for observer in CORRECTED:
        watched = STATIC.asymmetric().observer(activations=observer)
        yield (repr(observer), *score_of(watched.transform(BiasCorrection())).cells)


def _settings() -> Iterator[tuple[str, ...]]:
    for title, run in SETTINGS.items():
        yield (title, *run().cells)


def _memory() -> Iterator[tuple[str, ...]]:
    if not Path("/proc/self/status").exists():
        yield ("skipped: this system has no /proc/self/status", "", "", "", "")
        return
    for what, images, batch in (
        ("plain forward", 64, BATCH),
        ("apply", 64, BATCH),
        ("apply", 64, SMALL_BATCH),
        ("BiasCorrection", 8, SMALL_BATCH),
    ):
        found, private = fresh("activations_vision", what, images, batch)
        alone = private - found["private"]
        peaks = f"{found['peak'] / MB:.0f}", f"{alone / MB:.0f}"
        yield (what, str(images), str(batch), *peaks)


def _overhead() -> Iterator[tuple[str, ...]]:
    model = copy.deepcopy(network())
    FoldBatchNorm().apply(model)
    batches = list(torch.split(calibration_images()[:BATCH], SMALL_BATCH))
    data = CalibrationData.bind(batches)

    def forward() -> None:
        for _ in data.outputs(model):
            pass

    watched = [
        STATIC.observer(activations=observer).fit(batches).plan(model).weights
        for observer in OBSERVERS
    ]
    calibrate = [partial(gather_for, model, weights, data, None) for weights in watched]
    plain, *taken = median_seconds([forward, *calibrate], REPEATS)
    for observer, seconds in zip(OBSERVERS, taken, strict=True):
        yield (repr(observer), f"{seconds / plain:.2f}")


@cache
def _crops() -> Tensor:
    return efficientnet_lite0.unlabelled_crops()


if __name__ == "__main__":
    child(*sys.argv[1:])
