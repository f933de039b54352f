"""The page: its structure, its figures, and that nothing leaves it or comes in."""

import base64
import hashlib
import html
import math
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import attrs
import pytest
import torch
from torch import nn

from mono_quant import Distribution, InputReport, LayerReport, Quantizer, Report
from mono_quant.text import format_bytes, format_db
from tests.helpers import noise
from tests.pictures.reading import Element, read

HOSTILE = (
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "<!--",
    "a'b\"c&d<e>f",
    "https://example.org/x.png",
    "\u202egpj.exe",
    "nul\x00bell\x07",
    "half\ud800",
    "x" * 500,
)


def network(layers: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(layers))).eval()


def page_of(report: Report, folder: Path) -> Element:
    path = report.to_html(folder / "report.html", title="A title & more")
    assert path == folder / "report.html"
    return read(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def measured() -> Report:
    quantizer = Quantizer().activations("static").fit(noise(16, 64))
    return quantizer.apply(network(5), progress=False).report


def cells(page: Element) -> list[list[str]]:
    """Return the text of the table, row by row."""
    (table,) = page.all("table")
    return [
        [cell.text for cell in row if cell.name in ("td", "th")]
        for row in table.all("tbody")[0].all("tr")
    ]


def test_a_page_says_its_language_title_and_encoding(measured: Report, tmp_path: Path) -> None:
    text = measured.to_html(tmp_path / "x.html", title="A title & more").read_text("utf-8")
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
    page = read(text)
    (title,), (heading,) = page.all("title")[:1], page.all("h1")
    assert title.text == heading.text == "A title & more"
    assert {"charset": "utf-8"} in [meta.attributes for meta in page.all("meta")]


def test_every_figure_at_the_top_is_the_reports(measured: Report, tmp_path: Path) -> None:
    page = page_of(measured, tmp_path)
    labels = [one.text for one in page.all("dt")]
    values = dict(zip(labels, [one.all("strong")[0].text for one in page.all("dd")], strict=True))
    assert measured.output_sqnr_db is not None
    assert values == {
        "size": format_bytes(measured.bytes),
        "bits per weight": f"{measured.bits_per_weight:.3f}",
        "mean weight SQNR": f"{measured.mean_sqnr_db:.1f} dB",
        "output SQNR": format_db(measured.output_sqnr_db),
    }


def test_the_table_holds_every_row_and_its_figures(measured: Report, tmp_path: Path) -> None:
    page = page_of(measured, tmp_path)
    (table,) = page.all("table")
    titles = [head.text for head in table.all("thead")[0].all("th")]
    known = "#,name,layer,shape,before,after,bits,SQNR,output,in model,fate"
    assert titles == known.split(",")
    rows = table.all("tbody")[0].all("tr")
    assert len(rows) == len(measured.layers) == 6
    for row, layer in zip(rows, measured.layers, strict=True):
        (head,) = row.all("th")
        assert head.text == layer.name
        found = dict(zip(titles, [one for one in row if one.name in ("td", "th")], strict=True))
        figures = {
            "before": layer.float_bytes,
            "after": layer.bytes,
            "bits": layer.bits_per_weight,
            "SQNR": layer.sqnr_db,
            "output": layer.output_sqnr_db,
            "in model": layer.accumulated_db,
        }
        for title, figure in figures.items():
            said = found[title].attributes.get("data-value")
            assert (float(said) if said is not None else None) == figure
        assert found["fate"].text == layer.fate
        shown = layer.accumulated_db
        assert found["in model"].text == ("" if shown is None else format_db(shown))


def test_headings_can_be_sorted_by_keyboard_and_say_so(measured: Report, tmp_path: Path) -> None:
    (table,) = page_of(measured, tmp_path).all("table")
    assert table.all("caption")
    heads = table.all("thead")[0].all("th")
    for head in heads:
        assert head.attributes["aria-sort"] == "none"
        assert head.attributes["scope"] == "col"
        (button,) = head.all("button")
        assert button.attributes["type"] == "button"
    numeric = {head.text for head in heads if head.attributes["data-kind"] == "number"}
    assert numeric == {"#", "before", "after", "bits", "SQNR", "output", "in model"}
    for row in table.all("tbody")[0].all("tr"):
        assert row.all("th")[0].attributes["scope"] == "row"


def test_sections_and_pictures_have_names(measured: Report, tmp_path: Path) -> None:
    page = page_of(measured, tmp_path)
    ids = [one.attributes["id"] for one in page if "id" in one.attributes]
    assert len(ids) == len(set(ids))
    for section in page.all("section"):
        assert section.attributes["aria-labelledby"] in ids
    for picture in page.all("svg"):
        hidden = picture.attributes.get("aria-hidden") == "true"
        role = "group" if picture.all("a") else "img"
        assert hidden or (picture.attributes["role"] == role and picture.all("title")[0].text)
    levels = [int(one.name[1]) for one in page if re.fullmatch("h[1-6]", one.name)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_warnings_come_first_the_worst_before_the_others(tmp_path: Path) -> None:
    report = Quantizer().bits(2).fit(noise(16, 64)).apply(network(3), progress=False).report
    page = page_of(report, tmp_path)
    assert page.all("section")[0].styles == ["warnings"]
    items = page.section("warnings").all("li")
    grades = [item.all("strong")[0].text for item in items]
    assert grades == sorted(grades)  # critical before warning
    assert "critical" in grades
    said = [item.text.partition(" ")[2] for item in items]
    assert said == [warning.removeprefix("critical: ") for warning in report.warnings]
    advice = [code.text for item in items for code in item.all("code")]
    assert "override('2', bits=8)" in advice
    assert "skip('2')" in advice


def test_without_warnings_the_page_says_so(measured: Report, tmp_path: Path) -> None:
    page = page_of(attrs.evolve(measured, warnings=()), tmp_path)
    assert "Nothing to warn of" in page.section("warnings").text


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path)]


