"""A report as a notebook shows it: compact, and in the notebook's own style."""

from collections.abc import Sequence

from mono_quant.pictures.depth import Depth, decibel_ticks, finite_only
from mono_quant.pictures.markup import Markup, joined, number, tag

_MANY = 12
"""Rows from which on the table is folded away."""
_WIDTH, _HEIGHT, _SLOT = 480.0, 48.0, 12.0
_FEWEST = 4
"""Layers from which on there is something to see."""


def compact(
    head: str,
    lines: Sequence[str],
    depth: Depth,
    columns: Sequence[str],
    cells: Sequence[Sequence[str]],
    below: Sequence[str],
    flow: Sequence[str],
) -> str:
    """Return the sizes, the lines, a small picture of the layers' errors, and the table."""
    table = tag(
        "table",
        tag("thead", tag("tr", [tag("th", column, scope="col") for column in columns])),
        tag("tbody", [tag("tr", [tag("td", cell) for cell in row]) for row in cells]),
    )
    if len(cells) > _MANY:
        table = tag("details", tag("summary", f"{len(cells)} rows"), table)
    return joined(
        [
            tag("p", tag("b", head)),
            tag("ul", [tag("li", line) for line in lines]),
            _spark(depth),
            table,
            [tag("p", line) for line in below],
            tag("pre", "\n".join(flow)) if flow else "",
        ]
    )


def _spark(depth: Depth) -> Markup:
    """Return a bar for each layer, as high as its SQNR; nothing where there is little to see."""
    measured = bool(finite_only(depth.layers))
    known = depth.layers if measured else depth.weights
    values = finite_only(known)
    if len(values) < _FEWEST:
        return Markup("")
    ticks = decibel_ticks(values)
    slot, scale = min(_SLOT, _WIDTH / len(known)), _HEIGHT / ticks[-1]
    bars = "".join(
        f"M{number(place * slot)} {number(_HEIGHT)}v{number(-max(value, 1.0) * scale)}"
        f"h{number(slot * 0.8)}V{number(_HEIGHT)}z"
        for place, value in enumerate(known)
        if value is not None and value < ticks[-1] + 1
    )
    of = depth.layers_label if measured else "the weight itself"
    what = f"SQNR of {of}, {depth.order}: {min(values):.1f} to {max(values):.1f} dB"
    drawn = tag(
        "svg",
        tag("path", d=bars, fill="currentColor", opacity=0.6),
        viewBox=f"0 0 {number(_WIDTH)} {number(_HEIGHT)}",
        width=_WIDTH,
        height=_HEIGHT,
        role="img",
        aria_label=what,
    )
    return tag("figure", drawn, tag("figcaption", what))
