"""AWQ and SmoothQuant on MiniLM and SmolLM2, with and without: what scaling channels is worth.

MiniLM: calibrated on 64 articles of at most 256 tokens, measured on the embeddings of 50 other
documents and 200 lines of reviews. SmolLM2: calibrated on 16 windows of 128 tokens of the second
half of the news, measured on 2 windows of 512 tokens of their beginning. Only the Linears of the
blocks are quantized.
"""

import copy
import time
from collections.abc import Iterator, Mapping
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from mono_quant import AWQ, Quantizer, Report, SmoothQuant
from mono_quant.demo import background_articles, batches
from tests.benchmarks.measure import print_table, sqnr
from tests.benchmarks.minilm import figures_of, in_blocks, original
from tests.models import AssetUnavailable, smollm2

ARTICLES = 64
LENGTH = 128
WINDOWS = 16
MEASURED = 2

FOUR = Quantizer().bits(4).group_size(64)
DYNAMIC = Quantizer().activations("dynamic")
STATIC = Quantizer().activations("static")
SETTINGS: Mapping[str, Quantizer] = {
    "W8A8 static": STATIC,
    "W8A8 static, SmoothQuant()": STATIC.transform(SmoothQuant()),
    "W8A8 dynamic": DYNAMIC,
    "W8A8 dynamic, SmoothQuant()": DYNAMIC.transform(SmoothQuant()),
    "INT4 g64": FOUR,
    "INT4 g64, AWQ": FOUR.transform(AWQ()),
    "W8A8 static, SmoothQuant(0.5)": STATIC.transform(SmoothQuant(0.5)),
    "W8A8 dynamic, SmoothQuant(0.5)": DYNAMIC.transform(SmoothQuant(0.5)),
}


def main() -> None:
    """Print the encoder's table, then the language model's."""
    print(
        "MiniLM. An AWQ that scaled all 36 Linears, exact or not, came to 12.92 dB at INT4 g64.\n"
    )
    columns = ("weights and inputs", "output SQNR, dB", "Lee Pearson", "layers scaled", "CPU s")
    print_table(columns, _minilm())
    try:
        _exact()
    except AssetUnavailable as reason:
        print(f"SmolLM2 is skipped: {reason}")
        return
    print("SmolLM2.\n")
    columns = ("weights and inputs", "perplexity", "mean KL, nats", "top-1", "logits SQNR, dB")
    print_table((*columns, "layers scaled", "CPU s"), _smollm2())


def scaled(report: Report) -> str:
    """Return how many groups of layers had their inputs scaled, of how many."""
    said = [change for change in report.changes if "the inputs of" in change.text]
    return f"{sum(one.done for one in said)} of {len(said)} groups" if said else ""


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


@cache
def _language_model() -> nn.Module:
    return smollm2.load()


@cache
def _news() -> Tensor:
    """Return all tokens of the news."""
    return torch.tensor(smollm2.token_ids("\n".join(background_articles())))


@cache
def _exact() -> Tensor:
    return _logits(_language_model())


def _windows() -> Tensor:
    return _news()[: MEASURED * 512].view(MEASURED, 512)


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    """Return the logits for all windows, ``[2, 512, 49152]``."""
    return torch.cat([model(ids[None]) for ids in _windows()])


def _smollm2() -> Iterator[tuple[str, ...]]:
    yield ("float32", *_judged(_exact()), "", "")
    half = _news()[len(_news()) // 2 :][: WINDOWS * LENGTH].view(WINDOWS, LENGTH)
    data = list(torch.split(half, 4))
    for title, quantizer in SETTINGS.items():
        model = copy.deepcopy(_language_model())
        start = time.process_time()
        fitted = quantizer.only("blocks").fit(data, samples=WINDOWS)
        result = fitted.apply_(model, progress=False)
        seconds = time.process_time() - start
        yield (title, *_judged(_logits(result.model)), scaled(result.report), f"{seconds:.0f}")


def _judged(logits: Tensor) -> tuple[str, ...]:
    """Return perplexity, KL from the float model, agreement with it, and SQNR of logits."""
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), _windows()[:, 1:].flatten())
    exact, perplexity = _exact(), f"{loss.exp():.2f}"
    if logits is exact:
        return (perplexity, "", "", "")
    kl = torch.zeros((), dtype=torch.float64)
    for one, other in zip(exact.flatten(0, 1), logits.flatten(0, 1), strict=True):
        log, target = (x.double().log_softmax(-1) for x in (other, one))
        kl += functional.kl_div(log, target, log_target=True, reduction="sum")
    same = (logits.argmax(-1) == exact.argmax(-1)).double().mean()
    count = logits.shape[0] * logits.shape[1]
    return (
        perplexity,
        f"{kl / count:.4f}",
        f"{same:.4f}",
        f"{sqnr([exact], [logits]):.2f}",
    )
