"""What files keep of a report, and the report that comes back."""

import json
import math
from pathlib import Path

import attrs
import pytest
import torch
from torch import nn

from mono_quant import Distribution, InputReport, LayerReport, Quantizer, Report
from mono_quant.configurable import Json
from mono_quant.errors import CorruptCheckpointError
from mono_quant.files import describe_file
from mono_quant.serializers import read_header, serializer_for
from mono_quant.stored import LAYERS, report_of, stored
from tests.helpers import TiedModel, noise

SPREAD = Distribution(-1.0, 0.5, (3, 4, 0, 2), 7, -0.9, 0.8, (-1.0, 1.0), (-0.5, 0.5))
ROW = LayerReport(
    "a.weight",
    "Linear",
    (4, 4),
    16,
    64,
    20,
    scheme="4-bit",
    activation="static inputs",
    sqnr_db=20.5,
    output_sqnr_db=0.0,
    accumulated_db=-math.inf,
    place=0,
    inputs=(InputReport("a.weight", -1.0, 2.0, histogram=attrs.evolve(SPREAD, typical=None)),),
    ranges=("by chance",),
    note="of note",
    aliases=("b.weight",),
    histogram=SPREAD,
)
KEPT = LayerReport("norm", "LayerNorm", (), 8, 32, 32, reason="no quantizer")
REPORT = Report(
    (ROW, KEPT),
    buffer_bytes=12,
    output_sqnr_db=math.nan,
    samples=3,
    notes=("a note",),
    warnings=("critical: bad",),
    original_bytes=200,
)


def written(report: Report) -> Report:
    """Return a report that went through the JSON of a file."""
    return report_of(json.loads(json.dumps(stored(report), allow_nan=False)))


def test_what_is_stored_comes_back() -> None:
    found = written(REPORT)
    assert found.layers == REPORT.layers
    assert str(found) == str(REPORT)
    assert math.isnan(found.output_sqnr_db or 0)
    assert (found.bytes, found.float_bytes, found.buffer_bytes) == (64, 200, 12)
    assert stored(found) == stored(REPORT)


def test_what_is_not_known_takes_no_place() -> None:
    rows = stored(REPORT)[LAYERS]
    assert isinstance(rows, list)
    assert rows[1] == {
        "name": "norm",
        "layer": "LayerNorm",
        "parameters": 8,
        "float_bytes": 32,
        "bytes": 32,
        "reason": "no quantizer",
    }


def test_estimates_are_stored_only_where_nothing_was_measured() -> None:
    rows = (attrs.evolve(ROW, estimated_db=9.0), attrs.evolve(KEPT, estimated_db=5.0))
    found = written(attrs.evolve(REPORT, layers=rows)).layers
    assert [row.estimated_db for row in found] == [None, 5.0]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("data", [False, True])
def test_a_file_gives_back_the_report_that_it_was_saved_with(
    tmp_path: Path, suffix: str, data: bool
) -> None:
    quantizer = Quantizer().bits(4).only("*")
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64))
    result = (quantizer.fit(noise(8, 64)) if data else quantizer).apply(model, progress=False)
    found = describe_file(result.save(tmp_path / f"model{suffix}"))
    assert str(found.report) == str(result.report)
    assert found.report.to_markdown() == result.report.to_markdown()
    assert [row.histogram for row in found.report.layers] == [
        row.histogram for row in result.report.layers
    ]
    assert LAYERS not in found.summary
    assert "layers" not in str(found)
    assert result.report.diff(found.report).layers == ()


def without_rows(path: Path) -> Path:
    """Write a file whose writer kept no rows, as earlier ones did."""
    torch.manual_seed(0)
    result = Quantizer().bits(4).only("*").apply(TiedModel(), progress=False)
    saved = attrs.evolve(result.checkpoint(), summary=result.report.summary())
    serializer_for(path).save(saved, path)
    assert LAYERS not in read_header(path)["summary"]  # type: ignore[operator]  # JSON
    return path


def test_of_a_file_without_rows_the_sizes_are_known(tmp_path: Path) -> None:
    found = describe_file(without_rows(tmp_path / "old.safetensors"))
    report = found.report
    names = {name for row in report.quantized for name in (row.name, *row.aliases)}
    assert names == {weight.name for weight in found.weights}
    assert sum(row.bytes for row in report.quantized) == sum(one.bytes for one in found.weights)
    assert all(row.float_bytes == 4 * row.parameters for row in report.quantized)
    (rest,) = report.kept
    assert rest.bytes == found.float_tensor_bytes
    assert all(row.sqnr_db is None for row in report.layers)
    page = report.to_html(tmp_path / "report.html").read_text("utf-8")
    assert page.count("a file whose writer kept none") == 2, "no errors and no histograms"


@pytest.mark.parametrize(
    "rows",
    [
        3,
        "text",
        [3],
        [{}],
        [{"name": 3}],
        [{"name": "a", "sqnr_db": "loud"}],
        [{"name": "a", "sqnr_db": 1e300}],
        [{"name": "a", "bytes": -1}],
        [{"name": "a", "bytes": 1 << 64}],
        [{"name": "a", "shape": [1.5]}],
        [{"name": "a", "histogram": {**SPREAD.to_dict(), "width": 0.0}}],
        [{"name": "a", "histogram": {**SPREAD.to_dict(), "counts": [-5]}}],
        [{"name": "a", "histogram": {**SPREAD.to_dict(), "covered": [1.0]}}],
        [{"name": "a", "histogram": {"width": 1.0}}],
    ],
    ids=str,
)
def test_rows_that_are_none_are_corrupt(tmp_path: Path, rows: Json) -> None:
    result = Quantizer().apply(nn.Sequential(nn.Linear(64, 64)), progress=False)
    summary = {**stored(result.report), LAYERS: rows}
    saved = attrs.evolve(result.checkpoint(), summary=summary)
    path = tmp_path / "strange.safetensors"
    serializer_for(path).save(saved, path)
    with pytest.raises(CorruptCheckpointError, match="does not fit"):
        describe_file(path)
