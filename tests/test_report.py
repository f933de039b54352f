"""Reports: the figures, the warnings, and the four ways to read them."""

import json
import math
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from itertools import permutations

import attrs
import pytest
import torch
from torch import nn

from mono_quant import LayerReport, PerGroup, Quantizer, Report
from mono_quant.configurable import Json
from mono_quant.evidence import grade
from mono_quant.plan.warnings import warnings_of, with_output
from mono_quant.text import format_bytes, format_db, table
from tests.helpers import TiedModel, noise

WEIGHT = LayerReport(
    "0.weight", "Linear", (64, 64), 4096, 16384, 2304, "4-bit", sqnr_db=25.0, output_sqnr_db=21.5
)
HEAD = LayerReport("1.weight", "Linear", (64, 64), 4096, 16384, 4096, "8-bit", sqnr_db=40.0)
KEPT = LayerReport("norm", "LayerNorm", (), 128, 512, 512, reason="no quantizer knows a LayerNorm")
REPORT = Report(
    (WEIGHT, KEPT, HEAD),
    buffer_bytes=88,
    output_sqnr_db=27.25,
    samples=6,
    notes=("a note | of one <line>",),
    warnings=("critical: the worst & the first", "0.weight: the rest"),
    head="1.weight",
)


def damaged(weight: float | None = 25.0, output: float | None = None) -> Report:
    """Return a report with this damage to a weight and to the output."""
    row = attrs.evolve(WEIGHT, sqnr_db=weight)
    return attrs.evolve(REPORT, layers=(row, KEPT, HEAD), output_sqnr_db=output)


# --- figures -----------------------------------------------------------------------------------


def test_sizes_count_weights_the_rest_and_buffers() -> None:
    assert REPORT.float_bytes == 16384 + 16384 + 512 + 88
    assert REPORT.bytes == 2304 + 4096 + 512 + 88
    assert REPORT.ratio == REPORT.float_bytes / REPORT.bytes
    assert REPORT.bits_per_weight == 8 * (2304 + 4096) / 8192
    assert WEIGHT.bits_per_weight == 4.5
    assert KEPT.bits_per_weight == 32


def test_the_mean_damage_leaves_out_what_is_exact_or_float() -> None:
    exact = attrs.evolve(WEIGHT, sqnr_db=math.inf)
    assert REPORT.mean_sqnr_db == (25 + 40) / 2
    assert attrs.evolve(REPORT, layers=(exact, KEPT, HEAD)).mean_sqnr_db == 40
    assert attrs.evolve(REPORT, layers=(exact, KEPT)).mean_sqnr_db is None
    assert attrs.evolve(REPORT, layers=(KEPT,)).mean_sqnr_db is None


def test_a_report_of_nothing_has_figures_all_the_same() -> None:
    empty = Report(())
    assert (empty.bytes, empty.float_bytes, empty.ratio, empty.bits_per_weight) == (0, 0, 1.0, 0.0)
    assert "0 B -> 0 B" in str(empty)
    json.loads(empty.to_json())


def test_quantized_and_kept_are_all_rows() -> None:
    assert REPORT.quantized == (WEIGHT, HEAD)
    assert REPORT.kept == (KEPT,)


