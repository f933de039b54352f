"""Lines and dots over the layers of a model, as SVG."""

import math
from collections.abc import Sequence

import attrs

from mono_quant.evidence import CRITICAL_DB, GOOD_DB, WARNING_DB
from mono_quant.pictures.depth import Depth, decibel_ticks
from mono_quant.pictures.markup import Markup, number, tag

_WIDTH, _HEIGHT = 880.0, 260.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 66.0, 14.0, 36.0
_LETTER = 6.2
"""Width of a letter on the axis."""
_LEAST_LETTERS = 10
_DASHED, _MARK = "weights", 14.0
"""The marks of weights are dashes, so wide that a dot of the same height does not hide them."""
_GRADES = {CRITICAL_DB: "critical", WARNING_DB: "warning", GOOD_DB: "good"}


@attrs.frozen
class Line:
    """One figure of each layer.

    Attributes:
        label: what it is.
        values: in dB; None for a gap.
        style: the class that says how it is drawn: weights, layers or inside.
        joined: whether a line joins the marks.
        last: a value after all layers, of the model's output; None for none.
    """

    label: str
    values: Sequence[float | None]
    style: str
    joined: bool = False
    last: float | None = None


def chart(depth: Depth, lines: Sequence[Line], title: str) -> Markup:
    """Return lines over the layers; each layer's place tells its figures and leads to its row."""
    shown = [value for line in lines for value in (*line.values, line.last)]
    ticks = decibel_ticks(shown)
    after = any(line.last is not None for line in lines)
    frame = _Frame(ticks[0], ticks[-1], len(depth.rows) + after)
    drawn = [
        tag("title", title),
        [frame.tick(tick) for tick in ticks],
        [frame.grade(level, word) for level, word in _GRADES.items() if frame.holds(level)],
        frame.names(depth, after),
        [_places(frame, depth)],
        [_line(frame, line) for line in lines],
    ]
    box = f"0 0 {number(_WIDTH)} {number(_HEIGHT)}"
    # No image, in whose name all within would be lost: there are links.
    return tag("svg", drawn, viewBox=box, role="group", class_="chart")


def legend(lines: Sequence[Line]) -> Markup:
    """Return what the lines are, each beside a piece of it."""
    return tag(
        "ul",
        [tag("li", _swatch(line), line.label, class_="key") for line in lines],
        class_="legend",
    )


@attrs.frozen
class _Frame:
    """Where layers and decibels stand.

    Attributes:
        low: decibels at the bottom.
        high: decibels at the top.
        count: how many places there are from left to right.
    """

    low: float
    high: float
    count: int

    @property
    def slot(self) -> float:
        """Width of a layer's place."""
        return (_WIDTH - _LEFT - _RIGHT) / max(1, self.count)

    def x(self, place: int) -> float:
        """Return the middle of a place."""
        return _LEFT + (place + 0.5) * self.slot

    def y(self, decibels: float) -> float:
        """Return the height of a value; at the ends for what is beyond, not finite or exact."""
        if math.isnan(decibels):
            decibels = self.low
        share = (min(max(decibels, self.low), self.high) - self.low) / (self.high - self.low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)

    def holds(self, decibels: float) -> bool:
        """Return whether a value lies above the bottom, and not above the top."""
        return self.low < decibels <= self.high

    def tick(self, decibels: float) -> list[Markup]:
        """Return a line across with its decibels."""
        y, right = self.y(decibels), _WIDTH - _RIGHT
        label = f"{decibels:.0f} dB" if decibels == self.high else f"{decibels:.0f}"
        return [
            tag("line", x1=_LEFT, x2=right, y1=y, y2=y, class_="grid"),
            tag("text", label, x=_LEFT - 6, y=y + 4, class_="tick", text_anchor="end"),
        ]

    def grade(self, decibels: float, word: str) -> list[Markup]:
        """Return where a grade begins or ends."""
        y, right = self.y(decibels), _WIDTH - _RIGHT
        said = f"above: {word}" if word == "good" else f"below: {word}"
        return [
            tag("line", x1=_LEFT, x2=right, y1=y, y2=y, class_=f"grade {word}"),
            tag("text", word, tag("title", said), x=right + 6, y=y + 4, class_=f"tick {word}"),
        ]

    def names(self, depth: Depth, after: bool) -> list[Markup]:
        """Return the names of the layers where there is room, or else which way is which."""
        y, letters = _HEIGHT - _BOTTOM + 16, int(self.slot / _LETTER)
        ends = [row.name.removesuffix(".weight") for row in depth.rows]
        if letters >= min(_LEAST_LETTERS, max(map(len, ends), default=0)):
            said = [*(_tail(name, letters) for name in ends), *["output"] * after]
            return [
                tag("text", name, x=self.x(place), y=y, class_="tick", text_anchor="middle")
                for place, name in enumerate(said)
            ]
        count = f"{len(depth.rows)} weights, {depth.order}"
        middle, right = (_LEFT + _WIDTH - _RIGHT) / 2, _WIDTH - _RIGHT
        return [
            tag("text", "input", x=_LEFT, y=y, class_="tick"),
            tag("text", count, x=middle, y=y, class_="tick", text_anchor="middle"),
            tag("text", "output", x=right, y=y, class_="tick", text_anchor="end"),
        ]


