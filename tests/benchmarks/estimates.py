"""How near the predicted time of quantizing is to the time that it takes, on real models.

MiniLM's blocks on 32 articles and EfficientNet-Lite0 on 32 images, each in a process of its own, as
`monoquant plan` and `quantize` are. The prediction itself is to take about a second.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping

import torch
from torch import nn

from mono_quant import GPTQ, HQQ, MSE, Codebook, LearnedRounding, Quantizer
from mono_quant.demo import background_articles, batches
from mono_quant.plan import Plan
from tests.benchmarks.activations_vision import calibration_images, network
from tests.benchmarks.measure import fresh, one_thread, print_table
from tests.benchmarks.minilm import in_blocks, original

SAMPLES = 32
FACTOR = 2.0
"""By how much a prediction may be wrong, either way, that is called right; of 2 s and more."""
LONG = 2.0


def _text(quantizer: Quantizer) -> Plan[nn.Module]:
    articles = batches(background_articles()[:SAMPLES], batch_size=8)
    return in_blocks(quantizer).fit(articles).plan(original())


def _images(quantizer: Quantizer) -> Plan[nn.Module]:
    images = list(torch.split(calibration_images()[:SAMPLES], 8))
    return quantizer.fit(images).plan(network())


WAYS: Mapping[str, Callable[[], Plan[nn.Module]]] = {
    "MiniLM, 8 bits, no data": lambda: Quantizer().plan(original()),
    "MiniLM, 4 bits by MSE, no data": lambda: Quantizer().bits(4).observer(MSE()).plan(original()),
    "MiniLM, 4 bits by HQQ, no data": lambda: (
        Quantizer().bits(4).float_zero_point().rounding(HQQ()).plan(original())
    ),
    "MiniLM, NF4, no data": lambda: Quantizer().scheme(Codebook.nf4()).plan(original()),
    "MiniLM, 8 bits, dynamic": lambda: _text(Quantizer().activations("dynamic")),
    "MiniLM, 8 bits, static": lambda: _text(Quantizer()),
    "MiniLM, 4 bits by GPTQ": lambda: _text(Quantizer().bits(4).rounding(GPTQ())),
    "MiniLM, 4 bits learned, 16 steps": lambda: _text(
        Quantizer().bits(4).rounding(LearnedRounding(steps=16))
    ),
    "EfficientNet-Lite0, 8 bits, no data": lambda: Quantizer().plan(network()),
    "EfficientNet-Lite0, 8 bits, static": lambda: _images(Quantizer()),
    "EfficientNet-Lite0, 4 bits by GPTQ": lambda: _images(Quantizer().bits(4).rounding(GPTQ())),
}


def main() -> None:
    """Print a row for each way."""
    print(__doc__)
    columns = ("what", "predicted, s", "taken, s", "predicted / taken", "predicting took, s")
    print_table(columns, map(_row, WAYS))


def _row(way: str) -> tuple[str, ...]:
    found, _ = fresh("estimates", way)
    ratio = found["predicted"] / found["taken"]
    near = found["taken"] < LONG or 1 / FACTOR <= ratio <= FACTOR
    return (
        way,
        f"{found['predicted']:.2f}",
        f"{found['taken']:.2f}",
        f"{ratio:.2f}{'' if near else ' (wrong)'}",
        f"{found['cost']:.2f}",
    )


def child(way: str) -> None:
    """Print what was predicted of one way, and what it took."""
    with one_thread():
        plan = WAYS[way]()
        begun = time.perf_counter()
        predicted = plan.estimate_time()
        cost, begun = time.perf_counter() - begun, time.perf_counter()
        plan.run(progress=False)
        taken = time.perf_counter() - begun
    print(json.dumps({"predicted": predicted.seconds, "taken": taken, "cost": cost}))
    print(predicted, file=sys.stderr)


if __name__ == "__main__":
    child(*sys.argv[1:])