@pytest.mark.parametrize(
    ("row", "fate"),
    [
        (WEIGHT, "4-bit"),
        (KEPT, "float: no quantizer knows a LayerNorm"),
        (attrs.evolve(WEIGHT, aliases=("a.weight", "b.weight")), "4-bit; also a.weight, b.weight"),
        (attrs.evolve(WEIGHT, note="one dead row"), "4-bit; one dead row"),
        (attrs.evolve(WEIGHT, reason="quantized before"), "4-bit; quantized before"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fate_is_the_scheme_or_the_reason_and_what_else_is_known(
    row: LayerReport, fate: str
) -> None:
    assert row.fate == fate


@pytest.mark.parametrize(
    ("decibels", "word"),
    [
        (math.nan, "critical"),
        (-math.inf, "critical"),
        (9.99, "critical"),
        (10.0, "warning"),
        (19.99, "warning"),
        (20.0, "fair"),
        (30.0, "fair"),
        (30.01, "good"),
        (math.inf, "good"),
    ],
)
def test_decibels_are_graded(decibels: float, word: str) -> None:
    assert grade(decibels) == word


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (1_234_567, "1.23 MB"),
        (5_000_000_000, "5.00 GB"),
        (5_000_000_000_000, "5000.00 GB"),
    ],
)
def test_sizes_are_shown_in_decimal_units(count: float, text: str) -> None:
    assert format_bytes(count) == text


def test_decibels_are_shown_with_one_decimal() -> None:
    assert format_db(12.345) == "12.3 dB"
    assert format_db(math.inf) == "exact"
    assert format_db(-math.inf) == "-inf dB"


def test_a_table_aligns_numbers_to_the_right() -> None:
    lines = table(("name", "n"), [("a", "1"), ("long", "100")], frozenset({"n"}))
    assert lines == ["name    n", "a       1", "long  100"]
    assert table(("name",), []) == ["name"]


# --- warnings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decibels", "warning"),
    [
        (math.nan, "critical: the output is not finite"),
        (-math.inf, "critical: the output is at -inf dB SQNR, below 10"),
        (9.9, "critical: the output is at 9.9 dB SQNR, below 10"),
        (10.0, "the output is at 10.0 dB SQNR, below 20"),
        (19.9, "the output is at 19.9 dB SQNR, below 20"),
    ],
)
def test_a_damaged_output_is_warned_of(decibels: float, warning: str) -> None:
    assert warnings_of(damaged(output=decibels))[0] == warning


@pytest.mark.parametrize("decibels", [20.0, 25.0, 60.0, math.inf, None])
def test_a_good_output_is_not_warned_of(decibels: float | None) -> None:
    assert not any("the output is" in warning for warning in warnings_of(damaged(output=decibels)))


@pytest.mark.parametrize(
    ("decibels", "warning"),
    [
        (3.0, "critical: 0.weight is at 3.0 dB SQNR, below 10"),
        (15.0, "0.weight is at 15.0 dB SQNR, below 20"),
        (math.nan, "critical: 0.weight is not finite"),
    ],
)
def test_a_damaged_weight_is_warned_of(decibels: float, warning: str) -> None:
    assert warning in warnings_of(damaged(weight=decibels))


def test_a_weight_from_20_decibels_on_is_not_warned_of() -> None:
    for decibels in (20.0, 30.0, math.inf):
        found = warnings_of(damaged(weight=decibels))
        assert not any("0.weight is at" in warning for warning in found)


def test_the_worst_weights_are_named_and_the_others_counted() -> None:
    rows = tuple(
        attrs.evolve(WEIGHT, name=f"{place}.weight", sqnr_db=19.0 - place) for place in range(12)
    )
    found = warnings_of(attrs.evolve(REPORT, layers=rows))
    assert found[:2] == (
        "critical: 11.weight is at 8.0 dB SQNR, below 10",
        "critical: 10.weight is at 9.0 dB SQNR, below 10",
    )
    assert "9.weight is at 10.0 dB SQNR, below 20" in found
    assert "9 more weights are below 20 dB" in found
    assert not any("8.weight is at" in warning for warning in found)


def test_nan_is_among_the_worst_of_all_weights_wherever_it_stands() -> None:
    decibels = [15.0, math.nan, 5.0, 8.0, 9.0]
    for order in permutations(range(5)):
        rows = tuple(
            attrs.evolve(WEIGHT, name=f"{place}.weight", sqnr_db=decibels[place]) for place in order
        )
        found = warnings_of(attrs.evolve(REPORT, layers=rows))
        assert "critical: 1.weight is not finite" in found


