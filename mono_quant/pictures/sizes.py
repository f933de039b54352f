"""The bytes of a model before and after, as SVG."""

from collections.abc import Sequence

import attrs

from mono_quant.evidence import LayerReport
from mono_quant.pictures.markup import Markup, number, tag
from mono_quant.text import format_bytes

_WIDTH, _BAR, _GAP, _LEFT = 880.0, 26.0, 14.0, 62.0
_ROOM = 110.0
"""For the figure behind a bar."""


@attrs.frozen
class Part:
    """A part of a model's bytes.

    Attributes:
        style: the class that says how it is drawn.
        meaning: what it is.
        before: bytes before.
        after: bytes after.
    """

    style: str
    meaning: str
    before: int
    after: int


def parts_of(rows: Sequence[LayerReport], before: int, after: int) -> tuple[Part, ...]:
    """Return what was quantized, what stays float, and the rest of a model's bytes."""
    quantized = [row for row in rows if row.scheme is not None]
    kept = [row for row in rows if row.scheme is None]
    known = [
        Part(style, meaning, sum(row.float_bytes for row in some), sum(row.bytes for row in some))
        for style, meaning, some in (
            ("quantized", "weights that were quantized", quantized),
            ("float", "parameters that stay float", kept),
        )
    ]
    rest = [max(0, before - sum(one.before for one in known))]
    rest.append(max(0, after - sum(one.after for one in known)))
    found = (*known, Part("other", "buffers, and what was folded into other layers", *rest))
    return tuple(part for part in found if part.before or part.after)


def sizes(parts: Sequence[Part], before: int, after: int, title: str) -> Markup:
    """Return two bars of one scale, before and after, cut into parts."""
    scale = (_WIDTH - _LEFT - _ROOM) / max(before, after, 1)
    drawn: list[Markup] = [tag("title", title)]
    for place, (word, total) in enumerate((("before", before), ("after", after))):
        y, x = place * (_BAR + _GAP), _LEFT
        drawn.append(tag("text", word, x=_LEFT - 8, y=y + 18, class_="label", text_anchor="end"))
        for part in parts:
            count = (part.before, part.after)[place]
            if count:
                told = tag("title", f"{part.meaning}: {format_bytes(count)}")
                width, style = max(1.0, count * scale), f"part {part.style}"
                drawn.append(tag("rect", told, x=x, y=y, width=width, height=_BAR, class_=style))
                x += width
        drawn.append(tag("text", format_bytes(total), x=x + 8, y=y + 18, class_="label"))
    box = f"0 0 {number(_WIDTH)} {number(2 * _BAR + _GAP)}"
    return tag("svg", drawn, viewBox=box, role="img", class_="sizes")


def sizes_legend(parts: Sequence[Part]) -> Markup:
    """Return what the parts are, with the bytes of each before and after."""
    return tag("ul", [_key(part) for part in parts], class_="legend")


def _key(part: Part) -> Markup:
    square = tag("rect", width="12", height="12", class_=f"part {part.style}")
    swatch = tag("svg", square, viewBox="0 0 12 12", class_="swatch square", aria_hidden="true")
    told = f"{part.meaning}: {format_bytes(part.before)} → {format_bytes(part.after)}"
    return tag("li", swatch, told, class_="key")
