"""What changed between two reports, weight by weight."""

from collections.abc import Sequence

import attrs

from mono_quant.columns import decibels
from mono_quant.configurable import Config
from mono_quant.evidence import LayerReport, finite
from mono_quant.text import format_bytes, table


@attrs.frozen
class Changed:
    """One row that is another one in the other report.

    Attributes:
        before: None where only the other report has it.
        after: None where only the first report has it.
    """

    before: LayerReport | None
    after: LayerReport | None

    @property
    def name(self) -> str:
        """Name of the weight or the module."""
        row = self.before or self.after
        return row.name if row is not None else ""

    @property
    def bytes(self) -> int:
        """How many more bytes it takes than before; negative for fewer."""
        before, after = (row.bytes if row is not None else 0 for row in (self.before, self.after))
        return after - before

    @property
    def output_db(self) -> float | None:
        """How much less error its layer returns, in dB; None where that is not known of both."""
        rows = self.before, self.after
        return _gain(*(row.output_sqnr_db if row is not None else None for row in rows))

    @property
    def sqnr_db(self) -> float | None:
        """How much less error the weight has, in dB; None where that is not known of both."""
        rows = self.before, self.after
        return _gain(*(row.sqnr_db if row is not None else None for row in rows))

    def to_dict(self) -> Config:
        """Return the figures of both as JSON data."""
        return {
            "name": self.name,
            "before": _figures(self.before),
            "after": _figures(self.after),
            "bytes": self.bytes,
            "sqnr_db": finite(self.sqnr_db),
            "output_db": finite(self.output_db),
        }

    def cells(self) -> tuple[str, ...]:
        """Return it as a line of a table: each figure of both where they differ."""
        before, after = self.before, self.after
        return (
            self.name,
            _both("" if before is None else _fate(before), "" if after is None else _fate(after)),
            _both(*(f"{row.bits_per_weight:.2f}" if row else "" for row in (before, after))),
            _both(*(format_bytes(row.bytes) if row else "" for row in (before, after))),
            _both(*(decibels(row.sqnr_db) if row else "" for row in (before, after))),
            _both(*(decibels(row.output_sqnr_db) if row else "" for row in (before, after))),
        )


@attrs.frozen
class ReportDifference:
    """What changed from one report to another.

    Attributes:
        layers: the rows that are not alike in both, in the model's order.
        alike: how many further rows are.
        bytes: of the model, in the one and in the other.
        output_sqnr_db: of the outputs, in dB, in the one and in the other; None without data.
        gone: warnings that only the first has.
        new: warnings that only the other has.
    """

    layers: tuple[Changed, ...]
    alike: int
    bytes: tuple[int, int]
    output_sqnr_db: tuple[float | None, float | None]
    gone: tuple[str, ...] = ()
    new: tuple[str, ...] = ()

    def to_dict(self) -> Config:
        """Return everything as JSON data; an infinite SQNR is the string "inf"."""
        return {
            "bytes": list(self.bytes),
            "output_sqnr_db": [finite(one) for one in self.output_sqnr_db],
            "alike": self.alike,
            "gone": list(self.gone),
            "new": list(self.new),
            "layers": [changed.to_dict() for changed in self.layers],
        }

    def __str__(self) -> str:
        """Return it as text for a terminal."""
        before, after = self.bytes
        share = f" ({after / before - 1:+.1%})" if before else ""
        lines = [f"{format_bytes(before)} -> {format_bytes(after)}{share}"]
        outputs = [decibels(one) or "not measured" for one in self.output_sqnr_db]
        lines.append(f"output SQNR {' -> '.join(outputs)}")
        lines += [f"warning gone: {warning}" for warning in self.gone]
        lines += [f"warning new: {warning}" for warning in self.new]
        count = len(self.layers)
        lines.append(f"{count} row{'s differ' if count != 1 else ' differs'}, {self.alike} alike")
        if self.layers:
            columns = ("name", "fate", "bits", "bytes", "SQNR", "output")
            lines += ["", *table(columns, [changed.cells() for changed in self.layers])]
        return "\n".join(lines)


def difference(
    before: Sequence[LayerReport], after: Sequence[LayerReport]
) -> tuple[tuple[Changed, ...], int]:
    """Return the rows that differ, in the order of `after`, and how many do not.

    Rows are the same by their names. Those that only `before` has come last.
    """
    ours, theirs = ({row.name: row for row in rows} for rows in (before, after))
    pairs = [(ours.get(name), row) for name, row in theirs.items()]
    gone = [Changed(row, None) for name, row in ours.items() if name not in theirs]
    changed = [Changed(one, other) for one, other in pairs if _figures(one) != _figures(other)]
    return (*changed, *gone), len(pairs) - len(changed)


def _figures(row: LayerReport | None) -> Config | None:
    """Return what rows are compared by, as JSON data."""
    if row is None:
        return None
    return {
        "fate": row.fate,
        "bits_per_weight": row.bits_per_weight,
        "bytes": row.bytes,
        "sqnr_db": finite(row.sqnr_db),
        "output_sqnr_db": finite(row.output_sqnr_db),
    }


def _fate(row: LayerReport) -> str:
    """Return the first words of a fate: the scheme and the inputs, or why it is float."""
    if row.scheme is None:
        return f"float: {row.reason}"
    return "; ".join(filter(None, (row.scheme, row.activation)))


def _both(before: str, after: str) -> str:
    return before if before == after else f"{before or '-'} -> {after or '-'}"


def _gain(before: float | None, after: float | None) -> float | None:
    if before is None or after is None or before == after:  # exact in both, too
        return None if before is None or after is None else 0.0
    return after - before
