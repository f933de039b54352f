"""``--html``: the report as a page, from a run and from a file."""

from pathlib import Path

import pytest

from tests.cli.conftest import SMALL, Monoquant
from tests.pictures.reading import Element, read

SAVED = ("quantize", "model.pt", "--bits", 4, "-o", "small.safetensors")
MEASURED = (*SAVED, "--factory", SMALL, "--calibration", "batches.pt")


def page(path: Path) -> Element:
    return read(path.read_text(encoding="utf-8"))


def test_quantize_writes_the_page_and_says_where(folder: Path, monoquant: Monoquant) -> None:
    done = monoquant(*MEASURED, "--html", "report.html")
    assert (done.code, done.err) == (0, "")
    assert "report: report.html" in done.out.splitlines()
    found = page(folder / "report.html")
    assert found.all("h1")[0].text == "Quantization report: small.safetensors"
    assert found.section("accumulated").all("svg", "chart")
    assert found.section("histograms").all("svg", "histogram")


def test_advice_on_the_page_is_in_options(folder: Path, monoquant: Monoquant) -> None:
    monoquant(*MEASURED, "--html", "report.html")
    warnings = page(folder / "report.html").section("warnings")
    advice = [code.text for code in warnings.all("code")]
    assert advice == ["--override 2:bits=8", "--skip 2"]
    assert "override('" not in warnings.text


def test_a_file_tells_the_same_as_the_run_that_made_it(folder: Path, monoquant: Monoquant) -> None:
    monoquant(*MEASURED, "--html", "run.html")
    done = monoquant("info", "small.safetensors", "--html", "file.html")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[-1] == "report: file.html"
    assert (folder / "file.html").read_bytes() == (folder / "run.html").read_bytes()


def test_json_tells_where_the_page_is(folder: Path, monoquant: Monoquant) -> None:
    assert monoquant(*SAVED, "--html", "a.html", "--json").json["html"] == "a.html"
    assert monoquant("info", "small.safetensors", "--html", "b.html", "--json").json["html"] == (
        "b.html"
    )
    assert "html" not in monoquant(*SAVED, "--json").json
    assert "html" not in monoquant("info", "small.safetensors", "--json").json


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ((*SAVED, "--html", "none/report.html"), "there is no folder none"),
        ((*SAVED, "--html", "small.safetensors"), "is the model's file"),
        ((*SAVED, "--html", "model.pt"), "is the model's file"),
        (("info", "model.pt", "--html", "model.pt"), "is the model's file"),
    ],
    ids=["no folder", "output", "model", "info"],
)
def test_what_cannot_be_written_is_refused_before_anything_is_done(
    words: tuple[object, ...], complaint: str, folder: Path, monoquant: Monoquant
) -> None:
    before = sorted(folder.iterdir())
    done = monoquant(*words)
    assert done.code in (2, 3)
    assert complaint in done.complaint
    assert sorted(folder.iterdir()) == before
