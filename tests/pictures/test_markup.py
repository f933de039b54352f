"""Markup: what is no markup is escaped, whatever it is."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mono_quant.pictures.markup import Markup, joined, number, tag, visible
from tests.pictures.reading import read


@given(st.text())
def test_any_text_is_read_back_as_text(text: str) -> None:
    (element,) = read(tag("p", text)).children
    assert not isinstance(element, str)
    assert element.text == visible(text)
    assert all(isinstance(child, str) for child in element.children)


@given(st.text())
def test_any_attribute_is_read_back(text: str) -> None:
    (element,) = read(tag("p", title=text)).all("p")
    assert element.attributes == {"title": visible(text)}


@given(st.text())
def test_what_is_shown_has_no_hidden_characters_and_can_be_encoded(text: str) -> None:
    shown = visible(text)
    shown.encode("utf-8")
    hidden = {"Cc", "Cf", "Cs"}
    assert all(one == "\n" or unicodedata.category(one) not in hidden for one in shown)
    assert visible(shown) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain.name_0", "plain.name_0"),
        ("größe.重み", "größe.重み"),
        ("a\u202eb", "a\\u{202e}b"),
        ("\ud800", "\\u{d800}"),
        ("tab\t", "tab\\u{9}"),
    ],
)
def test_hidden_characters_are_written_as_escapes(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_markup_is_not_escaped_again() -> None:
    inner = tag("b", "<")
    assert inner == "<b>&lt;</b>"
    assert tag("p", inner, ["&", [inner]]) == "<p><b>&lt;</b>&amp;<b>&lt;</b></p>"
    assert joined(Markup("<i>")) == "<i>"


def test_attributes_are_named_as_in_python() -> None:
    assert tag("th", aria_sort="none", class_="number", hidden=True, id=None, x=1.5) == (
        '<th aria-sort="none" class="number" hidden x="1.5"></th>'
    )
    assert tag("meta", name="viewport") == '<meta name="viewport"/>'


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1.0, "1"), (100, "100"), (0.125, "0.12"), (-2.5, "-2.5"), (0.0, "0"), (10.004, "10")],
)
def test_coordinates_have_two_decimals_at_most(value: float, shown: str) -> None:
    assert number(value) == shown
