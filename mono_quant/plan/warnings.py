"""What ought to be looked at before a quantized model is used."""

import math
from collections.abc import Iterable, Sequence

import attrs

from mono_quant.plan.damage import Damage
from mono_quant.report import CRITICAL_DB, WARNING_DB, LayerReport, Report, format_bytes, format_db

_NOTABLE_SHARE = 0.05
_SHOWN = 3
_OUTLIER = 20.0


def warnings_of(report: Report, damages: Sequence[Damage] = ()) -> tuple[str, ...]:
    """Return warnings on a finished report, the worst first."""
    found = _of_output(report)
    found += map(str, damages)
    found += _low_layers(report)
    found += _outliers(report)
    found += _notes(report)
    if head := _low_head(report):
        found.append(head)
    found += _left_float(report)
    if report.quantized and not any(row.shape or row.has_matrix for row in report.kept):
        found.append(
            "every layer is quantized; the first and the last are usually the most sensitive"
        )
    return _worst_first(found)


def with_output(report: Report, decibels: float) -> Report:
    """Return a finished report with another SQNR of the output, and the warnings that go by it."""
    before = _of_output(report)
    report = attrs.evolve(report, output_sqnr_db=decibels)
    kept = [warning for warning in report.warnings if warning not in before]
    return attrs.evolve(report, warnings=_worst_first([*_of_output(report), *kept]))


def _of_output(report: Report) -> list[str]:
    decibels = report.output_sqnr_db
    return _graded("the output", decibels) if decibels is not None else []


def _worst_first(found: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(found, key=lambda text: not text.startswith("critical")))


def _graded(what: str, decibels: float) -> list[str]:
    if math.isnan(decibels):
        return [f"critical: {what} is not finite"]
    if decibels < CRITICAL_DB:
        return [f"critical: {what} is at {format_db(decibels)} SQNR, below {CRITICAL_DB:.0f}"]
    if decibels < WARNING_DB:
        return [f"{what} is at {format_db(decibels)} SQNR, below {WARNING_DB:.0f}"]
    return []


def _low_layers(report: Report) -> list[str]:
    low = [
        (row.sqnr_db, row.name)
        for row in report.quantized
        if row.sqnr_db is not None and not row.sqnr_db >= WARNING_DB
    ]
    low.sort(key=lambda one: -math.inf if math.isnan(one[0]) else one[0])
    lines = [line for decibels, name in low[:_SHOWN] for line in _graded(name, decibels)]
    if len(low) > _SHOWN:
        lines.append(f"{len(low) - _SHOWN} more weights are below {WARNING_DB:.0f} dB")
    return lines


def _notes(report: Report) -> list[str]:
    """Return each thing that rows note, once, with the first weight that it is said of."""
    names: dict[str, list[str]] = {}
    for row in report.quantized:
        for part in row.note.split("; ") if row.note else ():
            names.setdefault(part, []).append(row.name)
    return [
        f"{first}: {part}" if not more else f"{first} and {len(more)} more: {part}"
        for part, (first, *more) in names.items()
    ]


def _outliers(report: Report) -> list[str]:
    """Return the weights with columns that dwarf the others, where they share scales with those."""
    lines = []
    for row in report.quantized:
        if (row.outliers or 0) >= _OUTLIER and "per-group" not in (row.scheme or ""):
            lines.append(
                f"{row.name} has columns {row.outliers:.0f} times the median one; scales for "
                f"groups keep them apart: override({row.name!r}, group_size=32)"
            )
    return lines[:_SHOWN]


def _low_head(report: Report) -> str | None:
    """Return a warning if the output head has fewer than 6 bits per weight."""
    rows = (row for row in report.quantized if report.head in (row.name, *row.aliases))
    row = next(rows, None)
    if row is None or report.head is None or row.bits_per_weight >= 6:
        return None
    name = report.head.rpartition(".")[0]
    return (
        f"the output head {name!r} is at {row.bits_per_weight:.2f} bits per weight; "
        f"override({name!r}, bits=8) or skip({name!r}) is the user's choice"
    )


def _left_float(report: Report) -> list[str]:
    total = report.bytes
    layers = [row for row in report.kept if row.layer]  # the row of all biases is of none
    kept: list[LayerReport] = sorted(layers, key=lambda row: -row.bytes)
    large = [row for row in kept if total and row.bytes / total >= _NOTABLE_SHARE]
    return [
        f"{row.name} stays float with {row.bytes / total:.0%} of the bytes "
        f"({format_bytes(row.bytes)}): {row.reason}"
        for row in large[:_SHOWN]
    ]
