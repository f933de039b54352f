"""What is done where nothing was said: low widths, small layers, groups that do not divide."""

from collections.abc import Callable
from typing import ClassVar

import attrs
import pytest
from torch import Tensor, nn

from mono_quant import (
    Activations,
    Affine,
    MinMax,
    OutlierColumns,
    QuantizedModule,
    Quantizer,
)
from mono_quant.layers import LinearQuantizer
from tests.helpers import fates, layer_rows, noise, three_layers

Call = Callable[[Quantizer], Quantizer]


class Language(nn.Module):
    """An embedding, a large and a small layer, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 64)
        self.bags = nn.EmbeddingBag(50, 64)
        self.large = nn.Linear(64, 64)
        self.just = nn.Linear(64, 8)
        self.small = nn.Linear(73, 7)
        self.norm = nn.LayerNorm(64)


EMBEDDING = "float: embeddings stay float below 8 bits unless asked for"
SMALL = "float: fewer than 512 values, below 8 bits unless asked for"


@pytest.mark.parametrize("bits", range(2, 8))
def test_below_8_bits_embeddings_and_small_layers_stay_float(bits: int) -> None:
    grid = f"{bits}-bit asymmetric per-group 64"
    assert fates(Quantizer().bits(bits), Language()) == {
        "words.weight": EMBEDDING,
        "bags.weight": EMBEDDING,
        "large.weight": grid,
        "just.weight": grid,  # 512 values
        "small.weight": SMALL,  # 511
    }


@pytest.mark.parametrize("quantizer", [Quantizer(), Quantizer().bits(8), Quantizer().bits(16)])
def test_from_8_bits_on_nothing_stays_float_by_default(quantizer: Quantizer) -> None:
    assert not any(fate.startswith("float:") for fate in fates(quantizer, Language()).values())


def test_a_scheme_of_few_bits_has_the_same_defaults() -> None:
    found = fates(Quantizer().scheme(Affine(4)), Language())
    assert found["words.weight"] == EMBEDDING
    assert found["small.weight"] == SMALL


ASKING: list[Call] = [
    lambda q: q.only("words", "small", "large"),
    lambda q: q.only("*"),
    lambda q: q.only(nn.Embedding, nn.Linear),
    lambda q: q.override("words", bits=4).override("small", bits=4),
    lambda q: q.override("*", symmetric=False),
    lambda q: q.override(lambda name, module: name in {"words", "small"}, bits=4),
]


@pytest.mark.parametrize("place", range(len(ASKING)))
def test_a_layer_that_is_named_is_quantized_at_any_width(place: int) -> None:
    found = fates(ASKING[place](Quantizer().bits(4)), Language())
    assert found["words.weight"] == "4-bit asymmetric per-group 64"
    assert found["small.weight"] == "4-bit asymmetric per-channel"


def test_a_layer_overridden_to_8_bits_is_quantized_at_8_bits() -> None:
    found = fates(Quantizer().bits(4).override("words", bits=8), Language())
    assert found["words.weight"].startswith("8-bit")
    assert found["small.weight"] == SMALL


def test_asking_for_a_layer_does_not_lift_skip() -> None:
    found = fates(Quantizer().bits(4).override("words", bits=8).skip("words"), Language())
    assert found["words.weight"] == "float: skipped"


def test_a_norm_is_known_to_no_quantizer() -> None:
    assert layer_rows(Quantizer().bits(4), Language())["norm"].fate == (
        "float: no quantizer knows a LayerNorm"
    )


def test_a_group_size_that_does_not_divide_leaves_the_layer_float_with_the_reason() -> None:
    found = fates(Quantizer().bits(4).group_size(48), three_layers())
    assert found["0.weight"] == "float: a group of 48 does not divide a row of 128"
    result = Quantizer().bits(4).group_size(48).only("*").apply(three_layers(), progress=False)
    assert type(result.model[0]) is nn.Linear
    assert not result.report.quantized


def test_a_group_size_that_was_not_asked_for_gives_way_to_channels() -> None:
    assert fates(Quantizer().bits(4).only("3"), three_layers())["3.weight"] == (
        "4-bit asymmetric per-channel"
    )


class Speech(nn.Module):
    """A layer and a cell that are recurrent, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.cell, self.head = nn.GRU(8, 16), nn.LSTMCell(16, 16), nn.Linear(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.cell(self.gru(x)[0][-1])[0])
        return found


def input_modes(quantizer: Quantizer, model: nn.Module) -> dict[str, str]:
    """Return what a plan says first of each layer's inputs: of all its weights the same."""
    found: dict[str, set[str]] = {}
    for row in quantizer.plan(model).outline.report.quantized:
        word = (row.activation or "float").partition(" ")[0]
        found.setdefault(row.name.partition(".")[0], set()).add(word)
    return {name: "/".join(sorted(words)) for name, words in found.items()}


CALIBRATED = Quantizer().fit(noise(5, 3, 8))
RECURRENT = ("gru", "cell")


def test_inputs_of_recurrent_layers_are_dynamic_with_data_too_and_the_plan_says_why() -> None:
    model = Speech().eval()
    modes = {"gru": "dynamic", "cell": "dynamic", "head": "static"}
    assert input_modes(CALIBRATED, model) == modes
    (note,) = [one for one in CALIBRATED.plan(model).outline.report.notes if "though" in one]
    assert note.startswith("inputs of gru and 1 more are dynamic though there is data: one ")
    assert 'activations("static")' in note
    result = CALIBRATED.apply(model, progress=False)
    assert note in result.report.notes
    scales: dict[str, set[bool]] = {}
    for name in modes:
        layer = result.model.get_submodule(name)
        assert isinstance(layer, QuantizedModule)
        scales[name] = {one.scale is not None for one in layer.activations().values()}
    assert scales == {"gru": {False}, "cell": {False}, "head": {True}}


SAID = {
    "static": (CALIBRATED.activations("static"), "static"),
    "overridden": (CALIBRATED.override("*", activations=Activations("static")), "static"),
    "observer": (CALIBRATED.observer(activations=MinMax()), "static"),
    "dynamic": (CALIBRATED.activations("dynamic"), "dynamic"),
    "float": (CALIBRATED.activations(None), "float"),
    "outliers": (CALIBRATED.outliers(OutlierColumns(1)), "dynamic"),
    "4 bits": (CALIBRATED.bits(4).only("*"), "float"),
}


@pytest.mark.parametrize("said", SAID)
def test_what_is_said_of_inputs_goes_before_that_default(said: str) -> None:
    quantizer, mode = SAID[said]
    modes = input_modes(quantizer, Speech().eval())
    assert {modes[name] for name in RECURRENT} == {mode}
    assert not any("though" in one for one in quantizer.plan(Speech()).outline.report.notes)


def test_without_data_nothing_is_said_of_it() -> None:
    report = Quantizer().plan(Speech().eval()).outline.report
    assert not any("though" in one for one in report.notes)


@attrs.frozen
class Timid(LinearQuantizer):
    """Somebody's own quantizer, which has that default too."""

    kind: ClassVar[str] = "timid"
    rather_dynamic: ClassVar[str | None] = "it is timid"


def test_a_quantizer_of_ones_own_has_the_same_default_by_a_word() -> None:
    quantizer = CALIBRATED.layer(Timid())
    assert input_modes(quantizer, Speech().eval())["head"] == "dynamic"
    notes = quantizer.plan(Speech().eval()).outline.report.notes
    assert "inputs of head are dynamic though there is data: it is timid" in notes
