"""The table of a report's rows: one that can be sorted and filtered."""

import math
from collections.abc import Sequence

from mono_quant.columns import ACCUMULATED, OUTPUT, Column, columns_of, filled
from mono_quant.evidence import LayerReport, grade
from mono_quant.pictures.markup import Child, Markup, tag

_GRADED = frozenset({"SQNR", OUTPUT, ACCUMULATED.title})


def rows_table(rows: Sequence[LayerReport], *, estimated: bool, caption: str) -> Markup:
    """Return the table; the rows' names are headers, and columns of figures hold those too."""
    columns, cells = filled(_columns(estimated), tuple(rows))
    heads = [_head("#", "place in the model", numeric=True)]
    heads += [_head(column.title, column.meaning, numeric=column.numeric) for column in columns]
    lines = [
        _row(place, row, columns, line)
        for place, (row, line) in enumerate(zip(rows, cells, strict=True))
    ]
    return tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", heads)),
        tag("tbody", lines),
        id="rows",
    )


def _columns(estimated: bool) -> tuple[Column, ...]:
    """Return those of a terminal, and how errors add up behind what layers return."""
    columns = columns_of(estimated=estimated)
    place = next(place for place, column in enumerate(columns) if column.title == OUTPUT)
    return (*columns[: place + 1], ACCUMULATED, *columns[place + 1 :])


def _head(title: str, meaning: str, *, numeric: bool) -> Markup:
    button = tag("button", title, type="button", title=meaning)
    kind = "number" if numeric else "text"
    return tag("th", button, scope="col", aria_sort="none", data_kind=kind, class_=kind)


def _row(place: int, row: LayerReport, columns: Sequence[Column], line: Sequence[str]) -> Markup:
    cells = [tag("td", str(place + 1), class_="number", data_value=str(place))]
    cells += [_cell(column, row, text) for column, text in zip(columns, line, strict=True)]
    kept = "kept" if row.scheme is None else None
    return tag("tr", cells, id=f"row-{place}", class_=kept)


def _cell(column: Column, row: LayerReport, text: str) -> Markup:
    if column.title == "name":
        return tag("th", _breakable(text), scope="row", class_="name")
    if column.figure is None:
        return tag("td", text, class_="fate" if column.title == "fate" else None)
    value = column.figure(row)
    graded = value is not None and column.title in _GRADED
    style = f"number {grade(value)}" if graded and value is not None else "number"
    return tag("td", text, class_=style, data_value=_sorted_by(value))


def _breakable(name: str) -> list[Child]:
    """Return a dotted name that is broken between its parts, where it has to be."""
    *parents, last = name.split(".")
    return [*([f"{parent}.", tag("wbr")] for parent in parents), last]


def _sorted_by(value: float | None) -> str | None:
    """Return a figure as a script reads it; what is not finite as the least."""
    if value is None:
        return None
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return "-Infinity" if math.isnan(value) else repr(value)
