"""A reader of pages: elements in a tree, and what a page may not do."""

from collections.abc import Iterator
from html.parser import HTMLParser

import attrs

VOID = {"meta", "input", "br", "wbr", "rect", "path", "line"}


@attrs.define(eq=False)
class Element:
    """An element of a page."""

    name: str
    attributes: dict[str, str | None]
    children: list["Element | str"] = attrs.field(factory=list)

    @property
    def text(self) -> str:
        """All text inside."""
        return "".join(one if isinstance(one, str) else one.text for one in self.children)

    def __iter__(self) -> Iterator["Element"]:
        """Yield it and all elements inside, in their order."""
        yield self
        for child in self.children:
            if isinstance(child, Element):
                yield from child

    def all(self, name: str, style: str | None = None) -> list["Element"]:
        """Return the elements of a name, and of a class if that is given."""
        return [one for one in self if one.name == name and (style is None or style in one.styles)]

    @property
    def styles(self) -> list[str]:
        """Its classes."""
        return (self.attributes.get("class") or "").split()

    def section(self, name: str) -> "Element":
        """Return the section of a class."""
        (found,) = self.all("section", name)
        return found


class _Reader(HTMLParser):
    """Builds the tree; elements must be closed in the order in which they were opened."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, given: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in given}) == len(given), f"an attribute twice in {tag}"
        found = Element(tag, dict(given))
        self.open[-1].children.append(found)
        self.open.append(found)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().name == tag

    def handle_startendtag(self, tag: str, given: list[tuple[str, str | None]]) -> None:
        assert tag in VOID
        self.handle_starttag(tag, given)
        self.handle_endtag(tag)

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def read(page: str) -> Element:
    """Return the elements of a page or a part of one, which is well-formed."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == [reader.root], "an element is not closed"
    return reader.root
