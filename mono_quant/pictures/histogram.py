"""How values are spread and what their grid covers, as SVG."""

import math
from collections.abc import Callable

from mono_quant.evidence import Distribution
from mono_quant.pictures.markup import Markup, number, tag

_WIDTH, _HEIGHT = 320.0, 130.0
_SIDE, _TOP, _BOTTOM = 10.0, 8.0, 24.0
_APART = 48.0
"""How far labels keep from each other."""
_STRETCH = 3.0
"""Times the extent of the values that is drawn of a range which reaches far beyond."""


def histogram(found: Distribution, title: str) -> Markup:
    """Return bars on a logarithmic scale, with the range of the grid behind them.

    Values beyond the range, which it cuts off, have another colour.
    """
    left, right = _extent(found)
    scale = (_WIDTH - 2 * _SIDE) / (right - left)

    def x(value: float) -> float:
        return _SIDE + (min(max(value, left), right) - left) * scale

    drawn: list[Markup] = [tag("title", title)]
    for ends, style in ((found.covered, "covered"), (found.typical, "typical")):
        if ends is not None:
            drawn.append(_band(x(ends[0]), x(ends[1]), style))
    bars = {"bar": "", "bar cut": ""}
    most = max([*found.counts, 1])
    for place, count in enumerate(found.counts):
        if count:
            low = found.start + place * found.width
            beyond = found.covered and (
                low >= found.covered[1] or low + found.width <= found.covered[0]
            )
            ends = x(max(low, found.low)), x(min(low + found.width, found.high))
            bars["bar cut" if beyond else "bar"] += _bar(
                *ends, math.log1p(count) / math.log1p(most)
            )
    drawn += [tag("path", d=path, class_=style) for style, path in bars.items() if path]
    for ends, style in ((found.covered, "covered"), (found.typical, "typical")):
        for end in ends or ():
            drawn += _edge(x(end), style)
    base = _HEIGHT - _BOTTOM
    drawn.append(tag("line", x1=_SIDE, x2=_WIDTH - _SIDE, y1=base, y2=base, class_="axis"))
    drawn += _labels(found, x)
    box = f"0 0 {number(_WIDTH)} {number(_HEIGHT)}"
    return tag("svg", drawn, viewBox=box, role="img", class_="histogram")


def told(found: Distribution) -> str:
    """Return the extremes, what the grid covers, and how many values are zero, in words."""
    total = sum(found.counts) + found.zeros
    parts = [f"values {found.low:.3g} to {found.high:.3g}"]
    if found.covered is not None:
        parts.append("grid {:.3g} to {:.3g}".format(*found.covered))
    if found.typical is not None:
        parts.append("of the median block {:.3g} to {:.3g}".format(*found.typical))
    if found.zeros and total:
        parts.append(f"{found.zeros / total:.1%} exactly zero")
    return ", ".join(parts)


def _extent(found: Distribution) -> tuple[float, float]:
    """Return from where to where is drawn: all values, and the range as far as that is sensible."""
    low, high = min(found.low, 0.0), max(found.high, 0.0)
    room = (high - low or 1.0) * _STRETCH
    if found.covered is not None:
        low, high = (
            max(min(low, found.covered[0]), low - room),
            min(max(high, found.covered[1]), high + room),
        )
    return (low, high) if high > low else (low - 1.0, high + 1.0)


def _bar(left: float, right: float, share: float) -> str:
    """Return a bar as a path, a hair wide at least."""
    base, height = _HEIGHT - _BOTTOM, max(1.0, share * (_HEIGHT - _BOTTOM - _TOP))
    width = max(1.0, right - left - 0.5)
    return f"M{number(left)} {number(base)}v{number(-height)}h{number(width)}V{number(base)}z"


def _band(left: float, right: float, style: str) -> Markup:
    height = _HEIGHT - _BOTTOM - _TOP
    return tag("rect", x=left, y=_TOP, width=max(1.0, right - left), height=height, class_=style)


def _edge(x: float, style: str) -> list[Markup]:
    """Return an end of a range, in front of the bars and set off from them."""
    return [
        tag("line", x1=x, x2=x, y1=_TOP, y2=_HEIGHT - _BOTTOM, class_=part)
        for part in ("halo", f"edge {style}")
    ]


def _labels(found: Distribution, x: Callable[[float], float]) -> list[Markup]:
    """Return the extremes and zero below the axis, as far as they have room."""
    ends = [(x(found.low), f"{found.low:.3g}"), (x(found.high), f"{found.high:.3g}")]
    if x(found.high) - x(found.low) < _APART:
        ends = ends[1:]
    if all(abs(x(0.0) - place) > _APART for place, _ in ends):
        ends.append((x(0.0), "0"))
    y = _HEIGHT - _BOTTOM + 15
    return [
        tag(
            "text",
            label,
            x=min(max(place, _SIDE + 14), _WIDTH - _SIDE - 14),
            y=y,
            class_="tick",
            text_anchor="middle",
        )
        for place, label in sorted(ends)
    ]
