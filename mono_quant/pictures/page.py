"""A report as one page that needs nothing beside itself."""

import base64
import hashlib
import re
from collections.abc import Sequence
from importlib import resources

import attrs

from mono_quant.columns import ESTIMATED
from mono_quant.evidence import Distribution, LayerReport
from mono_quant.pictures.chart import Line, chart, legend
from mono_quant.pictures.depth import Depth
from mono_quant.pictures.histogram import histogram, told
from mono_quant.pictures.markup import Child, Markup, joined, tag
from mono_quant.pictures.rows import rows_table
from mono_quant.pictures.sizes import parts_of, sizes, sizes_legend
from mono_quant.version import __version__

_CALL = re.compile(
    r"\b[a-z_]+\((?:[^()\n]|\([^()\n]*\))*\)"
    r"|--(?:override|skip|on-damage|activations|calibration) (?:'[^'\n]*'|[^\s;,]+)"
    r"|--[a-z][a-z-]+"
)
"""What a warning advises: a call, with brackets in its arguments at most once, or an option."""

_MANY = 12
"""Rows from which on a filter is worth its place."""


@attrs.frozen
class KeyFigure:
    """A figure of the whole model.

    Attributes:
        label: what it is.
        value: as text.
        note: what else there is to say of it.
        grade: good, fair, warning or critical; empty for figures that are not graded.
    """

    label: str
    value: str
    note: str = ""
    grade: str = ""


@attrs.frozen
class Page:
    """What a page shows.

    Attributes:
        title: above it.
        rows: of the report, in the model's order.
        float_bytes: of the model before.
        bytes: of the model after.
        figures: of the whole model.
        warnings: what ought to be looked at, the worst first.
        facts: what else was measured, done or decided.
        output_db: SQNR of the model's output, in dB; None where it was not measured.
        estimated: whether estimates are shown of what layers return.
        flow: of a graph, what each layer takes and gives.
    """

    title: str
    rows: Sequence[LayerReport]
    float_bytes: int
    bytes: int
    figures: Sequence[KeyFigure] = ()
    warnings: Sequence[str] = ()
    facts: Sequence[str] = ()
    output_db: float | None = None
    estimated: bool = False
    flow: Sequence[str] = ()

    def to_html(self) -> str:
        """Return the page, with its style and script inside, and closed to everything outside."""
        style, script = _resource("page.css"), _resource("page.js")
        closed = (
            f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; "
            "base-uri 'none'; form-action 'none'"
        )
        head = tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=closed),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("title", self.title),
            tag("style", Markup(style)),
        )
        body = tag("body", tag("main", self._sections()), _footer(), tag("script", Markup(script)))
        return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"

    def _sections(self) -> list[Child]:
        depth = Depth.of(self.rows, self.estimated)
        return [
            tag("header", tag("h1", self.title), self._figures()),
            self._warnings(),
            self._sizes(),
            self._layers(depth),
            self._accumulated(depth),
            self._histograms(),
            self._table(),
            self._facts(),
        ]

    def _figures(self) -> Markup:
        return tag(
            "dl",
            [
                tag(
                    "div",
                    tag("dt", one.label),
                    tag("dd", tag("strong", one.value, class_=one.grade or None), one.note),
                )
                for one in self.figures
            ],
            class_="figures",
        )

    def _warnings(self) -> Markup:
        if not self.warnings:
            return _section("Warnings", "warnings", tag("p", "Nothing to warn of."))
        return _section("Warnings", "warnings", tag("ul", [_warning(one) for one in self.warnings]))

    def _sizes(self) -> Markup:
        parts = parts_of(self.rows, self.float_bytes, self.bytes)
        drawn = sizes(parts, self.float_bytes, self.bytes, "Bytes of the model before and after")
        return _section("Size", "size", tag("figure", drawn, sizes_legend(parts), class_="wide"))

    def _layers(self, depth: Depth) -> Markup:
        if not depth.rows:
            return _section("Error of each layer", "depth", tag("p", _NO_FIGURES))
        lines = [Line("the weight itself", depth.weights, "weights")]
        if any(value is not None for value in depth.layers):
            lines.append(Line(depth.layers_label, depth.layers, "layers", joined=True))
        title = "SQNR of each weight, and of what its layer returns, along the depth"
        said = (
            "Signal to quantization noise ratio: higher is better, and 10 dB are a factor of ten "
            "in the power of the error. Each layer by itself"
            + ("." if self.estimated else ", on its inputs in the float model.")
        )
        drawn = tag("figure", chart(depth, lines, title), legend(lines), class_="wide")
        note = tag("p", ESTIMATED, class_="note") if self.estimated else ""
        return _section("Error of each layer", "depth", tag("p", said), drawn, note)

    def _accumulated(self, depth: Depth) -> Markup:
        heading = "From input to output"
        if not any(value is not None for value in depth.accumulated):
            return _section(heading, "accumulated", tag("p", _NO_ACCUMULATION))
        lines = [
            Line(depth.layers_label, depth.layers, "layers"),
            Line("the same inside the quantized model", depth.accumulated, "inside", True),
        ]
        if self.output_db is not None:
            lines[1] = attrs.evolve(lines[1], last=self.output_db)
        title = "SQNR of what each layer returns inside the quantized model, from input to output"
        said = (
            "How errors add up: what each layer returns inside the quantized model, where those "
            "of all layers before it arrive too, against the float model. Where the line lies far "
            "below a dot, the layer suffers from what came before; where a dot is as low as the "
            "line, the layer does the damage itself. The last point is the output of the model."
        )
        drawn = tag("figure", chart(depth, lines, title), legend(lines), class_="wide")
        return _section(heading, "accumulated", tag("p", said), drawn)

    def _histograms(self) -> Markup:
        heading = "The layers that return least"
        worst = sorted(
            (row for row in self.rows if row.histogram or any(one.histogram for one in row.inputs)),
            key=lambda row: row.harm_db,
        )
        if not worst:
            return _section(heading, "histograms", tag("p", _NO_HISTOGRAMS))
        said = (
            "How values are spread, on a logarithmic scale, and behind them the range that the "
            "grid covers: between dashed lines that of all blocks with scales of their own, and "
            "between solid ones that of the median block. What lies beyond all is cut off."
        )
        drawn = [tag("article", tag("h3", row.name), _pictures(row)) for row in worst]
        grid = tag("div", drawn, class_="worst")
        return _section(heading, "histograms", tag("p", said), grid)

    def _table(self) -> Markup:
        caption = f"{len(self.rows)} rows, in the order of the model; a heading sorts by its column"
        search = tag("input", type="search", id="filter", autocomplete="off")
        line = tag("p", tag("label", "Filter ", search), tag("output", "", id="found"), hidden=True)
        many = len(self.rows) > _MANY
        rows = rows_table(self.rows, estimated=self.estimated, caption=caption)
        box = tag(
            "div", rows, class_="scroll", role="region", aria_label="Table of layers", tabindex="0"
        )
        return _section("Layers", "layers", line if many else "", box)

    def _facts(self) -> Markup:
        flow = tag("pre", "\n".join(self.flow)) if self.flow else ""
        title = tag("h3", "What layers take and give") if self.flow else ""
        if not self.facts and not self.flow:
            return Markup("")
        items = tag("ul", [tag("li", fact) for fact in self.facts]) if self.facts else ""
        return _section("Also", "also", items, title, flow)


