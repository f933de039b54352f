"""What methods gain on EfficientNet-Lite0 at 8, 4, 3 and 2 bits, with 8-bit inputs and float ones.

Calibrated on the 20 ImageNet images and 20 mosaics of four of them; measured on 130 crops of the 26
photos of scikit-image. Many of those are of other kinds: textures, pages of text, slides under a
microscope. SQNR and agreement are of the logits there, against the float model's; "seen" is the
SQNR on the calibration images. Bits are those of the whole model over its parameters: scales,
tables and float biases counted, and what stays float too. CPU seconds are those of `run` on one
thread, with the measuring of every layer for the report; the peak is beyond what was resident
before. At 8 bits weights are asymmetric and by channel. "Few" are layers of under 30,000 weights, a
twentieth of all weights, and "some" those of under 100,000, a fifth.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from mono_quant import (
    GPTQ,
    MSE,
    BiasCorrection,
    LearnedRounding,
    Quantizer,
    Rounding,
    RoundToNearest,
)
from tests.benchmarks.activations_vision import calibration_images, logits, network, score
from tests.benchmarks.measure import MB, fresh, memory, one_thread, print_table, reset_peak
from tests.models import AssetUnavailable

WHOLE = 20
"""Calibration images that are no crops of others."""

MOSAICS = 20
BATCH = 5
FEW, SOME = 30_000, 100_000
"""Layers of fewer weights: a twentieth and a fifth of all weights.

The layers that filter channels alone and the others of the first 6 blocks of 16, or of 11.
"""

INPUTS: Mapping[str, str | None] = {"8-bit static": "static", "float": None}

Method = Callable[[Quantizer], Quantizer]

FURTHER = LearnedRounding(rounding_rate=0.01, scale_rate=3e-3, float_rate=1e-2)
"""Ten times the rates that it has by default, of scales three times."""


def small_at_8_bits(quantizer: Quantizer, below: int) -> Quantizer:
    """Return a quantizer of 8 bits for layers of fewer weights, each of which counts."""

    def is_small(_: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Conv2d | nn.Linear) and module.weight.numel() < below

    return quantizer.override(is_small, bits=8, symmetric=False)


def _rounded(rounding: Rounding) -> Method:
    return lambda quantizer: quantizer.asymmetric().rounding(rounding)


def _corrected(method: Method) -> Method:
    return lambda quantizer: method(quantizer).transform(BiasCorrection())


def _searched(rounding: Rounding) -> Method:
    return lambda quantizer: quantizer.observer(weights=MSE()).rounding(rounding)


def _best(below: int, rounding: Rounding | None = None) -> Method:
    """Return `quality("best")`, or its grids with another rounding, and 8 bits for small layers."""

    def method(quantizer: Quantizer) -> Quantizer:
        chosen = small_at_8_bits(quantizer.quality("best"), below)
        return chosen if rounding is None else chosen.rounding(rounding)

    return method


_NEAREST = _rounded(RoundToNearest())
_FROM_NEAREST = _rounded(LearnedRounding(start=RoundToNearest()))

AT_8: Mapping[str, Method] = {
    "to nearest": _NEAREST,
    "to nearest, `BiasCorrection`": _corrected(_NEAREST),
    "`GPTQ`": _rounded(GPTQ()),
    "learned from nearest": _FROM_NEAREST,
    "learned from nearest, `BiasCorrection`": _corrected(_FROM_NEAREST),
}
BELOW: Mapping[str, Method] = {
    "`MSE`": _searched(RoundToNearest()),
    "`MSE`, `GPTQ`": _searched(GPTQ()),
    "tables, few at 8 bits, `GPTQ`": _best(FEW, GPTQ()),
    '`quality("best")`, few at 8 bits': _best(FEW),
    "tables, few at 8 bits, learned further": _best(FEW, FURTHER),
    "tables, some at 8 bits, `GPTQ`": _best(SOME, GPTQ()),
}
METHODS: Mapping[int, Mapping[str, Method]] = {8: AT_8, 4: BELOW, 3: BELOW, 2: BELOW}


def main() -> None:
    """Print a row for each kind of inputs, width and method, each from a process of its own."""
    print(__doc__)
    try:
        network()
        calibration_images()
    except AssetUnavailable as reason:
        print(f"skipped: {reason}")
        return
    columns = ("inputs", "weights", "method", "bits", "SQNR, dB", "agreement", "seen, dB")
    print_table((*columns, "CPU s", "peak MB"), _rows())


def _rows() -> Iterator[tuple[str, ...]]:
    for inputs in INPUTS:
        for bits, methods in METHODS.items():
            for method in methods:
                found, _ = fresh("vision_methods", inputs, bits, method)
                yield (
                    inputs,
                    f"{bits} bits",
                    method,
                    f"{found['bits']:.3f}",
                    f"{found['sqnr']:.2f}",
                    f"{found['agreement']:.3f}",
                    f"{found['seen']:.2f}",
                    f"{found['seconds']:.0f}",
                    f"{found['peak'] / MB:.0f}",
                )


def child(inputs: str, bits: str, method: str) -> None:
    """Print what one setting comes to."""
    quantizer = Quantizer().bits(int(bits)).activations(INPUTS[inputs]).fold()
    data = list(torch.split(photos_and_mosaics(), BATCH))
    with one_thread():
        plan = METHODS[int(bits)][method](quantizer).fit(data).plan(network())
        reset_peak()
        resident, begun = memory("VmRSS"), time.process_time()
        result = plan.run(progress=False)
        seconds, peak = time.process_time() - begun, memory("VmHWM") - resident
        found = score(logits(result.model))
    count = sum(parameter.numel() for parameter in network().parameters())
    figures = {
        "bits": 8 * result.report.bytes / count,
        "sqnr": found.sqnr,
        "agreement": found.agreement,
        "seen": result.report.output_sqnr_db,
        "seconds": seconds,
        "peak": peak,
    }
    print(json.dumps(figures))


def photos_and_mosaics() -> Tensor:
    """Return whole images and mosaics of four of them, [40, 3, 224, 224]."""
    whole = calibration_images()[:WHOLE]
    side = whole.shape[-1] // 2
    halved = functional.interpolate(
        whole, (side, side), mode="bilinear", antialias=True, align_corners=False
    )
    draw = partial(torch.rand, (), generator=torch.Generator().manual_seed(0))
    mosaics = []
    for _ in range(MOSAICS):
        four = [halved[int(draw() * WHOLE)] for _ in range(4)]
        four = [one.flip(2) if draw() < 0.5 else one for one in four]
        rows = [torch.cat(four[place : place + 2], dim=2) for place in (0, 2)]
        mosaics.append(torch.cat(rows, dim=1))
    return torch.cat([whole, torch.stack(mosaics)])


if __name__ == "__main__":
    child(*sys.argv[1:])