def heights(section: Element, style: str) -> list[float]:
    """Return the heights of the marks of a line in a chart."""
    (chart,) = section.all("svg", "chart")
    (path,) = [one for one in chart.all("path", "dots") if style in one.styles]
    return [y for _, y in points(path.attributes["d"] or "")]


def scale(section: Element) -> Mapping[float, float]:
    """Return the heights of the decibels that the chart names."""
    (chart,) = section.all("svg", "chart")
    lines = [float(line.attributes["y1"] or 0) for line in chart.all("line", "grid")]
    labels = [
        float(text.text.removesuffix(" dB"))
        for text in chart.all("text")
        if text.attributes.get("text-anchor") == "end" and text.text != "output"
    ]
    return dict(zip(labels, lines, strict=True))


def expected(section: Element, decibels: float) -> float:
    known = scale(section)
    low, high = min(known), max(known)
    share = (decibels - low) / (high - low)
    return known[low] + share * (known[high] - known[low])


def test_marks_stand_at_the_decibels_of_the_report(measured: Report, tmp_path: Path) -> None:
    page = page_of(measured, tmp_path)
    rows = measured.quantized
    section = page.section("depth")
    drawn = {"weights": [row.sqnr_db for row in rows], "layers": [r.output_sqnr_db for r in rows]}
    for style, figures in drawn.items():
        for y, figure in zip(heights(section, style), figures, strict=True):
            assert figure is not None
            assert y == pytest.approx(expected(section, figure), abs=0.02)
    section = page.section("accumulated")
    inside = [*(row.accumulated_db for row in rows), measured.output_sqnr_db]
    for y, figure in zip(heights(section, "inside"), inside, strict=True):
        assert figure is not None
        assert y == pytest.approx(expected(section, figure), abs=0.02)


