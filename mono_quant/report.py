"""What was done to a model, and the damage: plain data and its rendering."""

import json
import math
from os import PathLike
from pathlib import Path
from typing import Protocol, Self, cast

import attrs

from mono_quant.atomic import replacing
from mono_quant.base import Change
from mono_quant.columns import ESTIMATED, columns_of, filled
from mono_quant.configurable import Config
from mono_quant.difference import ReportDifference, difference
from mono_quant.errors import ConfigurationError, RequirementError
from mono_quant.evidence import LayerReport, finite, grade
from mono_quant.speed import LayerSpeed, Speed
from mono_quant.text import format_bytes, format_db, format_ms, table

_SHOWN = 3


class Drawing(Protocol):
    """A `matplotlib.figure.Figure`, as far as this package knows it."""

    def savefig(self, fname: str | PathLike[str]) -> None:
        """Write it to a file, whose suffix chooses the format."""


@attrs.frozen
class Report:
    """Every parameter of a model accounted for.

    Attributes:
        layers: quantized weights and float parameters, in the model's order; a tied weight once.
        buffer_bytes: bytes of buffers, which are left as they are.
        output_sqnr_db: of the model's outputs on the data, in dB; None without data.
        samples: how many samples the outputs were measured on.
        notes: what was decided that the user did not say.
        warnings: what ought to be looked at, worst first.
        head: name of the weight of the last layer, as a rule the output head.
        changes: what transforms and corrections did, and what they refused to do.
        original_bytes: bytes of the model before, where transforms changed its structure.
        flow: of a graph, what each layer takes and gives, and where floats are left and why.
        class_kept_sqnr_db: of a graph, `output_sqnr_db` of the model that keeps its class.
        speed: of the model beside the float one; None until `benchmark` has measured it.
    """

    layers: tuple[LayerReport, ...]
    buffer_bytes: int = 0
    output_sqnr_db: float | None = None
    samples: int = 0
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    head: str | None = None
    changes: tuple[Change, ...] = ()
    original_bytes: int | None = None
    flow: tuple[str, ...] = ()
    class_kept_sqnr_db: float | None = None
    speed: Speed | None = None

    @property
    def quantized(self) -> tuple[LayerReport, ...]:
        """The weights that were quantized."""
        return tuple(layer for layer in self.layers if layer.scheme is not None)

    @property
    def kept(self) -> tuple[LayerReport, ...]:
        """What stayed float."""
        return tuple(layer for layer in self.layers if layer.scheme is None)

    @property
    def float_bytes(self) -> int:
        """Bytes of the model before, buffers included."""
        if self.original_bytes is not None:
            return self.original_bytes
        return sum(layer.float_bytes for layer in self.layers) + self.buffer_bytes

    @property
    def bytes(self) -> int:
        """Bytes of the model after, scales, zero points and buffers included."""
        return sum(layer.bytes for layer in self.layers) + self.buffer_bytes

    @property
    def ratio(self) -> float:
        """How many times smaller the model is."""
        return self.float_bytes / self.bytes if self.bytes else 1.0

    @property
    def sizes(self) -> str:
        """The bytes before and after in a few words."""
        sizes = f"{format_bytes(self.float_bytes)} -> {format_bytes(self.bytes)}"
        return f"{sizes} ({self.ratio:.2f} times smaller)"

    @property
    def bits_per_weight(self) -> float:
        """Bits per value over the quantized weights, everything counted."""
        count = sum(layer.parameters for layer in self.quantized)
        return 8 * sum(layer.bytes for layer in self.quantized) / count if count else 0.0

    @property
    def coverage(self) -> float:
        """The share of the parameters' bytes, 0 to 1, that was quantized; 1 if there are none."""
        total = sum(layer.float_bytes for layer in self.layers)
        return sum(layer.float_bytes for layer in self.quantized) / total if total else 1.0

    def require(self, *, coverage: float | None = None, sqnr: float | None = None) -> Self:
        """Return the report if it holds what is required; nothing else is looked at.

        Args:
            coverage: the least share of the parameters' bytes that is quantized, 0 to 1.
            sqnr: the least SQNR of the outputs on the data, in dB.

        Raises:
            RequirementError: it does not; says by how much, and what stays float and why.
            ConfigurationError: nothing is required, or what no report can hold.
        """
        if coverage is None and sqnr is None:
            raise ConfigurationError("nothing is required: require(coverage=0.9, sqnr=20)")
        if coverage is not None and not 0 <= coverage <= 1:
            raise ConfigurationError(f"coverage is a share from 0 to 1, not {coverage}")
        if sqnr is not None and math.isnan(sqnr):
            raise ConfigurationError("sqnr is a number of decibels, not NaN")
        short: list[str] = []
        if coverage is not None and self.coverage < coverage:
            short.append(
                f"{_percent(self.coverage)} of the parameters' bytes are quantized, and "
                f"{_percent(coverage)} are required{self._largest_kept()}"
            )
        if sqnr is not None and self.output_sqnr_db is None:
            short.append(
                f"an output SQNR of {format_db(sqnr)} is required, and none was measured: give "
                "some with fit(data)"
            )
        elif sqnr is not None and not cast("float", self.output_sqnr_db) >= sqnr:
            found = format_db(cast("float", self.output_sqnr_db))
            short.append(f"the output SQNR is {found}, and {format_db(sqnr)} are required")
        if short:
            raise RequirementError("; ".join(short))
        return self

    def _largest_kept(self) -> str:
        kept = sorted(self.kept, key=lambda row: -row.float_bytes)[:_SHOWN]
        rows = (f"{row.name} ({format_bytes(row.float_bytes)}: {row.reason})" for row in kept)
        return f"; float stay {', '.join(rows)}" if kept else ""

    @property
    def mean_sqnr_db(self) -> float | None:
        """Mean weight SQNR over the quantized weights, in dB; None if there is no finite one."""
        finite = [
            layer.sqnr_db
            for layer in self.quantized
            if layer.sqnr_db is not None and math.isfinite(layer.sqnr_db)
        ]
        return math.fsum(finite) / len(finite) if finite else None  # whatever their order

    @property
    def estimated(self) -> bool:
        """Whether estimates are shown of what layers return: it was measured of none."""
        quantized = self.quantized
        return all(layer.output_sqnr_db is None for layer in quantized) and any(
            layer.estimated_db is not None for layer in quantized
        )

    @property
    def layers_speed(self) -> LayerSpeed | None:
        """What the layers that were measured take, those that stayed float alike on both sides."""
        found = {id(row.speed): row for row in self.layers}.values()
        speeds = [
            row.speed
            if row.scheme is not None
            else LayerSpeed(row.speed.float_seconds, row.speed.float_seconds)
            for row in found
            if row.speed is not None
        ]
        return sum(speeds[1:], speeds[0]) if speeds else None

    def with_speed(self, speed: Speed) -> "Report":
        """Return the report with a measured speed, and in each row what computed its weight."""

        def told(row: LayerReport) -> LayerReport:
            names = (row.name, *row.aliases)
            ran = dict.fromkeys(speed.kernels[name] for name in names if name in speed.kernels)
            return attrs.evolve(row, kernel=", ".join(ran) or None)

        return attrs.evolve(self, speed=speed, layers=tuple(map(told, self.layers)))

    def to_dict(self) -> Config:
        """Return everything as JSON data; an infinite SQNR is the string "inf"."""
        rows = [row.to_dict() for row in self.layers]
        speed = self.speed.to_dict() if self.speed is not None else None
        return {**self.summary(), "layers": rows, "flow": list(self.flow), "speed": speed}

    def summary(self) -> Config:
        """Return the figures of the whole model as JSON data, but for times: files hold this."""
        return {
            "float_bytes": self.float_bytes,
            "bytes": self.bytes,
            "ratio": self.ratio,
            "bits_per_weight": self.bits_per_weight,
            "coverage": self.coverage,
            "mean_weight_sqnr_db": finite(self.mean_sqnr_db),
            "output_sqnr_db": finite(self.output_sqnr_db),
            "class_kept_sqnr_db": finite(self.class_kept_sqnr_db),
            "samples": self.samples,
            "quantized_weights": len(self.quantized),
            "changes": [
                {"path": change.path, "text": change.text, "done": change.done}
                for change in self.changes
            ],
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }

    def to_json(self) -> str:
        """Return `to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_markdown(self) -> str:
        """Return the report as Markdown with one table."""
        lines = [
            f"**{line}**" if place == 0 else f"- {line}" for place, line in enumerate(self._head())
        ]
        columns, rows = self._table()
        lines += ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows
        ]
        lines += ["", *self._below()] if self.estimated else []
        title, *flow = self._flowing()[1:] or [""]
        lines += ["", title, "", *(f"- {line.strip()}" for line in flow)] if flow else []
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        """Return the report as text for a terminal."""
        return "\n".join([*self._head(), "", *self._lines(), *self._below(), *self._flowing()])

    def forecast(self, peak_bytes: int, peak_bytes_in_place: int | None) -> str:
        """Return the report of a plan, whose sizes are predictions, as text."""
        in_place = (
            f", {format_bytes(peak_bytes_in_place)} for apply_"
            if peak_bytes_in_place is not None
            else ""
        )
        head = [
            f"predicted: {self.sizes}, {len(self.quantized)} weights at "
            f"{self.bits_per_weight:.3f} bits per weight",
            *self._warned(),
            f"peak memory: {format_bytes(peak_bytes)} for apply{in_place}",
            *self._timed(),
            *self._changed(),
            *self.notes,
        ]
        return "\n".join([*head, "", *self._lines()])

    def _repr_html_(self) -> str:
        from mono_quant.pictures import Depth, compact

        head, *lines = self._head()
        depth = Depth.of(self.layers, self.estimated)
        columns, cells = self._table()
        return compact(head, lines, depth, columns, cells, self._below(), self.flow)

    def to_html(self, path: str | PathLike[str], *, title: str = "Quantization report") -> Path:
        """Write the report as one page that needs no network and no server, and return its path.

        It shows the warnings, the sizes, the error of each layer along the depth of the model, how
        errors add up from the input to the output where that was measured, how the values of the
        worst layers are spread, and a table that can be sorted.

        Args:
            path: where to; a file that is there is replaced.
            title: above the page.

        Raises:
            OSError: the file cannot be written; what stood there still stands.
        """
        path, page = Path(path), self._page(title)
        with replacing(path) as beside:
            beside.write_text(page, encoding="utf-8")
        return path

    def plot(self) -> Drawing:
        """Return the same pictures as a `matplotlib.figure.Figure`, which a notebook shows.

        The error of each layer, how errors add up, and histograms of the three worst weights, as
        far as these are known.

        Raises:
            ConfigurationError: matplotlib is not installed.
        """
        from mono_quant.pictures.plot import draw

        return draw(self.layers, self.output_sqnr_db, self.estimated)

    def diff(self, other: "Report") -> ReportDifference:
        """Return what changed from this report to another one, weight by weight."""
        layers, alike = difference(self.layers, other.layers)
        return ReportDifference(
            layers,
            alike,
            (self.bytes, other.bytes),
            (self.output_sqnr_db, other.output_sqnr_db),
            tuple(one for one in self.warnings if one not in other.warnings),
            tuple(one for one in other.warnings if one not in self.warnings),
        )

    def _page(self, title: str) -> str:
        from mono_quant.pictures import KeyFigure, Page

        output, mean = self.output_sqnr_db, self.mean_sqnr_db
        many = "s" if len(self.quantized) != 1 else ""
        weights = f"{len(self.quantized)} quantized weight{many}"
        figures = [
            KeyFigure(
                "size",
                format_bytes(self.bytes),
                f"of {format_bytes(self.float_bytes)}, {self.ratio:.2f} times smaller",
            ),
            KeyFigure("bits per weight", f"{self.bits_per_weight:.3f}", f"of {weights}"),
        ]
        if mean is not None:
            figures.append(KeyFigure("mean weight SQNR", f"{mean:.1f} dB", f"of {weights}"))
        if output is None:
            figures.append(KeyFigure("output SQNR", "not measured", "no data was given"))
        else:
            seen = f"{grade(output)}, on {self.samples} samples"
            figures.append(KeyFigure("output SQNR", format_db(output), seen, grade(output)))
        return Page(
            title=title,
            rows=self.layers,
            float_bytes=self.float_bytes,
            bytes=self.bytes,
            figures=figures,
            warnings=self.warnings,
            facts=(*self._timed(), *self._class_kept(), *self._changed(), *self.notes),
            output_db=output,
            estimated=self.estimated,
            flow=self.flow,
        ).to_html()

    def _head(self) -> list[str]:
        lines = [self.sizes, *self._warned()]
        mean = self.mean_sqnr_db
        lines.append(
            f"{len(self.quantized)} weights quantized at {self.bits_per_weight:.3f} bits per weight"
            + (f", mean weight SQNR {mean:.1f} dB" if mean is not None else "")
        )
        if self.output_sqnr_db is not None:
            lines.append(
                f"output SQNR {format_db(self.output_sqnr_db)} on {self.samples} samples "
                f"({grade(self.output_sqnr_db)})"
                + "".join(f"; {kept}" for kept in self._class_kept())
            )
        else:
            lines.append("output SQNR not measured: no data; give some with fit(data)")
        return [*lines, *self._timed(), *self._changed(), *self.notes]

    def _class_kept(self) -> list[str]:
        kept = self.class_kept_sqnr_db
        return [f"{format_db(kept)} with its class kept"] if kept is not None else []

    def _warned(self) -> list[str]:
        return [f"warning: {warning}" for warning in self.warnings]

    def _timed(self) -> list[str]:
        """Return what was measured of the speed: of the model, and of its layers one by one."""
        lines = str(self.speed).split("\n") if self.speed is not None else []
        layers = self.layers_speed
        if layers is not None:
            lines.append(
                f"layers measured one by one: {format_ms(layers.float_seconds)} -> "
                f"{format_ms(layers.seconds)} a call of the model, {layers.ratio:.2f} times as "
                "fast as float"
            )
        return lines

    def _flowing(self) -> list[str]:
        """Return what the layers of a graph take and give, under a title; nothing of other models.

        A blank line goes before it.
        """
        if not self.flow:
            return []
        return ["", "what layers take and give:", *(f"  {line}" for line in self.flow)]

    def _changed(self) -> list[str]:
        """Return how much was done to layers, and all that was done to the model or refused."""
        done = [change.text for change in self.changes if change.done and change.path]
        lines = []
        if done:
            plural, more = ("s", ", ...") if len(done) > 1 else ("", "")
            told = f"{len(done)} change{plural} before or after quantizing"
            lines.append(f"{told}: {done[0]}{more}")
        lines += [change.text for change in self.changes if change.done and not change.path]
        return lines + [f"left alone: {change.text}" for change in self.changes if not change.done]

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """Return the titles of the columns in which some row has anything, and their cells."""
        columns, rows = filled(columns_of(estimated=self.estimated), self.layers)
        return [column.title for column in columns], rows

    def _lines(self) -> list[str]:
        """Return the table as text."""
        columns = columns_of(estimated=self.estimated)
        return table(*self._table(), frozenset(one.title for one in columns if one.numeric))

    def _below(self) -> list[str]:
        """Return what a mark in the table means."""
        return [ESTIMATED] if self.estimated else []


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
