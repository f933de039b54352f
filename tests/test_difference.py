"""What changed between two reports."""

import json
import math

import attrs
import pytest
from torch import nn

from mono_quant import LayerReport, Quantizer, Report
from tests.helpers import noise

ONE = LayerReport(
    "one.weight", "Linear", (64, 64), 4096, 16384, 4096, "8-bit", sqnr_db=40.0, output_sqnr_db=35.0
)
TWO = attrs.evolve(ONE, name="two.weight")
NORM = LayerReport("norm", "LayerNorm", (), 128, 512, 512, reason="no quantizer")
BEFORE = Report((ONE, NORM, TWO), output_sqnr_db=30.0, warnings=("old", "both"))
SMALLER = attrs.evolve(ONE, scheme="4-bit", bytes=2304, sqnr_db=20.0, output_sqnr_db=17.5)
AFTER = Report((SMALLER, NORM, TWO), output_sqnr_db=18.0, warnings=("both", "new"))


def test_rows_that_are_alike_are_only_counted() -> None:
    found = BEFORE.diff(AFTER)
    assert [changed.name for changed in found.layers] == ["one.weight"]
    assert found.alike == 2
    (changed,) = found.layers
    assert (changed.before, changed.after) == (ONE, SMALLER)
    assert (changed.bytes, changed.sqnr_db, changed.output_db) == (2304 - 4096, -20.0, -17.5)
    assert found.bytes == (BEFORE.bytes, AFTER.bytes)
    assert found.output_sqnr_db == (30.0, 18.0)
    assert (found.gone, found.new) == (("old",), ("new",))


def test_a_report_does_not_differ_from_itself() -> None:
    found = BEFORE.diff(BEFORE)
    assert found.layers == ()
    assert found.gone == found.new == ()
    assert found.alike == 3
    assert "0 rows differ, 3 alike" in str(found)
    assert "name" not in str(found)


def test_the_way_back_is_the_other_sign() -> None:
    (there,), (back,) = BEFORE.diff(AFTER).layers, AFTER.diff(BEFORE).layers
    assert (back.bytes, back.sqnr_db, back.output_db) == (1792, 20.0, 17.5)
    assert (there.before, there.after) == (back.after, back.before)


def test_rows_that_only_one_report_has_are_named() -> None:
    other = attrs.evolve(AFTER, layers=(NORM, attrs.evolve(ONE, name="three.weight")))
    found = {changed.name: changed for changed in BEFORE.diff(other).layers}
    assert set(found) == {"one.weight", "two.weight", "three.weight"}
    assert (found["three.weight"].before, found["three.weight"].bytes) == (None, 4096)
    assert (found["two.weight"].after, found["two.weight"].bytes) == (None, -4096)
    assert found["two.weight"].sqnr_db is None
    lines = str(BEFORE.diff(other)).splitlines()
    assert any(line.startswith("two.weight") and "8-bit -> -" in line for line in lines)


def test_text_shows_what_was_and_what_is() -> None:
    text = str(BEFORE.diff(AFTER))
    assert text.splitlines()[:5] == [
        "8.70 kB -> 6.91 kB (-20.6%)",
        "output SQNR 30.0 dB -> 18.0 dB",
        "warning gone: old",
        "warning new: new",
        "1 row differs, 2 alike",
    ]
    assert text.splitlines()[-1].split("  ") == [
        "one.weight",
        "8-bit -> 4-bit",
        "8.00 -> 4.50",
        "4.10 kB -> 2.30 kB",
        "40.0 dB -> 20.0 dB",
        "35.0 dB -> 17.5 dB",
    ]


@pytest.mark.parametrize(
    ("before", "after", "gain"),
    [
        (10.0, math.inf, math.inf),
        (math.inf, math.inf, 0.0),
        (math.inf, 10.0, -math.inf),
        (None, 10.0, None),
    ],
)
def test_exact_layers_gain_nothing_more(
    before: float | None, after: float | None, gain: float | None
) -> None:
    one, other = (
        attrs.evolve(ONE, sqnr_db=value, bytes=at) for value, at in ((before, 1), (after, 2))
    )
    (changed,) = Report((one,)).diff(Report((other,))).layers
    assert changed.sqnr_db == gain


def test_everything_is_json_too() -> None:
    found = BEFORE.diff(AFTER)
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert read["bytes"] == list(found.bytes)
    assert read["alike"] == 2
    (row,) = read["layers"]
    assert row["before"]["fate"] == "8-bit"
    assert row["after"]["bits_per_weight"] == 4.5
    assert row["sqnr_db"] == -20.0


def test_two_quantizers_of_one_model() -> None:
    model, data = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), noise(8, 64)
    eight = Quantizer().activations(None).fit(data)
    one = eight.apply(model, progress=False).report
    other = eight.override("1", bits=4).apply(model, progress=False).report
    found = one.diff(other)
    assert [changed.name for changed in found.layers] == ["1.weight"]
    (changed,) = found.layers
    assert changed.after is not None
    assert "4-bit" in (changed.after.scheme or "")
    assert (changed.output_db or 0) < -15