def test_critical_warnings_come_first() -> None:
    found = warnings_of(damaged(weight=3.0, output=15.0))
    critical = [warning.startswith("critical") for warning in found]
    assert critical == sorted(critical, reverse=True)
    assert any(critical)
    assert not all(critical)


def large() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64))


def reported(quantizer: Quantizer, model: nn.Module) -> Report:
    return quantizer.apply(model, progress=False).report


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_a_head_of_few_bits_is_named_with_both_ways_out(bits: int) -> None:
    report = reported(Quantizer().bits(bits), large())
    assert (
        f"the output head '2' is at {bits + (16 + bits) / 64:.2f} bits per weight; "
        "override('2', bits=8) or skip('2') is the user's choice"
    ) in report.warnings


@pytest.mark.parametrize(
    "quantizer",
    [
        Quantizer(),
        Quantizer().bits(4).skip("2"),
        Quantizer().bits(4).override("2", bits=8),
        Quantizer().bits(16),
    ],
    ids=repr,
)
def test_a_head_of_many_bits_is_not_warned_of(quantizer: Quantizer) -> None:
    assert "output head" not in " ".join(reported(quantizer, large()).warnings)


def test_a_tied_head_is_named_by_its_own_name() -> None:
    found = " ".join(reported(Quantizer().bits(4).only("*"), TiedModel()).warnings)
    assert "the output head 'head' is at 4.31 bits per weight" in found
    assert "'middle'" not in found


def test_a_model_that_is_quantized_to_the_last_layer_is_warned_of() -> None:
    warning = "every layer is quantized; the first and the last are usually the most sensitive"
    assert warning in reported(Quantizer(), large()).warnings
    assert warning not in reported(Quantizer().skip("0"), large()).warnings
    assert warning not in reported(Quantizer().skip("*"), large()).warnings


@pytest.mark.parametrize(
    ("decibels", "warned"), [(None, True), (math.nan, True), (29.9, True), (30.0, False)]
)
def test_every_layer_quantized_is_no_warning_where_the_output_is_good(
    decibels: float | None, warned: bool
) -> None:
    report = attrs.evolve(REPORT, layers=(WEIGHT, HEAD), output_sqnr_db=decibels)
    assert any("every layer" in line for line in warnings_of(report)) == warned


def test_another_output_changes_what_is_said_of_every_layer() -> None:
    rough = attrs.evolve(REPORT, layers=(WEIGHT, HEAD), output_sqnr_db=25.0, warnings=())
    rough = attrs.evolve(rough, warnings=warnings_of(rough))
    fine = with_output(rough, 50.0)
    assert [line for line in rough.warnings if line not in fine.warnings] == [
        "every layer is quantized; the first and the last are usually the most sensitive"
    ]
    assert with_output(fine, 25.0).warnings == rough.warnings