def test_each_place_tells_its_figures_and_leads_to_its_row(
    measured: Report, tmp_path: Path
) -> None:
    page = page_of(measured, tmp_path)
    links = page.section("depth").all("a")
    assert len(links) == 5
    rows = {row.attributes["id"]: row.all("th")[0].text for row in page.all("tr") if row.attributes}
    for link, layer in zip(links, measured.quantized, strict=True):
        (target,) = [link.attributes["href"] or ""]
        assert rows[target.removeprefix("#")] == layer.name
        assert layer.output_sqnr_db is not None
        assert layer.sqnr_db is not None
        told = link.all("title")[0].text
        assert told.startswith(f"{layer.name}: weight {format_db(layer.sqnr_db)}, ")
        assert f"layer {format_db(layer.output_sqnr_db)}" in told


def test_layers_stand_in_the_order_of_their_calls(measured: Report, tmp_path: Path) -> None:
    rows = list(measured.layers)
    rows[0], rows[2] = (attrs.evolve(row, place=4 - (row.place or 0)) for row in (rows[0], rows[2]))
    rows[4] = attrs.evolve(rows[4], place=0)
    page = page_of(attrs.evolve(measured, layers=tuple(rows)), tmp_path)
    told = [link.all("title")[0].text for link in page.section("depth").all("a")]
    assert [name.partition(".")[0] for name in told] == ["4", "1", "2", "3", "0"]


def test_what_is_exact_or_not_finite_is_a_cross_and_not_a_dot(
    measured: Report, tmp_path: Path
) -> None:
    strange = (math.inf, math.nan, -math.inf)
    rows = [
        attrs.evolve(row, sqnr_db=value)
        for row, value in zip(measured.layers, strange, strict=False)
    ]
    page = page_of(attrs.evolve(measured, layers=(*rows, *measured.layers[3:])), tmp_path)
    section = page.section("depth")
    assert len(heights(section, "weights")) == 2
    (chart,) = section.all("svg", "chart")
    (crosses,) = [one for one in chart.all("path", "cross") if "weights" in one.styles]
    known = scale(section)
    ends = [y + 3 for _, y in points(crosses.attributes["d"] or "")]
    assert ends == pytest.approx([known[max(known)], known[min(known)], known[min(known)]])


def test_bars_of_bytes_are_to_scale(measured: Report, tmp_path: Path) -> None:
    (picture,) = page_of(measured, tmp_path).all("svg", "sizes")
    widths: dict[str, float] = {}
    for bar in picture.all("rect"):
        row = bar.attributes["y"] or ""
        widths[row] = widths.get(row, 0.0) + float(bar.attributes["width"] or 0)
    before, after = widths.values()
    assert before / after == pytest.approx(measured.ratio, rel=0.01)


