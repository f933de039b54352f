"""What was done to a model, and the damage: plain data and its rendering."""

import html
import json
import math
from collections.abc import Callable
from typing import Self, cast

import attrs

from mono_quant.base import Change
from mono_quant.configurable import Config
from mono_quant.errors import ConfigurationError, RequirementError
from mono_quant.speed import LayerSpeed, Speed
from mono_quant.text import format_bytes, format_db, format_ms, table

CRITICAL_DB = 10.0
WARNING_DB = 20.0
GOOD_DB = 30.0
_SHOWN = 3


@attrs.frozen
class InputReport:
    """What the inputs that one weight meets were like on the data, and how they use their grid.

    Attributes:
        name: dotted name of the weight.
        low: the smallest value.
        high: the largest.
        outliers: how many times the median channel the largest is, by root mean square or by
            maximum; None where channels are not known or too few.
        cut: share of the values that lie beyond a calibrated range; None for other ranges.
        cut_energy: squared error of cutting them off, as a share of all squares.
        uncut_gain_db: how much less error than that the whole range would leave, in dB; None where
            nothing is cut off.
        crowded: share of the values other than zero that fall on the two codes that are used most,
            of a calibrated range.
        per_token_gain_db: how much less error a range for each row would leave there, in dB, in the
            mean over rows; None where inputs are no rows, or have such ranges already.
    """

    name: str
    low: float
    high: float
    outliers: float | None = None
    cut: float | None = None
    cut_energy: float | None = None
    uncut_gain_db: float | None = None
    crowded: float | None = None
    per_token_gain_db: float | None = None


@attrs.frozen
class LayerReport:
    """One weight, or the float parameters of one module.

    Attributes:
        name: dotted name of the weight or the module.
        layer: class of the layer.
        shape: native shape of a weight; empty for a module's parameters.
        parameters: how many values.
        float_bytes: bytes before.
        bytes: bytes after, scales and zero points counted.
        scheme: how it was quantized, or None for what stayed float.
        activation: how its inputs are quantized, or why they are not although they were to be.
        reason: why it stayed float, or was not quantized now.
        sqnr_db: of the weight, in dB; None where nothing was quantized.
        estimated_db: SQNR of a product with the weight, in dB, for inputs drawn so that every
            column counts alike, or all alike where its rows are too few to tell; of a weight that
            is only looked up, of its rows. An estimate without data, and without the error of
            quantized inputs; None where nothing was quantized.
        outliers: root mean square of the largest column over that of the median one, or None.
        row_outliers: the same of the rows.
        columns: how many values a row of the weight's matrix has; 0 for a module's parameters.
        scale_block: the block of the weight as a stack ``[G, out, in]`` that shares one scale;
            empty where there are no scales.
        output_sqnr_db: of what its layer returns for the inputs that it has in the float model, in
            dB, weights and inputs quantized; None where that was not measured.
        groups_gain_db: how much less error its layer would return with scales for groups, which its
            columns ask for, in dB; None where that was not tried.
        inputs: what its inputs were like on the data, where they are quantized; also those of tied
            weights.
        ranges: why observers chose the ranges that they did, of those that say so.
        note: what else is worth knowing.
        aliases: names of further weights that share these values, counted here once.
        has_matrix: whether a module's float parameters hold one of two dimensions or more.
        speed: of its layer, with all layers that share its values, as `only_if_faster` measured it;
            the rows of one layer share one.
        kernel: what computed with it when somebody looked; several where they differ.
    """

    name: str
    layer: str
    shape: tuple[int, ...]
    parameters: int
    float_bytes: int
    bytes: int
    scheme: str | None = None
    activation: str | None = None
    reason: str | None = None
    sqnr_db: float | None = None
    estimated_db: float | None = None
    outliers: float | None = None
    row_outliers: float | None = None
    columns: int = 0
    scale_block: tuple[int, ...] = ()
    output_sqnr_db: float | None = None
    groups_gain_db: float | None = None
    inputs: tuple[InputReport, ...] = ()
    ranges: tuple[str, ...] = ()
    note: str | None = None
    aliases: tuple[str, ...] = ()
    has_matrix: bool = False
    speed: LayerSpeed | None = None
    kernel: str | None = None

    @property
    def bits_per_weight(self) -> float:
        """Bits per value after, everything counted."""
        return 8 * self.bytes / self.parameters if self.parameters else 0.0

    @property
    def is_sound(self) -> bool:
        """Whether the layer was measured and returns what it should."""
        return self.output_sqnr_db is not None and self.output_sqnr_db >= GOOD_DB

    def with_inputs(
        self,
        activation: str | None,
        size: int,
        alias: str | None = None,
        *,
        reason: str | None = None,
    ) -> "LayerReport":
        """Return the row with what is said of the inputs, and the bytes that they take.

        Args:
            activation: how they are quantized, or why not; None for nothing to say.
            size: bytes of what was calibrated.
            alias: the tied weight that they meet, where it is not this one; it is only named where
                its inputs have another fate.
            reason: why their range is what it is.
        """
        of = f" of {alias}" if alias is not None else ""
        ranges = (*self.ranges, f"input range{of} by {reason}") if reason else self.ranges
        parts = self.activation
        if alias is None:
            parts = activation
        elif activation is not None and activation != self.activation:
            named = f"{activation} of {alias}"
            parts = named if self.activation is None else f"{self.activation}; {named}"
        return attrs.evolve(self, activation=parts, bytes=self.bytes + size, ranges=ranges)

    @property
    def fate(self) -> str:
        """The scheme, or why it stayed float; whose values these also are; ranges; the note."""
        parts = [self.scheme if self.scheme is not None else f"float: {self.reason}"]
        if self.scheme is None and self.speed is not None:
            parts[0] += f", quantized it is {self.speed.ratio:.2f} times as fast on the example"
        if self.activation is not None:
            parts.append(self.activation)
        if self.scheme is not None and self.reason:
            parts.append(self.reason)
        if self.aliases:
            parts.append(f"also {', '.join(self.aliases)}")
        parts += self.ranges
        if self.note:
            parts.append(self.note)
        return "; ".join(parts)


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
        rows: list[Config] = [
            {
                "name": layer.name,
                "layer": layer.layer,
                "shape": list(layer.shape),
                "parameters": layer.parameters,
                "float_bytes": layer.float_bytes,
                "bytes": layer.bytes,
                "bits_per_weight": layer.bits_per_weight,
                "scheme": layer.scheme,
                "activation": layer.activation,
                "reason": layer.reason,
                "sqnr_db": _finite(layer.sqnr_db),
                "estimated_db": _finite(layer.estimated_db),
                "outliers": layer.outliers,
                "row_outliers": layer.row_outliers,
                "columns": layer.columns,
                "scale_block": list(layer.scale_block),
                "output_sqnr_db": _finite(layer.output_sqnr_db),
                "groups_gain_db": _finite(layer.groups_gain_db),
                "inputs": [attrs.asdict(one) for one in layer.inputs],
                "ranges": list(layer.ranges),
                "note": layer.note,
                "aliases": list(layer.aliases),
                "has_matrix": layer.has_matrix,
                "speed": layer.speed.to_dict() if layer.speed is not None else None,
                "kernel": layer.kernel,
            }
            for layer in self.layers
        ]
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
            "mean_weight_sqnr_db": _finite(self.mean_sqnr_db),
            "output_sqnr_db": _finite(self.output_sqnr_db),
            "class_kept_sqnr_db": _finite(self.class_kept_sqnr_db),
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
            *self.notes,
        ]
        return "\n".join([*head, "", *self._lines()])

    def _repr_html_(self) -> str:
        head, *rest = (html.escape(line) for line in self._head())
        columns, rows = self._table()
        heads = "".join(f"<th>{column}</th>" for column in columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in rows
        )
        items = "".join(f"<li>{line}</li>" for line in rest)
        return (
            f"<p><b>{head}</b></p><ul>{items}</ul>"
            f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
            + "".join(f"<p>{html.escape(line)}</p>" for line in self._below())
            + (f"<pre>{html.escape(chr(10).join(self.flow))}</pre>" if self.flow else "")
        )

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
                + (
                    f"; {format_db(self.class_kept_sqnr_db)} with its class kept"
                    if self.class_kept_sqnr_db is not None
                    else ""
                )
            )
        else:
            lines.append("output SQNR not measured: no data; give some with fit(data)")
        return [*lines, *self._timed(), *self._changed(), *self.notes]

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
        """Return how much transforms did, and each thing that they refused to do."""
        done = sum(change.done for change in self.changes)
        lines = (
            [
                f"{done} change{'s' if done > 1 else ''} before or after quantizing: "
                f"{self._first_change()}"
            ]
            if done
            else []
        )
        return lines + [f"left alone: {change.text}" for change in self.changes if not change.done]

    def _first_change(self) -> str:
        done = [change.text for change in self.changes if change.done]
        return done[0] if len(done) == 1 else f"{done[0]}, ..."

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """Return the titles of the columns in which some row has anything, and their cells."""
        cells = {title: [show(row) for row in self.layers] for title, show in _COLUMNS.items()}
        if self.estimated:
            cells[_OUTPUT] = [_estimate(row) for row in self.layers]
        shown = {title: column for title, column in cells.items() if any(column) or not column}
        return list(shown), [list(row) for row in zip(*shown.values(), strict=True)]

    def _lines(self) -> list[str]:
        """Return the table as text."""
        return table(*self._table(), _NUMERIC)

    def _below(self) -> list[str]:
        """Return what a mark in the table means."""
        return [_ESTIMATED] if self.estimated else []