class Tensors(nn.Module):
    """A layer that no quantizer knows."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))


def test_an_unknown_layer_in_float_is_not_every_layer_quantized() -> None:
    model = nn.ModuleList([Tensors(64, 8, 256), nn.Linear(256, 16), Tensors(2, 2, 2)])
    for quantizer in (Quantizer(), Quantizer().bits(4)):
        found = reported(quantizer, model).warnings
        assert not any("every layer" in line for line in found)
        assert any(line.startswith("0 stays float with") for line in found)


def test_a_small_unknown_layer_in_float_is_not_every_layer_quantized_either() -> None:
    found = reported(Quantizer(), nn.ModuleList([Tensors(2, 2, 2), nn.Linear(512, 512)])).warnings
    assert not any("every layer" in line or "stays float" in line for line in found)


def test_dead_rows_are_counted() -> None:
    model = large()
    with torch.no_grad():
        model.get_parameter("0.weight")[[3, 5]] = 0
    report = reported(Quantizer(), model)
    assert "0.weight: 2 of 64 rows are all zero" in report.warnings
    assert report.layers[0].note == "2 of 64 rows are all zero"


def test_saturated_ranges_are_measured() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        model.get_parameter("0.weight").sign_()
    report = reported(Quantizer().asymmetric(), model)
    assert any("100% of its codes lie on the ends of the grid" in line for line in report.warnings)


def test_what_stays_float_is_named_with_its_share() -> None:
    report = reported(Quantizer().bits(4).skip("2"), large())
    share = 64 * 64 * 4 / report.bytes
    assert f"2.weight stays float with {share:.0%} of the bytes (16.38 kB): skipped" in (
        report.warnings
    )


def test_what_stays_float_and_is_small_is_not_named() -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.LayerNorm(512))
    assert not any("stays float" in line for line in reported(Quantizer(), model).warnings)


def test_no_more_than_the_three_largest_that_stay_float_are_named() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64 + place) for place in range(6)))
    found = [line for line in reported(Quantizer().skip("*"), model).warnings if "stays" in line]
    assert [line.partition(".")[0] for line in found] == ["5", "4", "3"]


# --- renderings --------------------------------------------------------------------------------

CELLS = [
    ["0.weight", "Linear", "64x64", "16.38 kB", "2.30 kB", "4.50", "25.0 dB", "21.5 dB", "4-bit"],
    ["norm", "LayerNorm", "", "512 B", "512 B", "32.00", "", "", KEPT.fate],
    ["1.weight", "Linear", "64x64", "16.38 kB", "4.10 kB", "8.00", "40.0 dB", "", "8-bit"],
]
COLUMNS = ["name", "layer", "shape", "before", "after", "bits", "SQNR", "output", "fate"]
LINES = [
    "33.37 kB -> 7.00 kB (4.77 times smaller)",
    "warning: critical: the worst & the first",
    "warning: 0.weight: the rest",
    "2 weights quantized at 6.250 bits per weight, mean weight SQNR 32.5 dB",
    "output SQNR 27.2 dB on 6 samples (fair)",
    "a note | of one <line>",
]


def parsed(text: str) -> Mapping[str, Json]:
    """Return JSON that is strict: no NaN, no infinity."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    found: dict[str, Json] = json.loads(text, parse_constant=refuse)
    return found


def test_json_holds_every_figure() -> None:
    found = parsed(REPORT.to_json())
    assert found["float_bytes"] == REPORT.float_bytes
    assert found["bytes"] == REPORT.bytes
    assert found["ratio"] == REPORT.ratio
    assert found["bits_per_weight"] == 6.25
    assert found["mean_weight_sqnr_db"] == 32.5
    assert found["output_sqnr_db"] == 27.25
    assert found["samples"] == 6
    assert found["quantized_weights"] == 2
    assert found["notes"] == list(REPORT.notes)
    assert found["warnings"] == list(REPORT.warnings)
    rows = found["layers"]
    assert isinstance(rows, list)
    assert len(rows) == 3
    for row, layer in zip(rows, REPORT.layers, strict=True):
        assert row == {
            **attrs.asdict(layer),
            "shape": list(layer.shape),
            "aliases": [],
            "inputs": [],
            "ranges": [],
            "scale_block": [],
            "bits_per_weight": layer.bits_per_weight,
        }
    assert found == parsed(json.dumps(REPORT.to_dict()))
    assert REPORT.summary() == {
        key: value for key, value in found.items() if key not in ("layers", "flow", "speed")
    }


@pytest.mark.parametrize(
    ("decibels", "written"),
    [(math.inf, "inf"), (-math.inf, "-inf"), (math.nan, "nan"), (None, None)],
)
def test_json_writes_what_is_not_finite_as_text(
    decibels: float | None, written: str | None
) -> None:
    found = parsed(damaged(weight=decibels, output=decibels).to_json())
    assert found["output_sqnr_db"] == written
    rows = found["layers"]
    assert isinstance(rows, list)
    first = rows[0]
    assert isinstance(first, dict)
    assert first["sqnr_db"] == written


