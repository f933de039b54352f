"""The demonstration: a real sentence encoder made smaller, and what that does to its work.

Every figure is measured when the demonstration runs.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional

from mono_quant.api import load_model
from mono_quant.configurable import Config
from mono_quant.demo.lee import background_articles, lee_documents, pearson_with_humans
from mono_quant.demo.minilm import MiniLM, batches, encode, load_minilm
from mono_quant.numerics.metrics import sqnr_db
from mono_quant.progress import Bar
from mono_quant.quantizer import Quantizer
from mono_quant.result import QuantizationResult
from mono_quant.serializers import write_state_dict
from mono_quant.text import format_bytes, format_db, table

_VARIANTS: Mapping[str, Quantizer] = {
    "INT8": Quantizer().bits(8).activations("dynamic"),
    "INT4": Quantizer()
    .bits(4)
    .group_size(64)
    .override("embeddings", bits=8, granularity="channel"),
}
_FITTED_ON = 16
_SENTENCE = "The cabinet met on Monday to discuss the drought."
_BATCH = 16
_ROUNDS = range(5, 32)
_SECONDS = 15.0
_NOTICEABLE = 1.05
_NOT_JSON = ("folder", "variants")
_ROWS = (
    "file",
    "times smaller",
    "bits per weight",
    "mean weight SQNR",
    "output SQNR",
    "mean cosine to float",
    "least cosine to float",
    "Pearson with people's ratings",
    "time of a call, 1 sentence",
    f"time of a call, {_BATCH} documents",
    "saved, reloaded and run",
)


@attrs.frozen
class Variant:
    """What one way to quantize the encoder came to.

    Attributes:
        name: of the way.
        quantizer: the call that it is.
        file: name of the file.
        file_bytes: its size.
        bits_per_weight: over the quantized weights, scales and zero points counted.
        weight_sqnr_db: mean over the weights.
        output_sqnr_db: of the embeddings of the rated documents.
        mean_cosine: of each document's embedding with its float one.
        min_cosine: the smallest of those.
        pearson: correlation of the documents' similarities with human ratings.
        validation: what saving, reloading and running showed.
        ratio: how many times smaller the file is than the float one.
        sentence_time: of one call on a short sentence, as a multiple of the float model's.
        batch_time: the same for a batch of documents.
    """

    name: str
    quantizer: str
    file: str
    file_bytes: int
    bits_per_weight: float
    weight_sqnr_db: float
    output_sqnr_db: float
    mean_cosine: float
    min_cosine: float
    pearson: float
    validation: str
    ratio: float = 1.0
    sentence_time: float = 1.0
    batch_time: float = 1.0

    def column(self) -> tuple[str, ...]:
        """Return the figures as the cells of a column."""
        return (
            format_bytes(self.file_bytes),
            f"{self.ratio:.2f}",
            f"{self.bits_per_weight:.2f}",
            format_db(self.weight_sqnr_db),
            format_db(self.output_sqnr_db),
            f"{self.mean_cosine:.4f}",
            f"{self.min_cosine:.4f}",
            f"{self.pearson:.4f}",
            f"x {self.sentence_time:.2f}",
            f"x {self.batch_time:.2f}",
            self.validation,
        )


@attrs.frozen
class DemoReport:
    """What the demonstration measured.

    Attributes:
        parameters: of the encoder.
        float_file_bytes: size of the float file.
        float_pearson: the float encoder's correlation with human ratings.
        documents: how many were rated.
        sentence_seconds: of one call of the float encoder on a short sentence.
        batch_seconds: of one call on a batch of documents.
        variants: the ways to quantize it.
        folder: where the files are, if they were to be kept.
    """

    parameters: int
    float_file_bytes: int
    float_pearson: float
    documents: int
    sentence_seconds: float
    batch_seconds: float
    variants: tuple[Variant, ...]
    folder: Path | None = None

    def to_dict(self) -> Config:
        """Return everything as JSON data."""
        return {
            **attrs.asdict(self, filter=lambda field, _: field.name not in _NOT_JSON),
            "folder": str(self.folder) if self.folder is not None else None,
            "variants": [attrs.asdict(variant) for variant in self.variants],
            "notes": list(self.notes()),
        }

    def notes(self) -> Iterator[str]:
        """Yield what the table does not say by itself."""
        slower = [
            f"{variant.name} {times:.1f} times on {what}"
            for variant in self.variants
            for times, what in (
                (variant.sentence_time, "the sentence"),
                (variant.batch_time, "the documents"),
            )
            if times > _NOTICEABLE
        ]
        if slower:
            yield (
                f"slower than float here: {', '.join(slower)}. Layers as small as these wait for "
                "the calls of operators where few rows meet them, and 4-bit weights are decoded "
                "where many do"
            )

    def __str__(self) -> str:
        """Return it as text for a terminal."""
        floats = (
            format_bytes(self.float_file_bytes),
            "1.00",
            "32.00",
            *[""] * 4,
            f"{self.float_pearson:.4f}",
            f"{1000 * self.sentence_seconds:.1f} ms",
            f"{1000 * self.batch_seconds:.0f} ms",
            "",
        )
        columns = ("", "float", *(variant.name for variant in self.variants))
        shown = [variant.column() for variant in self.variants]
        lines = [
            f"all-MiniLM-L6-v2, {self.parameters / 1e6:.1f} million parameters; fitted on "
            f"{_FITTED_ON} news articles, judged on {self.documents} others that people rated",
            "",
            *table(columns, list(zip(_ROWS, floats, *shown, strict=True)), frozenset(columns[1:])),
            "",
            *(f"{variant.name}: {variant.quantizer}" for variant in self.variants),
            *self.notes(),
        ]
        if self.folder is not None:
            lines.append(f"the files are in {self.folder}")
        return "\n".join(lines)


def run_demo(output: Path | None = None, *, progress: bool = False) -> DemoReport:
    """Quantize the encoder in two ways and return what was measured.

    Args:
        output: a folder for the files; it is made. By default they are not kept.
        progress: show a progress bar.

    Raises:
        DemoUnavailable: the encoder, its tokenizer or the documents are not installed.
    """
    with _folder(output) as folder, Bar(total=4, disable=not progress, leave=False) as bar:
        model, documents = load_minilm(), lee_documents()
        data = batches(background_articles()[:_FITTED_ON], batch_size=_FITTED_ON)
        float_file = folder / "minilm-float.safetensors"
        write_state_dict(float_file, model.state_dict())
        reference = encode(model, documents)
        bar.update()
        variants: list[Variant] = []
        models: list[nn.Module] = [model]
        for name, quantizer in _VARIANTS.items():
            result = quantizer.fit(data).apply(model, progress=False)
            saved = result.save(folder / f"minilm-{name.lower()}.safetensors")
            with torch.device("meta"):
                skeleton = MiniLM()
            loaded = load_model(saved, skeleton).eval()
            embeddings = encode(loaded, documents)
            variants.append(_measured(name, quantizer, result, saved, reference, embeddings))
            models.append(loaded)
            bar.update()
        sentence, batch = _times(models, [_SENTENCE]), _times(models, documents[:_BATCH])
        bar.update()
        return DemoReport(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            float_file_bytes=float_file.stat().st_size,
            float_pearson=pearson_with_humans(reference),
            documents=len(documents),
            sentence_seconds=statistics.median(sentence[0]),
            batch_seconds=statistics.median(batch[0]),
            variants=tuple(
                attrs.evolve(
                    variant,
                    ratio=float_file.stat().st_size / variant.file_bytes,
                    sentence_time=_relative(sentence, place),
                    batch_time=_relative(batch, place),
                )
                for place, variant in enumerate(variants, start=1)
            ),
            folder=output,
        )


def _measured(
    name: str,
    quantizer: Quantizer,
    result: QuantizationResult[MiniLM],
    saved: Path,
    reference: Tensor,
    embeddings: Tensor,
) -> Variant:
    cosines = functional.cosine_similarity(reference.double(), embeddings.double())
    weight_sqnr_db = result.report.mean_sqnr_db
    return Variant(
        name=name,
        quantizer=repr(quantizer),
        file=saved.name,
        file_bytes=saved.stat().st_size,
        bits_per_weight=result.report.bits_per_weight,
        weight_sqnr_db=weight_sqnr_db if weight_sqnr_db is not None else math.inf,
        output_sqnr_db=sqnr_db(reference, embeddings),
        mean_cosine=cosines.mean().item(),
        min_cosine=cosines.min().item(),
        pearson=pearson_with_humans(embeddings),
        validation=result.validate(path=saved).status,
    )


@torch.no_grad()
def _times(models: Sequence[nn.Module], texts: Sequence[str]) -> list[list[float]]:
    """Return the seconds of each model's calls, taken in turns so that all share the weather.

    There are fewer rounds where they take long.
    """
    taken: list[list[float]] = [[] for _ in models]
    ((ids, mask),) = batches(texts)
    begun = time.perf_counter()
    for turn in range(_ROUNDS.stop):
        if turn > _ROUNDS.start and time.perf_counter() - begun > _SECONDS:
            break
        for step in range(len(models)):
            place = (turn + step) % len(models)
            start = time.perf_counter()
            models[place](ids, mask)
            if turn:  # the first one warms up
                taken[place].append(time.perf_counter() - start)
    return taken


def _relative(taken: Sequence[Sequence[float]], place: int) -> float:
    """Return the median over the rounds of a model's time by that of the first."""
    return statistics.median(
        other / first for other, first in zip(taken[place], taken[0], strict=True)
    )


@contextmanager
def _folder(wanted: Path | None) -> Iterator[Path]:
    if wanted is None:
        with tempfile.TemporaryDirectory(prefix="mono_quant_demo_") as folder:
            yield Path(folder)
    else:
        wanted.mkdir(parents=True, exist_ok=True)
        yield wanted
