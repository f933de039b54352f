"""A few columns in float16 beside 8-bit weights and inputs: what they gain, and what they cost.

Columns are chosen on other data than what is measured; SmolLM2 and MiniLM have their Linears of the
blocks quantized, inputs dynamically, and the speaker encoder everything.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from mono_quant import OutlierColumns, QuantizationResult, Quantizer
from mono_quant.checkpoint import ModelT
from mono_quant.demo import batches, lee_documents
from tests.benchmarks import activations_text
from tests.benchmarks.activations_speech import (
    FIRST,
    encodings,
    speaker,
    speaker_encodings,
)
from tests.benchmarks.measure import median_seconds, print_table, sqnr
from tests.benchmarks.minilm import embeddings, in_blocks, original, reference
from tests.models import AssetUnavailable, resemblyzer, smollm2

WIDTH = 1024
ROWS = 64
LOUD = (5, 300, 301, 900)
TURNS = 40
DOCUMENTS = 10
"""On which the columns of MiniLM are chosen; the others are measured."""

DYNAMIC = Quantizer().activations("dynamic")
RULES: Mapping[str, OutlierColumns] = {
    "6 times the median": OutlierColumns(),
    "3 times": OutlierColumns(3.0),
}


def main() -> None:
    """Print a table of a made-up Linear, then one for each real model."""
    print(f"A Linear of {WIDTH} x {WIDTH}, {ROWS} rows, {len(LOUD)} channels louder than others:\n")
    more = "with outliers()"
    columns = (
        "louder by",
        "inputs",
        "SQNR, dB",
        more,
        "bits/weight",
        more,
        "time over float",
        more,
    )
    print_table(columns, _made_up())
    tables: tuple[tuple[str, tuple[str, ...], Callable[[], Iterator[tuple[str, ...]]]], ...] = (
        (
            "SmolLM2, columns chosen on 512 tokens of documentation, measured on 512 of news",
            ("setting", "bits/weight", "layers", "perplexity", "KL, nats", "top-1", "SQNR, dB"),
            _smollm2,
        ),
        (
            f"MiniLM, columns chosen on {DOCUMENTS} documents, measured on other texts",
            ("setting", "bits/weight", "layers", "SQNR, dB"),
            _minilm,
        ),
        (
            f"Speaker encoder, of whose {FIRST} some columns are kept, chosen on synthetic voices",
            (f"{FIRST}", "its bytes", "bits/weight", "SQNR of the encodings, dB"),
            _speaker,
        ),
    )
    for title, shown, rows in tables:
        print(f"{title}:\n")
        try:
            print_table(shown, rows())
        except AssetUnavailable as reason:
            print(f"\nskipped: {reason}\n")


def noise(loud: float, seed: int) -> Tensor:
    """Return rows of noise, some channels of which are louder."""
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))
    x[:, list(LOUD)] *= loud
    return x


@torch.no_grad()
def _made_up() -> Iterator[tuple[str, ...]]:
    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, WIDTH)
    for loud in (1, 20, 50, 100):
        for granularity in ("token", "tensor"):
            plain = Quantizer().activations("dynamic", granularity=granularity)
            x, y = noise(loud, 1), noise(loud, 2)
            results = [one.fit(x).apply(layer, progress=False) for one in (plain, plain.outliers())]
            models: list[nn.Module] = [layer, *(result.model for result in results)]
            seconds = median_seconds([partial(model, y) for model in models], TURNS)
            yield (
                str(loud),
                f"a range for each {granularity}",
                *(f"{sqnr([layer(y)], [model(y)]):.2f}" for model in models[1:]),
                *(f"{result.report.bits_per_weight:.3f}" for result in results),
                *(f"{one / seconds[0]:.2f}" for one in seconds[1:]),
            )


def settings(quantizer: Quantizer, data: object) -> Mapping[str, Quantizer]:
    """Return what is tried: without columns, by the weights alone, and by inputs too."""
    return {
        "no outliers": quantizer,
        "outliers(), no data": quantizer.outliers(),
        **{f"fitted, {name}": quantizer.outliers(rule).fit(data) for name, rule in RULES.items()},
    }


def _cost(result: QuantizationResult[ModelT]) -> tuple[str, str]:
    rows = result.report.quantized
    some = sum("outlier" in (row.scheme or "") for row in rows)
    return f"{result.report.bits_per_weight:.3f}", f"{some} of {len(rows)}"


def _smollm2() -> Iterator[tuple[str, ...]]:
    model = activations_text.language_model()
    judged = activations_text.judged(activations_text.float_logits())
    yield ("float", "32", "", *judged.values())
    told = smollm2.text_windows()["python_help"].flatten()
    data = told[: activations_text.WINDOWS * activations_text.LENGTH]
    data = data.view(activations_text.WINDOWS, activations_text.LENGTH)
    for name, quantizer in settings(in_blocks(DYNAMIC), data).items():
        result = quantizer.apply(model, progress=False)
        judged = activations_text.judged(activations_text.logits(result.model))
        yield (name, *_cost(result), *judged.values())


def _minilm() -> Iterator[tuple[str, ...]]:
    data = list(batches(lee_documents()[:DOCUMENTS], batch_size=DOCUMENTS))
    for name, quantizer in settings(in_blocks(DYNAMIC), data).items():
        result = quantizer.apply(original(), progress=False)
        others = [embeddings(result.model)[DOCUMENTS:]]
        yield (name, *_cost(result), f"{sqnr([reference()[DOCUMENTS:]], others):.2f}")


def _speaker() -> Iterator[tuple[str, ...]]:
    fitted = DYNAMIC.fit([resemblyzer.sample_inputs()])
    for name, quantizer in {
        "8 bits": fitted,
        **{f"outliers={n}": fitted.override(FIRST, outliers=n) for n in (2, 4, 8, 12, 16, 20)},
        **{
            f'outliers={n}, activations="float"': fitted.override(
                FIRST, outliers=n, activations="float"
            )
            for n in (12, 16)
        },
        "group_size=8": fitted.override(FIRST, group_size=8),
        "group_size=8, outliers=8": fitted.override(FIRST, group_size=8, outliers=8),
        'group_size=8, activations="float"': fitted.override(
            FIRST, group_size=8, activations="float"
        ),
        "bits=16": fitted.override(FIRST, bits=16),
    }.items():
        result = quantizer.apply(speaker(), progress=False)
        (row,) = (row for row in result.report.quantized if row.name == FIRST)
        decibels = sqnr([speaker_encodings()], [encodings(result.model)])
        yield (name, str(row.bytes), f"{row.bits_per_weight:.2f}", f"{decibels:.2f}")
