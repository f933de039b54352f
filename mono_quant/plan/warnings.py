"""What ought to be looked at before a quantized model is used."""

import math
from collections.abc import Iterable, Sequence

import attrs

from mono_quant.evidence import (
    CRITICAL_DB,
    GOOD_DB,
    WARNING_DB,
    InputReport,
    LayerReport,
)
from mono_quant.plan.damage import Damage
from mono_quant.plan.relief import OUTLIER, Relief, groups_for, groups_help, has_outlier_columns
from mono_quant.report import Report
from mono_quant.text import format_bytes, format_db

_NOTABLE_SHARE = 0.05
_SHOWN = 3
_MOSTLY_FLOAT = "most of the model was left in float"
_HALF = 0.5
_CUT_ENERGY = 1e-4
"""Share of the squares of an input that may be cut off before it is worth a word: 40 dB below."""
_CROWDED = 0.8
_WORTH_DB = 6.0
"""What other ranges have to gain before they are advised."""
_UNEVEN_DB = 12.0
"""What ranges for each token have to gain, two bits, before nothing else speaks for them."""
_MATRIX = 2


def warnings_of(
    report: Report, damages: Sequence[Damage] = (), relief: Relief | None = None
) -> tuple[str, ...]:
    """Return warnings on a finished report, the worst first."""
    found = _mostly_float(report) + _of_output(report)
    found += [str(relief)] if relief is not None else []
    found += _first(
        [str(one) for one in sorted(damages, key=_returned)],
        'layers are damaged; on_damage("keep") mends all of them',
    )
    found += _low_layers(report)
    found += _outliers(report)
    found += _inputs(report)
    found += _unreached(report)
    found += _notes(report)
    if head := _low_head(report):
        found.append(head)
    found += _left_float(report)
    found += _ends(report)
    return _worst_first(found)


def with_output(report: Report, decibels: float) -> Report:
    """Return a finished report with another SQNR of the output, and the warnings that go by it."""
    before = [*_of_output(report), *_ends(report)]
    report = attrs.evolve(report, output_sqnr_db=decibels)
    kept = [warning for warning in report.warnings if warning not in before]
    found = [*_of_output(report), *kept, *_ends(report)]
    return attrs.evolve(report, warnings=_worst_first(found))


def _mostly_float(report: Report) -> list[str]:
    """Return that a run left more than half of the bytes that it might have quantized."""
    if report.coverage >= _HALF:
        return []
    return [
        f"{_MOSTLY_FLOAT}: {report.coverage:.0%} of the parameters' bytes are quantized; the rows "
        "say why, and require(coverage=0.9) makes an error of it"
    ]


def _of_output(report: Report) -> list[str]:
    decibels = report.output_sqnr_db
    return _graded("the output", decibels) if decibels is not None else []


def _ends(report: Report) -> list[str]:
    """Return that every layer is quantized, where the output is not known to be good."""
    good = report.output_sqnr_db is not None and report.output_sqnr_db >= GOOD_DB
    rest = any(row.shape or row.has_matrix for row in report.kept)
    if good or rest or not report.quantized:
        return []
    return ["every layer is quantized; the first and the last are usually the most sensitive"]


def _worst_first(found: Iterable[str]) -> tuple[str, ...]:
    first = (_MOSTLY_FLOAT, "critical")
    return tuple(sorted(found, key=lambda text: [not text.startswith(start) for start in first]))


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


def _returned(damage: Damage) -> float:
    """Return what is left of a layer, in dB, to sort by."""
    found = damage.output_db if damage.output_db is not None else damage.culprits[0].weight_db
    return -math.inf if math.isnan(found) else found


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
    """Return the weights with columns or rows that dwarf others with which they share a scale."""
    columns, rows = [], []
    for row in _rows_by_harm(report):
        shared = math.prod(row.scale_block[:-1]) > 1
        if shared and (row.row_outliers or 0) >= OUTLIER and not row.is_sound:
            rows.append(
                f"{row.name} has rows {row.row_outliers:.0f} times the median one; a scale for "
                f'each keeps them apart: override({row.name!r}, granularity="channel")'
            )
        if has_outlier_columns(row):
            columns.append(
                f"{row.name} has columns {row.outliers:.0f} times the median one; a few are kept "
                f"in float16 by override({row.name!r}, outliers=OutlierColumns()); {_apart(row)}"
            )
    return [*_first(columns, "weights have such columns"), *_first(rows, "weights have such rows")]


def _apart(row: LayerReport) -> str:
    """Return the call that keeps the columns of a weight apart, and what was seen of it."""
    size, gain = groups_for(row), row.groups_gain_db
    if size is not None and groups_help(row):
        leaves = f" and leave {gain:.0f} dB less error" if gain is not None else ""
        return (
            f"scales for groups keep them apart{leaves}: override({row.name!r}, group_size={size})"
        )
    why = f"no groups fit its rows of {row.columns}" if size is None else "groups do not help it"
    return f"{why}: override({row.name!r}, bits=16)"