def test_markdown_is_a_list_and_one_table_with_every_figure() -> None:
    lines = REPORT.to_markdown().splitlines()
    assert lines[: len(LINES)] == [f"**{LINES[0]}**", *(f"- {line}" for line in LINES[1:])]
    head, rule, *rows = lines[len(LINES) + 1 :]
    assert lines[len(LINES)] == ""
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in (head, *rows)]
    assert cells == [COLUMNS, *CELLS]
    assert rule == "|" + "---|" * len(COLUMNS)


ESTIMATED = attrs.evolve(
    REPORT,
    layers=(
        attrs.evolve(WEIGHT, output_sqnr_db=None, estimated_db=19.04),
        KEPT,
        attrs.evolve(HEAD, estimated_db=math.inf),
    ),
    output_sqnr_db=None,
)
MEANING = (
    "~ estimated, not measured: of a product with the quantized weight alone, for inputs drawn so "
    "that all of its columns count alike, or, where that is far worse, so that rows meet the "
    "smaller half of their values alone; of an embedding, of its rows"
)


def test_without_measured_layers_every_rendering_shows_estimates_and_what_marks_them() -> None:
    lines = str(ESTIMATED).splitlines()
    assert lines[-1] == MEANING
    assert [line.split()[-2:] for line in lines[-4:-1:2]] == [["dB", "4-bit"], ["~exact", "8-bit"]]
    assert "~19.0 dB  4-bit" in lines[-4]
    markdown = ESTIMATED.to_markdown().splitlines()
    assert markdown[-2:] == ["", MEANING]
    assert "| ~19.0 dB | 4-bit |" in markdown[-5]
    page = ESTIMATED._repr_html_()
    assert page.endswith(f"</table><p>{MEANING}</p>")
    assert "<td>~19.0 dB</td><td>4-bit</td>" in page
    rows = parsed(ESTIMATED.to_json())["layers"]
    assert isinstance(rows, list)
    first = rows[0]
    assert isinstance(first, dict)
    assert (first["estimated_db"], first["output_sqnr_db"]) == (19.04, None)


def test_the_estimate_that_is_shown_is_the_one_to_go_by() -> None:
    unmeasured = attrs.evolve(WEIGHT, output_sqnr_db=None)
    sound = attrs.evolve(unmeasured, sqnr_db=42.0, estimated_db=39.0, faint_db=26.9)
    doubtful = attrs.evolve(sound, faint_db=14.8)
    measured = attrs.evolve(doubtful, output_sqnr_db=35.0)
    assert [row.drawn_db for row in (sound, doubtful)] == [39.0, 14.8]
    assert [row.is_doubtful for row in (sound, doubtful)] == [False, True]
    assert "~14.8 dB" in str(attrs.evolve(ESTIMATED, layers=(doubtful,)))
    assert "~" not in str(attrs.evolve(ESTIMATED, layers=(measured,)))
    # at few bits all values are coarse: only what is far worse than that counts
    coarse = attrs.evolve(sound, sqnr_db=20.0, estimated_db=19.0)
    fates = [attrs.evolve(coarse, faint_db=db).is_doubtful for db in (7.0, 3.0, None)]
    assert fates == [False, True, False]


def test_estimates_are_not_shown_among_measured_figures() -> None:
    rows = (WEIGHT, KEPT, attrs.evolve(HEAD, estimated_db=12.0))
    report = attrs.evolve(REPORT, layers=rows)
    for text in (str(report), report.to_markdown(), report._repr_html_()):
        assert "~" not in text


