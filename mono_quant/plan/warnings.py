"""What ought to be looked at before a quantized model is used."""

import math

from mono_quant.report import CRITICAL_DB, WARNING_DB, LayerReport, Report, format_bytes, format_db

_NOTABLE_SHARE = 0.05
_SHOWN = 3


def warnings_of(report: Report) -> tuple[str, ...]:
    """Return warnings on a finished report, the worst first."""
    found: list[str] = []
    if report.output_sqnr_db is not None:
        found += _graded("the output", report.output_sqnr_db)
    found += _low_layers(report)
    found += [f"{row.name}: {row.note}" for row in report.quantized if row.note]
    if head := _low_head(report):
        found.append(head)
    left = _left_float(report)
    found += left
    if report.quantized and not left and not any(row.shape for row in report.kept):
        found.append(
            "every layer is quantized; the first and the last are usually the most sensitive"
        )
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
