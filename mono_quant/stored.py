"""What files keep of a report, and the report that is read back."""

from collections.abc import Mapping, Sequence

from mono_quant.base import Change
from mono_quant.configurable import Config, Json
from mono_quant.evidence import Distribution, InputReport, LayerReport
from mono_quant.report import Report

LAYERS = "layers"
"""Where the rows are in what is stored; the rest is `Report.summary`."""

_KEPT = (
    "layer",
    "shape",
    "parameters",
    "float_bytes",
    "bytes",
    "scheme",
    "activation",
    "reason",
    "ranges",
    "note",
    "aliases",
    "histogram",
)
_LARGEST = 1e100  # beyond float32, and far from where float64 overflows
_MOST = 1 << 63
_DECIBELS = ("sqnr_db", "estimated_db", "faint_db", "output_sqnr_db", "accumulated_db")


def stored(report: Report) -> Config:
    """Return what files keep of a report, as JSON data: its figures and, in short, its rows.

    Times are not kept, nor what warnings have said already. Histograms are there of the few layers
    that return least.
    """
    return {**report.summary(), LAYERS: [_stored_row(row) for row in report.layers]}


def report_of(found: Config) -> Report:
    """Return the report that `stored` wrote.

    Raises:
        KeyError: something is missing.
        TypeError: something is of another type.
        ValueError: something is no such number.
    """
    rows = tuple(map(_row, _objects(found[LAYERS])))
    changes = (
        Change(_text(one["path"]), _text(one["text"]), done=bool(one["done"]))
        for one in _objects(found.get("changes", ()))
    )
    return Report(
        layers=rows,
        buffer_bytes=_integer(found["bytes"]) - sum(row.bytes for row in rows),
        output_sqnr_db=_decibels(found.get("output_sqnr_db")),
        samples=_integer(found.get("samples", 0)),
        notes=_texts(found.get("notes", ())),
        warnings=_texts(found.get("warnings", ())),
        changes=tuple(changes),
        original_bytes=_integer(found["float_bytes"]),
        class_kept_sqnr_db=_decibels(found.get("class_kept_sqnr_db")),
    )


def _stored_row(row: LayerReport) -> Config:
    """Return a row without what is not known of it."""
    told = row.to_dict()
    kept: dict[str, Json] = {"name": row.name}
    kept |= {name: told[name] for name in _KEPT if told[name]}
    kept |= {name: told[name] for name in (*_DECIBELS, "place") if told[name] is not None}
    if row.output_sqnr_db is not None:
        kept.pop("estimated_db", None)  # what was measured tells more
    if row.output_sqnr_db is not None or not row.loses_faint:
        kept.pop("faint_db", None)
    inputs: list[Config] = [
        {"name": one.name, "low": one.low, "high": one.high, "histogram": one.histogram.to_dict()}
        for one in row.inputs
        if one.histogram is not None
    ]
    return {**kept, "inputs": inputs} if inputs else kept


def _row(found: Config) -> LayerReport:
    inputs = (
        InputReport(
            _text(one["name"]),
            _number(one["low"]),
            _number(one["high"]),
            histogram=_distribution(one["histogram"]),
        )
        for one in _objects(found.get("inputs", ()))
    )
    place = found.get("place")
    return LayerReport(
        name=_text(found["name"]),
        layer=_text(found.get("layer", "")),
        shape=tuple(map(_integer, _items(found.get("shape", ())))),
        parameters=_integer(found.get("parameters", 0)),
        float_bytes=_integer(found.get("float_bytes", 0)),
        bytes=_integer(found.get("bytes", 0)),
        scheme=_text_or_none(found.get("scheme")),
        activation=_text_or_none(found.get("activation")),
        reason=_text_or_none(found.get("reason")),
        sqnr_db=_decibels(found.get("sqnr_db")),
        estimated_db=_decibels(found.get("estimated_db")),
        faint_db=_decibels(found.get("faint_db")),
        output_sqnr_db=_decibels(found.get("output_sqnr_db")),
        accumulated_db=_decibels(found.get("accumulated_db")),
        place=_integer(place) if place is not None else None,
        inputs=tuple(inputs),
        ranges=_texts(found.get("ranges", ())),
        note=_text_or_none(found.get("note")),
        aliases=_texts(found.get("aliases", ())),
        histogram=_distribution(found.get("histogram")),
    )


def _distribution(value: Json) -> Distribution | None:
    if value is None:
        return None
    found = _object(value)
    width = _number(found["width"])
    if not width > 0:
        raise ValueError(f"{width!r} is no width")
    return Distribution(
        _number(found["start"]),
        width,
        tuple(map(_integer, _items(found["counts"]))),
        _integer(found["zeros"]),
        _number(found["low"]),
        _number(found["high"]),
        _ends(found.get("covered")),
        _ends(found.get("typical")),
    )


def _ends(value: Json) -> tuple[float, float] | None:
    if value is None:
        return None
    low, high = map(_number, _items(value))
    return low, high


def _decibels(value: Json) -> float | None:
    """Return a figure that may be written as text, where it is not finite."""
    if value is None:
        return None
    return float(value) if isinstance(value, str) else _number(value)


def _number(value: Json) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    if not -_LARGEST < value < _LARGEST:
        raise ValueError(f"{value!r} is beyond what is measured")
    return value


def _integer(value: Json) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _MOST:
        raise ValueError(f"{value!r} counts nothing")
    return value


def _text(value: Json) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _text_or_none(value: Json) -> str | None:
    return None if value is None else _text(value)


def _texts(value: Json) -> tuple[str, ...]:
    return tuple(map(_text, _items(value)))


def _objects(value: Json) -> tuple[Config, ...]:
    return tuple(map(_object, _items(value)))


def _object(value: Json) -> Config:
    if not isinstance(value, Mapping):
        raise TypeError(f"{value!r} is no object")
    return value


def _items(value: Json) -> Sequence[Json]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{value!r} is no list")
    return value
