"""The pictures of a report by matplotlib, for notebooks and papers."""

from collections.abc import Sequence
from io import BytesIO

from mono_quant.errors import ConfigurationError
from mono_quant.evidence import CRITICAL_DB, GOOD_DB, WARNING_DB, Distribution, LayerReport
from mono_quant.pictures.depth import Depth

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ConfigurationError(
        "plot() draws with matplotlib, which is not installed: pip install matplotlib; "
        "to_html(path) draws without it"
    ) from error

_SHOWN = 3
_NAMED = 16
"""Layers whose names have room."""


class NotebookFigure(Figure):
    """A figure that a notebook shows by itself, without pyplot and what that keeps."""

    def _repr_png_(self) -> bytes:
        held = BytesIO()
        self.savefig(held, format="png", dpi=100)
        return held.getvalue()


def draw(rows: Sequence[LayerReport], output_db: float | None, estimated: bool) -> NotebookFigure:
    """Return the errors along the depth, how they add up, and histograms of the worst layers."""
    depth = Depth.of(rows, estimated)
    accumulated = any(value is not None for value in depth.accumulated)
    worst = sorted((row for row in rows if row.histogram), key=lambda row: row.harm_db)[:_SHOWN]
    heights = [3.0] * (1 + accumulated + bool(worst))
    figure = NotebookFigure(figsize=(10.0, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), max(1, len(worst)))
    first = figure.add_subplot(grid[0, :])
    _layers(first, depth)
    if accumulated:
        _accumulated(figure.add_subplot(grid[1, :]), depth, output_db)
    for place, row in enumerate(worst):
        if row.histogram is not None:
            _histogram(figure.add_subplot(grid[-1, place]), row.name, row.histogram)
    return figure


def _layers(axes: Axes, depth: Depth) -> None:
    axes.set_title("error of each layer")
    axes.plot(_floats(depth.weights), "_", markersize=10, label="the weight itself")
    if any(value is not None for value in depth.layers):
        axes.plot(_floats(depth.layers), "o-", markersize=4, label=depth.layers_label)
    _finish(axes, depth, [])


def _accumulated(axes: Axes, depth: Depth, output_db: float | None) -> None:
    axes.set_title("from input to output")
    axes.plot(_floats(depth.layers), "o", markersize=4, label=depth.layers_label)
    values = [*depth.accumulated, *([output_db] if output_db is not None else [])]
    axes.plot(_floats(values), "s-", markersize=4, label="the same inside the quantized model")
    _finish(axes, depth, ["output"] if output_db is not None else [])


def _finish(axes: Axes, depth: Depth, after: list[str]) -> None:
    for level, word in ((CRITICAL_DB, "critical"), (WARNING_DB, "warning"), (GOOD_DB, "good")):
        axes.axhline(level, color="0.6", linewidth=0.8, linestyle=":")
        axes.annotate(word, (1.0, level), xycoords=("axes fraction", "data"), fontsize=8)
    names = [*(row.name.removesuffix(".weight") for row in depth.rows), *after]
    if len(names) <= _NAMED:
        axes.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize=8)
    axes.set_xlabel(f"{len(depth.rows)} weights, {depth.order}")
    axes.set_ylabel("SQNR, dB")
    axes.legend(fontsize=8)


def _histogram(axes: Axes, name: str, found: Distribution) -> None:
    axes.set_title(name, fontsize=9)
    starts = [found.start + place * found.width for place in range(len(found.counts))]
    axes.bar(starts, found.counts, width=found.width, align="edge", color="0.35")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.8)
    for ends, shade in ((found.covered, 0.15), (found.typical, 0.25)):
        if ends is not None:
            axes.axvspan(*ends, color="tab:blue", alpha=shade, linewidth=0)


def _floats(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]
