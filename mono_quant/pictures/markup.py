"""HTML and SVG from nested calls: whatever is not markup already is escaped."""

import html
import unicodedata
from collections.abc import Sequence


class Markup(str):
    """Text that is HTML, and is not escaped again."""

    __slots__ = ()


Child = str | Sequence["Child"]
"""Text, which is escaped; markup, which is not; or several of these."""

_VOID = frozenset({"meta", "input", "br", "wbr", "path", "rect", "line"})


def tag(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """Return an element.

    Args:
        name: of the element.
        children: what it holds.
        attributes: of a Python name: `class_` is class and `aria_sort` aria-sort. True is an
            attribute without a value; None and False leave it out.
    """
    said = "".join(
        f" {key.rstrip('_').replace('_', '-')}"
        + ("" if value is True else f'="{_attribute(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID and not children:
        return Markup(f"<{name}{said}/>")
    return Markup(f"<{name}{said}>{joined(children)}</{name}>")


def joined(children: Child) -> Markup:
    """Return all of some children, one after the other."""
    if isinstance(children, Markup):
        return children
    if isinstance(children, str):
        return Markup(html.escape(visible(children)))
    return Markup("".join(joined(child) for child in children))


def visible(text: str) -> str:
    """Return text in which nothing is invisible or turns the direction of what follows.

    Names come from strangers: control and format characters, of which a page may hold none or which
    may make a name look like another, are written as escapes, and so are halves of surrogates.
    """
    return "".join(
        one if one == "\n" or unicodedata.category(one) not in ("Cc", "Cf", "Cs") else _escape(one)
        for one in text
    )


def number(value: float) -> str:
    """Return a coordinate with two decimals at most."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _attribute(value: str | float) -> str:
    return html.escape(visible(value)) if isinstance(value, str) else number(value)


def _escape(one: str) -> str:
    return f"\\u{{{ord(one):x}}}"
