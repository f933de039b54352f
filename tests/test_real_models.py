"""Real pretrained models: figures of an independent implementation, and what stays float."""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from torch import nn

from mono_quant import QuantizationResult
from mono_quant.demo import DemoUnavailable, MiniLM, lee_documents
from mono_quant.demo.minilm import batches
from tests.benchmarks.accuracy import INT4, OTHERS, Setting
from tests.benchmarks.measure import sqnr
from tests.benchmarks.minilm import (
    Figures,
    figures_of,
    filed,
    in_blocks,
    linears,
    original,
    payload,
)
from tests.benchmarks.models import WIDTHS, left_float, quantized, real_model
from tests.models import AssetUnavailable

pytestmark = [pytest.mark.slow, pytest.mark.network]

TOLERANCE_DB = 0.15
FILE_TOLERANCE = 0.02
INT8 = next(setting for setting in OTHERS if setting.bits == 8 and setting.symmetric)
RECURRENT = {
    "resemblyzer": ("lstm", "LSTM"),
    "g2p": ("encoder", "GRU"),
    "silero_vad": ("memory", "LSTMCell"),
    "textgenrnn": ("first", "LSTM"),
}


@contextmanager
def assets() -> Iterator[None]:
    """Skip the test where a model or its data cannot be had."""
    try:
        yield
    except (AssetUnavailable, DemoUnavailable) as reason:
        pytest.skip(str(reason))


@cache
def encoder(setting: Setting) -> QuantizationResult[MiniLM]:
    with assets():
        return in_blocks(setting.quantizer).apply(original())


@cache
def measured(setting: Setting) -> Figures:
    return figures_of(encoder(setting))


@cache
def model_at(name: str, bits: int) -> QuantizationResult[nn.Module]:
    with assets():
        loader = real_model(name)
        return quantized(loader, loader.load(), bits)


@pytest.mark.parametrize("setting", INT4, ids=lambda setting: setting.title)
def test_minilm_has_the_figures_of_an_independent_implementation(setting: Setting) -> None:
    expected = setting.expected
    assert expected is not None
    found = measured(setting)
    assert found.bits_per_weight == expected.bits_per_weight
    assert found.weight_sqnr == pytest.approx(expected.weight_sqnr, abs=TOLERANCE_DB)
    assert found.output_sqnr == pytest.approx(expected.output_sqnr, abs=TOLERANCE_DB)


@pytest.mark.parametrize("setting", [*INT4, INT8], ids=lambda setting: setting.title)
def test_the_report_says_what_the_weights_say(setting: Setting) -> None:
    result = encoder(setting)
    assert result.report.mean_sqnr_db == pytest.approx(measured(setting).weight_sqnr, abs=1e-3)
    assert len(result.report.quantized) == 36


def test_int8_is_where_the_formula_puts_it() -> None:
    expected = []
    for layer in linears(original()).values():
        weight = layer.weight.detach().double()
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        expected.append(sqnr([weight], [(weight / scale).round() * scale]))
    # Scales are stored in 16 bits, which moves the grid by up to a two-thousandth.
    assert measured(INT8).weight_sqnr == pytest.approx(statistics.mean(expected), abs=0.05)


@pytest.mark.parametrize("setting", [*INT4, INT8], ids=lambda setting: setting.title)
def test_a_file_holds_codes_scales_and_little_else(setting: Setting) -> None:
    expected = payload(setting.bits, setting.group, setting.symmetric)
    assert encoder(setting).report.bytes == expected
    found = filed(encoder(setting))
    assert expected < found.bytes < expected * (1 + FILE_TOLERANCE)


def test_a_fresh_process_computes_the_same_to_the_bit() -> None:
    assert filed(encoder(INT4[1])).equal


def test_minilm_is_valid_on_real_documents() -> None:
    result = encoder(INT4[1])
    (batch,) = batches(lee_documents()[:4])
    assert result.validate(batch).status == "valid"


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", ["efficientnet_lite0", *RECURRENT])
def test_a_quantized_model_runs_and_is_valid(name: str, bits: int) -> None:
    result = model_at(name, bits)
    inputs = real_model(name).sample_inputs()
    with torch.no_grad():
        output = result.model(*inputs)
    assert torch.isfinite(output).all()
    assert result.report.output_sqnr_db is not None
    assert result.validate().status == "valid"


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_stay_float_for_a_reason_that_is_given(name: str, bits: int) -> None:
    path, kind = RECURRENT[name]
    report = model_at(name, bits).report
    (row,) = [row for row in report.kept if row.name == path]
    assert row.layer == kind
    assert row.reason == f"no quantizer knows a {kind}"
    assert row.bytes == row.float_bytes
    assert left_float(model_at(name, bits))[row.reason] > 0.5
    assert any(text.startswith(f"{path} stays float with ") for text in report.warnings)


def test_every_convolution_of_efficientnet_is_quantized_at_8_bits() -> None:
    result = model_at("efficientnet_lite0", 8)
    weights = [row for row in result.report.kept if row.shape]
    assert not weights
    assert {row.layer for row in result.report.quantized} == {
        "Conv2d",
        "Linear",
        "SamePaddingConv2d",
    }