def _inputs(report: Report) -> list[str]:
    """Return the inputs whose range is a point, cuts off much or is stretched by few values."""
    dead, cut, stretched = [], [], []
    bad = _low(report.output_sqnr_db)
    for row in _rows_by_harm(report):
        damaged = bad or _low(row.output_sqnr_db)
        for one in row.inputs:
            if one.low == one.high and one.cut is not None:
                dead.append(
                    f"the inputs of {one.name} were {one.low:g} all over the data, so that their "
                    "range is a point: calibrate on data that moves them, or say "
                    f'override({one.name!r}, activations="dynamic")'
                )
            elif row.is_sound and not _hides(one):
                continue
            elif _cuts(one, damaged):
                cut.append(
                    f"the range of the inputs of {one.name} cuts off {_percent(one.cut)} of "
                    f"the values, {_percent(one.cut_energy)} of their energy; {_mend(one)}"
                )
            elif seen := _stretches(one, damaged):
                mend = _mend(one, matrix=len(row.shape) == _MATRIX)
                stretched.append(f"the inputs of {one.name} {' and '.join(seen)}; {mend}")
    return [
        *_first(dead, "inputs did not move"),
        *_first(cut, "inputs are cut off"),
        *_first(stretched, "inputs have a range that few values stretch"),
    ]


def _unreached(report: Report) -> list[str]:
    """Return the layers that the data did not reach, where layers were measured."""
    missing = [row.name for row in report.quantized if row.output_sqnr_db is None]
    if len(missing) == len(report.quantized) or not missing:
        return []
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    return [
        f"no data reached {', '.join(missing[:_SHOWN])}{more}: what quantizing does there was not "
        "measured, and static inputs stay float; add data that goes there to fit(data)"
    ]


def _hides(one: InputReport) -> bool:
    """Return whether large tokens alone may make a layer look sound, and all others be lost."""
    crowded = (one.crowded or 0) >= _CROWDED
    return crowded and (one.per_token_gain_db or 0) >= _WORTH_DB


def _cuts(one: InputReport, damaged: bool) -> bool:
    """Return whether a range cuts off what the whole one would keep, or what may do damage."""
    if (one.cut_energy or 0) < _CUT_ENERGY:
        return False
    return damaged or (one.uncut_gain_db or 0) >= _WORTH_DB


def _stretches(one: InputReport, damaged: bool) -> list[str]:
    """Return what stretches the range of inputs, in words."""
    seen = []
    if (one.outliers or 0) >= OUTLIER:
        seen.append(f"have a channel {one.outliers:.0f} times the median one")
    if (one.crowded or 0) >= _CROWDED:
        seen.append(f"lie on two codes to {one.crowded:.0%}, zeros apart")
    if not seen and damaged and (one.per_token_gain_db or 0) >= _UNEVEN_DB:
        seen.append("share a range that some tokens stretch")
    return seen


def _mend(one: InputReport, *, matrix: bool = False) -> str:
    """Return the calls that leave less error, by how much; or the one that leaves none."""
    calls = []
    if matrix and (one.outliers or 0) >= OUTLIER:
        calls.append(
            "a few columns in float16 leave their inputs in float: "
            f'override({one.name!r}, outliers=OutlierColumns(), activations="dynamic")'
        )
    if (one.uncut_gain_db or 0) >= _WORTH_DB:
        calls.append(
            f"the whole range would leave {one.uncut_gain_db:.0f} dB less error: "
            f"override({one.name!r}, activation_observer=MinMax())"
        )
    if (one.per_token_gain_db or 0) >= _WORTH_DB:
        calls.append(
            f"a range for each token leaves {one.per_token_gain_db:.0f} dB less error in the "
            f'mean: override({one.name!r}, activations="dynamic")'
        )
    return "; ".join(calls) or f'leave them in float: override({one.name!r}, activations="float")'


def _percent(share: float | None) -> str:
    return f"{100 * (share or 0):.2g}%"


def _rows_by_harm(report: Report) -> list[LayerReport]:
    """Return the quantized rows, those first whose layers return least of what they should."""

    def returned(row: LayerReport) -> float:
        found = row.output_sqnr_db
        return math.inf if found is None else -math.inf if math.isnan(found) else found

    return sorted(report.quantized, key=returned)


def _low(decibels: float | None) -> bool:
    return decibels is not None and not decibels >= WARNING_DB


def _first(lines: list[str], more: str) -> list[str]:
    """Return the first of some warnings, and how many were left out."""
    rest = len(lines) - _SHOWN
    return [*lines[:_SHOWN], *([f"{rest} more {more}"] if rest > 0 else [])]


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
