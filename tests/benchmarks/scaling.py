"""AWQ, SmoothQuant and Rotate on MiniLM and SmolLM2: what scaling or turning channels is worth.

MiniLM: calibrated on 64 articles of at most 256 tokens, measured on the embeddings of 50 other
documents and 200 lines of reviews. SmolLM2: calibrated on 16 windows of 128 tokens of the second
half of the news, measured on 2 windows of 512 tokens of their beginning. Only the Linears of the
blocks are quantized.
"""

import copy
import time
from collections.abc import Iterator, Mapping

from mono_quant import AWQ, GPTQ, MSE, Quantizer, Report, Rotate, SmoothQuant
from mono_quant.demo import background_articles, batches
from tests.benchmarks.language import calibration, judged, logits, perplexity, reference
from tests.benchmarks.language import original as language_model
from tests.benchmarks.measure import print_table
from tests.benchmarks.minilm import figures_of, in_blocks, original
from tests.models import AssetUnavailable

ARTICLES = 64
LENGTH = 128
WINDOWS = 16
MEASURED = 2

FOUR = Quantizer().bits(4).group_size(64)
COMPENSATED = FOUR.observer(weights=MSE()).rounding(GPTQ())
DYNAMIC = Quantizer().activations("dynamic")
STATIC = Quantizer().activations("static")
SETTINGS: Mapping[str, Quantizer] = {
    "W8A8 static": STATIC,
    "W8A8 static, SmoothQuant()": STATIC.transform(SmoothQuant()),
    "W8A8 static, Rotate()": STATIC.transform(Rotate()),
    "W8A8 static, SmoothQuant(), Rotate()": STATIC.transform(SmoothQuant(), Rotate()),
    "W8A8 dynamic": DYNAMIC,
    "W8A8 dynamic, SmoothQuant()": DYNAMIC.transform(SmoothQuant()),
    "W8A8 dynamic, Rotate()": DYNAMIC.transform(Rotate()),
    "INT4 g64": FOUR,
    "INT4 g64, AWQ": FOUR.transform(AWQ()),
    "INT4 g64, Rotate()": FOUR.transform(Rotate()),
    "INT4 g64, AWQ(), Rotate()": FOUR.transform(AWQ(), Rotate()),
    "INT4 g64, GPTQ()": COMPENSATED,
    "INT4 g64, GPTQ(), Rotate()": COMPENSATED.transform(Rotate()),
    "W8A8 static, SmoothQuant(0.5)": STATIC.transform(SmoothQuant(0.5)),
    "W8A8 dynamic, SmoothQuant(0.5)": DYNAMIC.transform(SmoothQuant(0.5)),
}


def main() -> None:
    """Print the encoder's table, then the language model's."""
    print(
        "MiniLM. An AWQ that scaled all 36 Linears, exact or not, came to 12.92 dB at INT4 g64.\n"
    )
    columns = ("weights and inputs", "output SQNR, dB", "Lee Pearson", "scaled, turned", "CPU s")
    print_table(columns, _minilm())
    try:
        reference(MEASURED)
    except AssetUnavailable as reason:
        print(f"SmolLM2 is skipped: {reason}")
        return
    print("SmolLM2.\n")
    columns = ("weights and inputs", "perplexity", "mean KL, nats", "top-1", "logits SQNR, dB")
    print_table((*columns, "scaled, turned", "CPU s"), _smollm2())


def scaled(report: Report) -> str:
    """Return how many groups of layers had their inputs scaled or turned, of how many."""
    said = [change for change in report.changes if "the inputs of" in change.text]
    return f"{sum(one.done for one in said)} of {len(said)}" if said else ""


def _minilm() -> Iterator[tuple[str, ...]]:
    data = batches(background_articles()[:ARTICLES], batch_size=16)
    for title, quantizer in SETTINGS.items():
        start = time.process_time()
        result = in_blocks(quantizer).fit(data, samples=ARTICLES).apply(original(), progress=False)
        seconds = time.process_time() - start
        found = figures_of(result)
        yield (
            title,
            f"{found.output_sqnr:.2f}",
            f"{found.pearson:.4f}",
            scaled(result.report),
            f"{seconds:.0f}",
        )


def _smollm2() -> Iterator[tuple[str, ...]]:
    yield ("float32", f"{perplexity(reference(MEASURED)):.2f}", *[""] * 5)
    data = calibration(WINDOWS, LENGTH, 4)
    for title, quantizer in SETTINGS.items():
        model = copy.deepcopy(language_model())
        start = time.process_time()
        fitted = quantizer.only("blocks").fit(data, samples=WINDOWS)
        result = fitted.apply_(model, progress=False)
        seconds = time.process_time() - start
        found = judged(logits(result.model, MEASURED))
        yield (
            title,
            f"{found.perplexity:.2f}",
            f"{found.divergence:.4f}",
            f"{found.agreement:.4f}",
            f"{found.output_sqnr:.2f}",
            scaled(result.report),
            f"{seconds:.0f}",
        )
