"""What is drawn along the depth of a model: a figure of each kind for each quantized weight."""

import math
from collections.abc import Sequence

import attrs

from mono_quant.columns import decibels
from mono_quant.evidence import LayerReport

_STEP = 10.0
_SHOWN_STEPS = 7


@attrs.frozen
class Depth:
    """The quantized weights in the order in which the model calls their layers.

    Attributes:
        rows: those of which anything is known.
        places: of each among all rows of the report.
        called: whether the order is that of calls, which data shows; else that of the modules.
        estimated: whether what layers return is an estimate.
    """

    rows: tuple[LayerReport, ...]
    places: tuple[int, ...]
    called: bool
    estimated: bool

    @classmethod
    def of(cls, rows: Sequence[LayerReport], estimated: bool) -> "Depth":
        """Return the depth of a report's rows."""
        known = [(place, row) for place, row in enumerate(rows) if _known(row)]
        called = any(row.place is not None for _, row in known)
        if called:
            known.sort(key=lambda one: (one[1].place is None, one[1].place or 0))
        kept, places = tuple(row for _, row in known), tuple(place for place, _ in known)
        return cls(kept, places, called, estimated)

    @property
    def weights(self) -> list[float | None]:
        """SQNR of each weight, in dB."""
        return [row.sqnr_db for row in self.rows]

    @property
    def layers(self) -> list[float | None]:
        """SQNR of what each layer returns for its float inputs, in dB; estimates without data."""
        if self.estimated:
            return [row.estimated_db for row in self.rows]
        return [row.output_sqnr_db for row in self.rows]

    @property
    def accumulated(self) -> list[float | None]:
        """SQNR of what each layer returns inside the quantized model, in dB."""
        return [row.accumulated_db for row in self.rows]

    @property
    def order(self) -> str:
        """What the order is, in words."""
        return "in the order of their calls" if self.called else "in the order of the modules"

    @property
    def layers_label(self) -> str:
        """What `layers` are, in words."""
        return "what its layer returns (estimated)" if self.estimated else "what its layer returns"

    def told(self, place: int) -> str:
        """Return the name of a weight and its figures."""
        row, mark = self.rows[place], "~" if self.estimated else ""
        figures = {
            "weight": decibels(row.sqnr_db),
            "layer": f"{mark}{shown}" if (shown := decibels(self.layers[place])) else "",
            "in the model": decibels(row.accumulated_db),
        }
        said = ", ".join(f"{name} {figure}" for name, figure in figures.items() if figure)
        return f"{row.name}: {said}"


def finite_only(values: Sequence[float | None]) -> list[float]:
    """Return the values that can be drawn to scale."""
    return [value for value in values if value is not None and math.isfinite(value)]


def decibel_ticks(values: Sequence[float | None]) -> list[float]:
    """Return round decibels from below the smallest value, or zero, to above the largest."""
    known = finite_only(values)
    low, high = min([0.0, *known]), max([_STEP, *known])
    step = _STEP
    while (high - low) / step > _SHOWN_STEPS:
        step *= 2
    first, last = math.floor(low / step), math.ceil(high / step)
    return [place * step for place in range(first, last + 1)]


def _known(row: LayerReport) -> bool:
    figures = (row.sqnr_db, row.estimated_db, row.output_sqnr_db, row.accumulated_db)
    return row.scheme is not None and any(figure is not None for figure in figures)
