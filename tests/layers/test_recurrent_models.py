"""Recurrent layers of published models: what each way of quantizing them costs."""

import pytest
import torch
from torch import Tensor, nn

from mono_quant import Quantizer, sqnr_db
from mono_quant.modules import QuantizedGRU, QuantizedLSTM
from tests.models import g2p, resemblyzer
from tests.models.assets import AssetUnavailable

pytestmark = [pytest.mark.slow, pytest.mark.network]
WEIGHTS = Quantizer().activations(None)
DYNAMIC = Quantizer().activations("dynamic")
FIRST = "lstm.weight_ih_l0"  # meets spectrograms, which span many powers of ten
END = g2p.END


def speech() -> tuple[resemblyzer.SpeakerEncoder, Tensor]:
    try:
        return resemblyzer.load(), resemblyzer.sample_inputs()[0]
    except AssetUnavailable as reason:
        pytest.skip(str(reason))


def spelling() -> tuple[g2p.SpellingToSound, Tensor]:
    try:
        return g2p.load(), g2p.sample_inputs()[0]
    except AssetUnavailable as reason:
        pytest.skip(str(reason))


def error_db(model: nn.Module, source: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return sqnr_db(source(x), model(x))


@pytest.mark.parametrize(
    ("quantizer", "low", "high"),
    [
        (WEIGHTS, 8, 11),  # one row of 40 weights holds values from 0.1 to 61
        (DYNAMIC, 4, 10),
        (WEIGHTS.skip(FIRST), 24, 32),
        (DYNAMIC.skip(FIRST), 23, 32),
        (Quantizer().bits(16), 50, 90),
    ],
    ids=["weights", "dynamic", "weights but the first", "dynamic but the first", "half"],
)
def test_a_speaker_encoder_loses_what_its_first_weight_costs(
    quantizer: Quantizer, low: float, high: float
) -> None:
    source, x = speech()
    result = quantizer.apply(source)
    assert isinstance(result.model.lstm, QuantizedLSTM)
    assert low < error_db(result.model, source, x) < high


def test_without_data_the_report_warns_of_that_weight_and_names_what_mends_it() -> None:
    source, x = speech()
    plain = Quantizer().apply(source).report
    (line,) = [one for one in plain.warnings if "would leave" in one]
    assert line.startswith(FIRST)
    assert "no layer was measured" in line
    assert f"override({FIRST!r}, bits=16)" in line
    kept = Quantizer().on_damage("keep").apply(source)
    assert [row.name for row in kept.report.quantized if row.scheme == "float16"] == [FIRST]
    assert not any("would leave" in one for one in kept.report.warnings)
    assert error_db(kept.model, source, x) > 23  # of 4 to 10, above


@pytest.mark.parametrize("mode", [None, "dynamic", "static"])
def test_a_spelling_model_says_the_same_phonemes(mode: str | None) -> None:
    source, x = spelling()
    quantizer = Quantizer().activations(mode)
    result = (quantizer.fit(x) if mode == "static" else quantizer).apply(source)
    assert isinstance(result.model.encoder, QuantizedGRU)
    assert isinstance(result.model.decoder, QuantizedGRU)
    with torch.no_grad():
        found, expected = result.model(x), source(x)
    said = expected.argmax(-1)
    # What the model says after the end of a word is drawn from what it said before: no more.
    spoken = (said == END).cumsum(1) - (said == END).long() == 0
    assert sqnr_db(expected[spoken], found[spoken]) > 33
    assert torch.equal(found.argmax(-1)[spoken], said[spoken])