def _places(frame: _Frame, depth: Depth) -> list[Markup]:
    """Return a column for each layer that tells its figures, a link to its row of the table."""
    return [
        tag(
            "a",
            tag(
                "rect",
                tag("title", depth.told(place)),
                x=frame.x(place) - frame.slot / 2,
                y=_TOP,
                width=frame.slot,
                height=_HEIGHT - _TOP - _BOTTOM,
                class_="place",
            ),
            href=f"#row-{row}",
            tabindex="-1",
            aria_hidden="true",
        )
        for place, row in enumerate(depth.places)
    ]


def _line(frame: _Frame, line: Line) -> list[Markup]:
    """Return the dots of a line, and what joins them; crosses for what is not to scale."""
    values = [*line.values, *([] if line.last is None else [line.last])]
    points = [
        (frame.x(place), frame.y(value), math.isfinite(value))
        for place, value in enumerate(values)
        if value is not None
    ]
    crowd = " many" if frame.slot < _LETTER else ""
    drawn = []
    if line.joined and len(points) > 1:
        path = "L".join(f"{number(x)} {number(y)}" for x, y, _ in points)
        drawn.append(tag("path", d=f"M{path}", class_=f"line {line.style}{crowd}"))
    wide = min(frame.slot, _MARK) if line.style == _DASHED else 0.0
    dots = "".join(
        f"M{number(x - wide / 2)} {number(y)}h{number(wide)}" for x, y, known in points if known
    )
    crosses = "".join(
        f"M{number(x - 3)} {number(y - 3)}l6 6m0-6l-6 6" for x, y, known in points if not known
    )
    drawn += [tag("path", d=dots, class_=f"dots {line.style}{crowd}")] if dots else []
    drawn += [tag("path", d=crosses, class_=f"cross {line.style}")] if crosses else []
    return drawn


def _swatch(line: Line) -> Markup:
    path = tag("path", d="M2 6H22", class_=f"line {line.style}") if line.joined else ""
    wide = _MARK if line.style == _DASHED else 0.0
    dot = tag("path", d=f"M{number(12 - wide / 2)} 6h{number(wide)}", class_=f"dots {line.style}")
    return tag("svg", path, dot, viewBox="0 0 24 12", class_="swatch", aria_hidden="true")


def _tail(name: str, letters: int) -> str:
    """Return the end of a name, which tells layers apart, in so many letters."""
    return name if len(name) <= letters else f"…{name[len(name) - letters + 1 :]}"
