"""What methods gain on a character model of two LSTMs, by bits and groups; weights alone.

Calibrated on the beginnings of 60 news articles; measured on those of 60 others, 4800 characters.
Weights are those of the LSTMs and of the output layer; the embedding has 8 bits in all rows. Rows
of 100, 128 and 356 values are cut into groups of 50, 64 and 89, or of 25, 32 and 89; "tables" are
what `quality("best")` takes: groups of 25 and 32 with 8-bit scales, and for rows of 356 an even
grid by channel. Bits are those of the whole model over its parameters, everything counted; CPU
seconds those of `run` on one thread, with the measuring of every layer for the report.
"""

import time
from collections.abc import Iterator, Mapping

import torch

from mono_quant import (
    GPTQ,
    MSE,
    LearnedRounding,
    Quantizer,
    Rounding,
    RoundToNearest,
)
from tests.benchmarks.measure import one_thread, print_table
from tests.models import AssetUnavailable, textgenrnn

BATCH = 64
WIDTHS = (8, 4, 3, 2)
LAYERS = ("*", "first.weight_ih_l0", "output.weight")
"""Those of rows of 128, 100 and 356 values; the later ones win."""

GROUPS: Mapping[str, tuple[int, int, int] | None] = {
    "channel": None,
    "50 to 89": (64, 50, 89),
    "25 to 89": (32, 25, 89),
}
ROUNDINGS: Mapping[str, Rounding] = {
    "to nearest": RoundToNearest(),
    "`GPTQ`": GPTQ(),
    "`LearnedRounding`": LearnedRounding(),
}


def main() -> None:
    """Print a row for each width, groups and rounding."""
    print(__doc__)
    try:
        before = textgenrnn.evaluate(textgenrnn.load())["bits_per_character"]
    except AssetUnavailable as reason:
        print(f"skipped: {reason}")
        return
    print(f"float: {before:.3f} bits a character\n")
    columns = (
        "weights",
        "groups",
        "rounding, ranges by `MSE`",
        "bits",
        "bits a character",
        "CPU s",
    )
    with one_thread():
        print_table(columns, _rows())


def tables(bits: int) -> Quantizer:
    """Return a quantizer of weights alone, with a table of levels for each."""
    quantizer = Quantizer().bits(bits).activations(None).quality("best")
    return quantizer.override("embedding", bits=8, granularity="channel")


def grid(bits: int, sizes: tuple[int, int, int] | None) -> Quantizer:
    """Return a quantizer of weights alone, with a scale for each channel or group."""
    quantizer = Quantizer().asymmetric().activations(None).observer(weights=MSE())
    for layer, size in zip(LAYERS, sizes or (None, None, None), strict=True):
        if size is None:
            quantizer = quantizer.override(layer, bits=bits, granularity="channel")
        else:
            quantizer = quantizer.override(layer, bits=bits, group_size=size)
    return quantizer.override("embedding", bits=8, granularity="channel")


def _rows() -> Iterator[tuple[str, ...]]:
    for bits in WIDTHS:
        ways = {title: grid(bits, sizes) for title, sizes in GROUPS.items()}
        if bits < WIDTHS[0]:
            ways["tables"] = tables(bits)
        for title, quantizer in ways.items():
            for name, rounding in ROUNDINGS.items():
                yield (f"{bits} bits", title, name, *_measured(quantizer, rounding))


def _measured(quantizer: Quantizer, rounding: Rounding) -> tuple[str, str, str]:
    """Return bits over all parameters, bits a character and CPU seconds."""
    model = textgenrnn.load()
    contexts, _ = textgenrnn.article_contexts(skipped=60)
    batches = list(torch.split(contexts, BATCH))
    plan = quantizer.rounding(rounding).fit(batches, samples=len(contexts)).plan(model)
    begun = time.process_time()
    result = plan.run(progress=False)
    seconds = time.process_time() - begun
    count = sum(parameter.numel() for parameter in model.parameters())
    found = textgenrnn.evaluate(result.model)["bits_per_character"]
    return f"{8 * result.report.bytes / count:.3f}", f"{found:.3f}", f"{seconds:.0f}"
