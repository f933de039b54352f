"""What a user demands of a result is an error where it does not hold."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from mono_quant import ConfigurationError, Quantizer, Report, RequirementError
from mono_quant.evidence import LayerReport
from mono_quant.plan.warnings import warnings_of
from tests.cli.conftest import Monoquant
from tests.cli.conftest import folder as folder
from tests.cli.conftest import monoquant as monoquant


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 192, bias=False)).eval()


DATA = torch.linspace(-1, 1, 8 * 64).reshape(8, 64)


def test_coverage_is_the_share_of_the_bytes_of_all_parameters() -> None:
    result = Quantizer().skip("1").apply(network())
    assert result.report.coverage == 0.25
    assert result.report.summary()["coverage"] == 0.25
    assert Quantizer().apply(network()).report.coverage == 1
    assert Report(()).coverage == 1


def test_a_result_that_holds_what_is_required_comes_back_itself() -> None:
    result = Quantizer().fit(DATA).apply(network())
    assert result.require(coverage=1, sqnr=20) is result
    assert result.report.require(coverage=1.0) is result.report
    decibels = result.report.output_sqnr_db
    assert decibels is not None
    assert result.require(sqnr=decibels) is result
    with pytest.raises(RequirementError, match=rf"is {decibels:.1f} dB, and .* are required"):
        result.require(sqnr=math.nextafter(decibels, math.inf))


def test_what_falls_short_is_named_with_what_stays_float_and_why() -> None:
    result = Quantizer().skip("1").fit(DATA).apply(network())
    with pytest.raises(
        RequirementError,
        match=r"^25\.0 % of .* are quantized, and 90\.0 % are required; float stay 1\.weight "
        r"\(49\.15 kB: .*skip.*\); the output SQNR is .* dB, and 99\.0 dB are required$",
    ):
        result.require(coverage=0.9, sqnr=99)


def test_a_damage_that_nobody_measured_is_not_taken_for_none() -> None:
    with pytest.raises(RequirementError, match=r"none was measured: give some with fit\(data\)"):
        Quantizer().apply(network()).require(sqnr=1)


def test_an_output_that_is_not_finite_holds_nothing() -> None:
    with pytest.raises(RequirementError, match="the output SQNR is nan dB"):
        Report((), output_sqnr_db=math.nan).require(sqnr=-1000)


@pytest.mark.parametrize(
    ("coverage", "sqnr"), [(None, None), (-0.1, None), (1.1, 3), (90, None), (None, math.nan)]
)
def test_what_cannot_be_required_is_refused(coverage: float | None, sqnr: float | None) -> None:
    with pytest.raises(ConfigurationError):
        Report(()).require(coverage=coverage, sqnr=sqnr)


@pytest.mark.parametrize("skipped", ["0", "1"])
def test_a_run_that_left_most_in_float_says_so_first(skipped: str) -> None:
    report = Quantizer().bits(2).skip(skipped).fit(DATA).apply(network()).report
    assert any(warning.startswith("critical") for warning in report.warnings)
    first = report.warnings[0]
    assert first.startswith("most of the model was left in float: 25% of") is (skipped == "1")
    assert str(report).splitlines()[1] == f"warning: {first}"


def test_half_is_not_most() -> None:
    half = LayerReport("a", "Linear", (1, 1), 1, 4, 1, scheme="8-bit")
    report = Report((half, LayerReport("b", "Linear", (1, 1), 1, 4, 4, reason="skipped")))
    assert report.require(coverage=0.5) is report
    assert not any("most of the model" in warning for warning in warnings_of(report))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--require-coverage 0.99 --skip 2", "of the parameters' bytes are quantized, and 99.0 %"),
        ("--require-sqnr 20", "none was measured: give some with --calibration FILE"),
        ("--require-sqnr 90 --calibration batches.pt --factory tests.cli.networks:small", "90.0"),
    ],
)
def test_the_command_line_writes_nothing_that_falls_short(
    words: str, complaint: str, folder: Path, monoquant: Monoquant
) -> None:
    done = monoquant("quantize", "model.pt", "-o", "small.pt", *words.split())
    assert done.code == 1
    assert complaint in done.err
    assert "monoquant: error: nothing was written: " in done.err
    assert not (folder / "small.pt").exists()


def test_the_command_line_writes_what_holds(folder: Path, monoquant: Monoquant) -> None:
    done = monoquant("quantize", "model.pt", "-o", "small.pt", "--require-coverage", "0.9")
    assert (done.code, done.err) == (0, "")
    assert (folder / "small.pt").is_file()


def test_the_command_line_says_the_advice_in_its_own_words(
    folder: Path, monoquant: Monoquant
) -> None:
    done = monoquant("quantize", "model.pt", "-o", "small.pt", "--skip", "0")
    assert "--require-coverage 0.9 makes an error of it" in done.out