_NO_FIGURES = (
    "No error of any weight is known here: nothing was quantized, or what was read is a file whose "
    "writer kept none."
)
_NO_ACCUMULATION = (
    "How errors add up was not measured: that takes data, and a float model that is still there, "
    "which quantizing in place does not keep."
)
_NO_HISTOGRAMS = (
    "There are no histograms: nothing was quantized, or what was read is a file whose writer kept "
    "none."
)


def _section(heading: str, name: str, *children: Child) -> Markup:
    title = tag("h2", heading, id=name)
    return tag("section", title, children, aria_labelledby=name, class_=name)


def _warning(text: str) -> Markup:
    """Return a warning, its grade apart and the calls that it advises as code."""
    grave = text.startswith("critical: ")
    said = text.removeprefix("critical: ")
    grade = "critical" if grave else "warning"
    return tag("li", tag("strong", grade, class_=grade), " ", _with_code(said))


def _with_code(text: str) -> list[Markup]:
    parts: list[Markup] = []
    done = 0
    for found in _CALL.finditer(text):
        parts += [joined(text[done : found.start()]), tag("code", found[0])]
        done = found.end()
    return [*parts, joined(text[done:])]


def _pictures(row: LayerReport) -> list[Markup]:
    drawn = [_picture(row.histogram, row.name, f"weight: {row.scheme}")] if row.histogram else []
    for one in row.inputs:
        if one.histogram is not None:
            free = "" if one.histogram.covered else "; a range is found for each input as it comes"
            drawn.append(_picture(one.histogram, one.name, row.activation or "inputs", free))
    return drawn


def _picture(found: Distribution, name: str, what: str, more: str = "") -> Markup:
    said = tag("figcaption", tag("b", what), tag("br"), f"{told(found)}{more}")
    return tag("figure", histogram(found, f"{name}, {what}"), said)


def _footer() -> Markup:
    return tag("footer", tag("p", f"Written by mono-quant {__version__}."))


def _resource(name: str) -> str:
    return resources.files("mono_quant.pictures").joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """Return what a page allows: this very text, and no other that somebody slips in."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