@pytest.mark.parametrize("layers", [5, 500])
def test_histograms_are_those_of_the_worst_layers(layers: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows = tuple(
        LayerReport(
            f"{place}.weight",
            "Linear",
            (8, 8),
            64,
            256,
            64,
            scheme="8-bit",
            sqnr_db=20 + place % 17,
            output_sqnr_db=15 + place * 0.01,
            place=place,
            histogram=SPREAD if place < 6 else None,
        )
        for place in range(layers)
    )
    page = page_of(Report(rows), tmp_path)
    names = [one.text for one in page.section("histograms").all("h3")]
    assert names == [f"{place}.weight" for place in range(min(6, layers))]
    assert len(cells(page)) == layers
    assert len(page.section("depth").all("a")) == layers
    assert len(page.all("input")) == (layers == 500)


SPREAD = Distribution(-1.0, 0.5, (1, 10, 100, 1), 9, -0.9, 0.8, (-0.5, 0.5), (-0.25, 0.25))


def test_bars_are_logarithmic_and_what_is_cut_off_stands_out(tmp_path: Path) -> None:
    row = LayerReport("a.weight", "Linear", (8, 8), 64, 256, 64, scheme="8-bit", histogram=SPREAD)
    (picture,) = page_of(Report((row,)), tmp_path).section("histograms").all("svg")
    bars = {
        tuple(path.styles): [
            float(found) for found in re.findall(r"v-([\d.]+)", path.attributes["d"] or "")
        ]
        for path in picture.all("path")
    }
    full = bars[("bar",)][1]
    inside = [math.log1p(count) / math.log1p(100) for count in (10, 100)]
    beyond = [math.log1p(1) / math.log1p(100)] * 2
    assert [one / full for one in bars[("bar",)]] == pytest.approx(inside, abs=1e-3)
    assert [one / full for one in bars[("bar", "cut")]] == pytest.approx(beyond, abs=1e-3)
    bands = {rect.styles[0]: float(rect.attributes["width"] or 0) for rect in picture.all("rect")}
    assert bands["covered"] / bands["typical"] == pytest.approx(2, rel=0.01)
    (said,) = page_of(Report((row,)), tmp_path).section("histograms").all("figcaption")
    assert "values -0.9 to 0.8, grid -0.5 to 0.5" in said.text
    assert f"{9 / 121:.1%} exactly zero" in said.text


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    plain = LayerReport("a.weight", "Linear", (8, 8), 64, 256, 64, scheme="8-bit")
    page = page_of(Report((plain,)), tmp_path)
    assert "No error of any weight is known" in page.section("depth").text
    assert "was not measured" in page.section("accumulated").text
    assert "There are no histograms" in page.section("histograms").text
    assert "no data was given" in page.all("dl")[0].text


def test_estimates_are_marked_as_such(tmp_path: Path) -> None:
    report = Quantizer().bits(4).apply(network(3), progress=False).report
    page = page_of(report, tmp_path)
    assert "(estimated)" in page.section("depth").text
    assert "estimated, not measured" in page.section("depth").text
    assert all("~" in link.all("title")[0].text for link in page.section("depth").all("a"))


@pytest.mark.parametrize("report", [Report(()), Report((), flow=("a line",))])
def test_a_report_of_nothing_is_a_page_all_the_same(report: Report, tmp_path: Path) -> None:
    page = page_of(report, tmp_path)
    assert cells(page) == []
    assert ("a line" in page.all("body")[0].text) == bool(report.flow)


def test_a_graph_says_what_layers_take_and_give(measured: Report, tmp_path: Path) -> None:
    page = page_of(attrs.evolve(measured, flow=("conv: codes <to> codes",)), tmp_path)
    assert page.all("pre")[0].text == "conv: codes <to> codes"


# --- strangers' names --------------------------------------------------------------------------


def named(name: str) -> Report:
    """Return a report in which every text is this one."""
    spread = InputReport(name, 0.0, 1.0, histogram=SPREAD)
    row = LayerReport(name, name, (8, 8), 64, 256, 64, name, name, sqnr_db=20.0, note=name)
    row = attrs.evolve(row, accumulated_db=10.0, aliases=(name,), histogram=SPREAD)
    row = attrs.evolve(row, inputs=(spread,))
    return Report((row,), warnings=(name,), notes=(name,), flow=(name,))


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_names_from_strangers_are_text_and_nothing_else(name: str, tmp_path: Path) -> None:
    page = page_of(named(name), tmp_path)
    assert shape(page) == shape(page_of(named("a"), tmp_path))
    shown = page.all("tbody")[0].all("th")[0].text
    if name.isascii() and name.isprintable():
        assert shown == name
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e\ud800]", shown)


def shape(element: Element) -> list[tuple[str, list[str]]]:
    """Return the elements and the names of their attributes.

    Places where a name may be broken do not count, nor calls that are shown as code.
    """
    plain = (one for one in element if one.name not in ("wbr", "code"))
    return [(one.name, sorted(one.attributes)) for one in plain]


def test_titles_and_advice_of_strangers_are_text_too(tmp_path: Path) -> None:
    title = "</title><script>alert(1)</script>"
    warning = "override('</code><script>alert(1)</script>', bits=8)"
    page = read(
        Report((), warnings=(warning,)).to_html(tmp_path / "x.html", title=title).read_text("utf-8")
    )
    assert len(page.all("script")) == 1
    assert page.all("title")[0].text == title
    assert warning in page.section("warnings").text