def test_estimates_count_in_no_figure_of_the_model() -> None:
    plain = [attrs.evolve(row, estimated_db=None) for row in ESTIMATED.layers]
    without = attrs.evolve(ESTIMATED, layers=tuple(plain))
    assert ESTIMATED.summary() == without.summary()
    assert warnings_of(ESTIMATED) == warnings_of(without)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_every_quantized_weight_has_an_estimate_without_data(bits: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3, groups=32), nn.Flatten(), nn.Linear(32, 64)
    )
    report = reported(Quantizer().bits(bits).only("*"), model)
    assert len(report.quantized) == 3
    for row in report.quantized:
        assert row.estimated_db is not None
        assert row.sqnr_db is not None
        assert row.estimated_db == pytest.approx(row.sqnr_db, abs=3)
    depthwise = report.quantized[1]
    assert depthwise.estimated_db == depthwise.sqnr_db  # one row a matrix: inputs all alike


def test_columns_in_which_no_row_has_anything_are_left_out_of_every_rendering() -> None:
    rows = tuple(attrs.evolve(row, sqnr_db=None, output_sqnr_db=None) for row in (WEIGHT, HEAD))
    report = attrs.evolve(REPORT, layers=rows)
    left = [column for column in COLUMNS if column not in ("SQNR", "output")]
    for text in (str(report), report.forecast(1, 1)):
        assert left in [line.split() for line in text.splitlines()]
    assert f"| {' | '.join(left)} |" in report.to_markdown().splitlines()
    reader = Tables()
    reader.feed(report._repr_html_())
    assert reader.texts["th"] == left
    kept = attrs.evolve(report, layers=(KEPT,)).forecast(1, 1).splitlines()[-2].split()
    assert kept == [column for column in left if column != "shape"]


def test_a_plan_has_no_columns_of_what_was_not_measured() -> None:
    (titles,) = [
        line.split()
        for line in Quantizer().plan(large()).explain().splitlines()
        if line.startswith("name ")
    ]
    assert titles == [column for column in COLUMNS if column not in ("SQNR", "output")]


def test_markdown_keeps_a_bar_in_a_cell() -> None:
    row = attrs.evolve(WEIGHT, note="a|b")
    line = attrs.evolve(REPORT, layers=(row,)).to_markdown().splitlines()[-1]
    assert line.endswith("| 4-bit; a\\|b |")


class Tables(HTMLParser):
    """Reads tags, which must be closed in order, and the text in each."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        if tag in {"td", "th", "li", "b"}:
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts[self.open[-1]][-1] += data


def test_html_is_well_formed_and_holds_every_figure() -> None:
    reader = Tables()
    reader.feed(REPORT._repr_html_())
    assert reader.open == []
    assert reader.texts["b"] == [LINES[0]]
    assert reader.texts["li"] == LINES[1:]
    assert reader.texts["th"] == COLUMNS
    assert reader.texts["td"] == [cell for row in CELLS for cell in row]


def test_html_escapes_what_it_shows() -> None:
    row = attrs.evolve(WEIGHT, name="<script>", note="a & b")
    text = attrs.evolve(REPORT, layers=(row,))._repr_html_()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "a &amp; b" in text


def test_text_for_a_terminal_holds_every_figure() -> None:
    lines = str(REPORT).splitlines()
    assert lines[: len(LINES)] == LINES
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines[len(LINES) + 1 :]]
    assert rows == [COLUMNS, *([cell for cell in row if cell] for row in CELLS)]


def test_without_data_a_report_says_that_the_output_was_not_measured() -> None:
    lines = str(damaged()).splitlines()
    assert "output SQNR not measured: no data; give some with fit(data)" in lines


def test_all_renderings_of_a_real_report_agree() -> None:
    model = large()
    report = reported(Quantizer().bits(4).granularity(PerGroup(32)).fit(noise(8, 64)), model)
    figures = parsed(report.to_json())
    rows = figures["layers"]
    assert isinstance(rows, list)
    names = [row["name"] for row in rows if isinstance(row, dict)]
    assert names == [row.name for row in report.layers]
    for text in (str(report), report.to_markdown(), report._repr_html_()):
        for row in report.layers:
            assert row.name in text
            assert format_bytes(row.bytes) in text
        assert f"({report.ratio:.2f} times smaller)" in text
        assert f"{report.bits_per_weight:.3f} bits per weight" in text
