"""What is done where nothing was said: low widths, small layers, groups that do not divide."""

from collections.abc import Callable

import pytest
from torch import nn

from mono_quant import (
    Affine,
    Quantizer,
)
from tests.helpers import fates, layer_rows, three_layers

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