# --- closed to the outside ---------------------------------------------------------------------


def test_nothing_on_the_page_points_outside(measured: Report, tmp_path: Path) -> None:
    page = page_of(measured, tmp_path)
    loads = {"src", "srcset", "href", "action", "data", "poster", "xlink:href", "formaction"}
    for element in page:
        assert element.name not in {"link", "img", "iframe", "object", "embed", "base", "form"}
        assert not [name for name in element.attributes if name.startswith("on")]
        assert "style" not in element.attributes
        for name in loads & set(element.attributes):
            assert (element.attributes[name] or "").startswith("#")
    style, script = page.all("style")[0].text, page.all("script")[0].text
    assert "url(" not in style
    assert "@import" not in style
    for word in ("fetch", "XMLHttpRequest", "import(", "WebSocket", "innerHTML", "eval", "http"):
        assert word not in script


def test_the_policy_allows_this_style_and_script_and_nothing_else(
    measured: Report, tmp_path: Path
) -> None:
    page = page_of(measured, tmp_path)
    (policy,) = [
        meta.attributes["content"] or ""
        for meta in page.all("meta")
        if meta.attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for kind in ("style", "script"):
        text = page.all(kind)[0].text
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def luminance(color: str) -> float:
    """Return the relative luminance of WCAG 2.2, https://www.w3.org/TR/WCAG22/."""
    channels = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (
        one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in channels
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_and_marks_stand_out_in_light_and_dark(measured: Report, tmp_path: Path) -> None:
    style = page_of(measured, tmp_path).all("style")[0].text
    palettes = [
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{([^}]*)\}", style)
    ]
    assert len(palettes) == 2
    assert "@media (prefers-color-scheme: dark)" in style
    for palette in palettes:
        for ground in ("page", "panel"):
            for text in ("text", "soft", "good", "warning", "critical"):
                assert contrast(palette[text], palette[ground]) >= 4.5, (text, ground)
            for mark in ("weights", "layers", "inside", "bar"):
                assert contrast(palette[mark], palette[ground]) >= 3, (mark, ground)
        for text in ("text", "soft"):
            assert contrast(palette[text], palette["typical"]) >= 3
        for band in ("covered", "typical"):
            assert contrast(palette["bar"], palette[band]) >= 3
    assert luminance(palettes[0]["page"]) > 0.9 > 0.1 > luminance(palettes[1]["page"])


def test_a_missing_folder_is_the_error_that_python_has(measured: Report, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        measured.to_html(tmp_path / "nowhere" / "report.html")


# --- notebooks ---------------------------------------------------------------------------------


def test_a_notebook_shows_a_small_picture_and_folds_long_tables(measured: Report) -> None:
    page = read(measured._repr_html_())
    (picture,) = page.all("svg")
    assert picture.attributes["aria-label"] == page.all("figcaption")[0].text
    figures = [row.output_sqnr_db for row in measured.quantized]
    low, high = (f"{ends(one for one in figures if one is not None):.1f}" for ends in (min, max))
    assert f"{low} to {high} dB" in page.all("figcaption")[0].text
    assert page.all("details") == []
    many = attrs.evolve(measured, layers=measured.layers * 3)
    (folded,) = read(many._repr_html_()).all("details")
    assert len(folded.all("tbody")[0].all("tr")) == 18
    assert "18 rows" in folded.all("summary")[0].text


@pytest.mark.parametrize("name", HOSTILE[:4])
def test_a_notebook_escapes_names_too(name: str, measured: Report) -> None:
    row = attrs.evolve(measured.layers[0], name=name)
    text = attrs.evolve(measured, layers=(row, *measured.layers[1:]))._repr_html_()
    assert html.escape(name) in text
    assert read(text).all("script") == read(text).all("img") == []
