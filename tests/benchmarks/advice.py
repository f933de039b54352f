"""What warnings advise on real models: of weights without data, and of inputs with it.

Without data a weight is warned of where little is left of its product with drawn inputs. The first
table shows the weight of each model that is nearest to that, by the smaller half of its rows, and
by how many dB that half is worse than the whole in the weight where it is most of all.

Then the calls that warnings of inputs name are followed, round after round, on four models. A
round applies every call that is named, three of a kind at most. The output SQNR is that on the data
that was given to `fit`.
"""

import re
from collections.abc import Callable, Iterator

from torch import nn

from mono_quant import MSE, MinMax, OutlierColumns, Percentile, Quantizer, Report
from mono_quant.demo import encode, lee_documents
from tests.benchmarks import activations_speech, activations_text, activations_vision
from tests.benchmarks.measure import print_table
from tests.benchmarks.minilm import in_blocks, original
from tests.benchmarks.models import NAMES, real_model
from tests.models import AssetUnavailable, resemblyzer

ROUNDS = 3
CALL = re.compile(
    r"override\('(?P<name>[^']+)', (?P<outliers>outliers=OutlierColumns\(\), )?"
    r"(?:activations=\"(?P<mode>\w+)\"|(?P<whole>activation_observer))"
)
STATIC = Quantizer().activations("static")
Loaded = tuple[nn.Module, list[object]]


def minilm() -> Loaded:
    """Return MiniLM and 20 documents as it is called with them."""
    calls: list[object] = []
    handle = original().register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(args or kwargs), with_kwargs=True
    )
    encode(original(), lee_documents()[:20])
    handle.remove()
    return original(), calls


def smollm2() -> Loaded:
    """Return SmolLM2 and 128 tokens of news."""
    return activations_text.language_model(), [activations_text.tokens()[:1, :128]]


def efficientnet() -> Loaded:
    """Return EfficientNet-Lite0 and 16 images."""
    return activations_vision.network(), [activations_vision.calibration_images()[:16]]


def speaker() -> Loaded:
    """Return the speaker encoder and 16 clips."""
    return activations_speech.speaker(), [resemblyzer.speech_clips(resemblyzer.LANGUAGES[0])[:16]]


CASES: tuple[tuple[str, Callable[[], Loaded], Quantizer], ...] = (
    ("MiniLM dynamic", minilm, in_blocks(Quantizer().activations("dynamic"))),
    ("MiniLM static", minilm, in_blocks(STATIC)),
    ("MiniLM static, MSE", minilm, in_blocks(STATIC.observer(activations=MSE()))),
    ("SmolLM2 dynamic", smollm2, Quantizer().activations("dynamic").only("blocks")),
    ("SmolLM2 static", smollm2, STATIC.only("blocks")),
    ("EfficientNet-Lite0 static", efficientnet, STATIC.asymmetric()),
    (
        "EfficientNet-Lite0 static, Percentile(99.9)",
        efficientnet,
        STATIC.asymmetric().observer(activations=Percentile(99.9)),
    ),
    (
        "speaker encoder static, groups of 8",
        speaker,
        STATIC.override("lstm.weight_ih_l0", group_size=8),
    ),
)


def main() -> None:
    """Print a row for each model, then one for each model and setting."""
    columns = ("model", "nearest weight", "all its values", "the smaller half", "most", "warned of")
    print_table(columns, _estimates())
    rounds = (f"after round {number}" for number in range(1, ROUNDS + 1))
    print_table(("model and setting", "SQNR, dB", "warnings of inputs", *rounds), _rows())


def followed(quantizer: Quantizer, report: Report) -> Quantizer:
    """Return a quantizer with what the warnings of inputs advise; where two calls, the last."""
    for line in _of_inputs(report):
        for call in CALL.finditer(line):
            if call["whole"]:
                quantizer = quantizer.override(call["name"], activation_observer=MinMax())
            else:
                kept = OutlierColumns() if call["outliers"] else None
                mode = call["mode"]
                quantizer = quantizer.override(call["name"], outliers=kept, activations=mode)
    return quantizer


def _of_inputs(report: Report) -> list[str]:
    return [one for one in report.warnings if one.startswith(("the inputs of", "the range of"))]


def _estimates() -> Iterator[tuple[str, ...]]:
    """Yield what is estimated without data, in dB, of the weight that would be warned of first."""
    loaders: dict[str, Callable[[], nn.Module]]
    loaders = {"minilm": original, **{name: real_model(name).load for name in NAMES}}
    for name, load in loaders.items():
        try:
            report = Quantizer().apply(load(), progress=False).report
        except AssetUnavailable as reason:
            yield (name, f"skipped: {reason}", *[""] * 4)
            continue
        found = [
            (row.faint_db, row.sqnr_db, row.name)
            for row in report.quantized
            if row.faint_db is not None and row.sqnr_db is not None
        ]
        faint, whole, weight = min(found)
        most = max(one[1] - one[0] for one in found)
        warned = [row.name for row in report.quantized if row.loses_faint]
        figures = (f"{value:.1f}" for value in (whole, faint, most))
        yield (name, weight, *figures, ", ".join(warned) or "nothing")


def _rows() -> Iterator[tuple[str, ...]]:
    for title, load, asked in CASES:
        try:
            model, data = load()
        except AssetUnavailable as reason:
            yield (title, f"skipped: {reason}", *[""] * (ROUNDS + 1))
            continue
        quantizer = asked.fit(data)
        report = quantizer.apply(model, progress=False).report
        shown = [f"{report.output_sqnr_db:.2f}", str(len(_of_inputs(report)))]
        for _ in range(ROUNDS):
            if _of_inputs(report):
                quantizer = followed(quantizer, report)
                report = quantizer.apply(model, progress=False).report
                shown.append(f"{report.output_sqnr_db:.2f}")
        yield (title, *shown, *[""] * (ROUNDS + 2 - len(shown)))