_OUTPUT = "output"
_ESTIMATED = (
    "~ estimated, not measured: of a product with the quantized weight alone, for inputs drawn so "
    "that all of its columns count alike; of an embedding, of its rows"
)


def _decibels(value: float | None) -> str:
    return format_db(value) if value is not None else ""


def _estimate(layer: LayerReport) -> str:
    return f"~{format_db(layer.estimated_db)}" if layer.estimated_db is not None else ""


_COLUMNS: dict[str, Callable[[LayerReport], str]] = {
    "name": lambda layer: layer.name,
    "layer": lambda layer: layer.layer,
    "shape": lambda layer: "x".join(map(str, layer.shape)),
    "before": lambda layer: format_bytes(layer.float_bytes),
    "after": lambda layer: format_bytes(layer.bytes),
    "bits": lambda layer: f"{layer.bits_per_weight:.2f}",
    "SQNR": lambda layer: _decibels(layer.sqnr_db),
    _OUTPUT: lambda layer: _decibels(layer.output_sqnr_db),
    "speed": lambda layer: f"{layer.speed.ratio:.2f}x" if layer.speed is not None else "",
    "kernel": lambda layer: layer.kernel or "",
    "fate": lambda layer: layer.fate,
}
_NUMERIC = frozenset({"before", "after", "bits", "SQNR", _OUTPUT, "speed"})


def grade(decibels: float) -> str:
    """Return the word for an SQNR: critical below 10 dB, warning below 20, good above 30."""
    if math.isnan(decibels) or decibels < CRITICAL_DB:
        return "critical"
    if decibels < WARNING_DB:
        return "warning"
    return "good" if decibels > GOOD_DB else "fair"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _finite(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)
