"""Modules that read their children by attribute."""

import pytest
from torch import nn

from mono_quant.checkpoint import calling
from mono_quant.layers import (
    BUILT_IN_CONTAINERS,
    MultiheadAttentionContainer,
)
from mono_quant.modules import CallingMultiheadAttention, QuantizedLinear
from tests.helpers import WEIGHTS_ONLY, assert_near, noise, oracle

X = noise(2, 5, 64)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_output_projection_of_attention_is_quantized_and_called(bits: int) -> None:
    source = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    model = WEIGHTS_ONLY.bits(bits).only("out_proj").apply(source).model
    assert isinstance(model, CallingMultiheadAttention)
    assert isinstance(model.out_proj, QuantizedLinear)
    twin = oracle(model, source)
    assert_near(model(X, X, X)[0], twin(X.double(), X.double(), X.double())[0])


def test_an_attention_left_in_float_is_not_adapted() -> None:
    source = nn.ModuleDict({"attention": nn.MultiheadAttention(64, 4), "out": nn.Linear(64, 64)})
    model = WEIGHTS_ONLY.skip("attention").apply(source).model
    assert type(model["attention"]) is nn.MultiheadAttention


def test_a_layer_shared_with_attention_is_one_quantized_layer() -> None:
    attention = nn.MultiheadAttention(64, 4, batch_first=True)
    for modules in ([attention, attention.out_proj], [attention.out_proj, attention]):
        source = nn.ModuleList(modules).eval()
        model = WEIGHTS_ONLY.apply(source).model
        place = modules.index(attention)
        assert model[1 - place] is model[place].out_proj
        assert isinstance(model[1 - place], QuantizedLinear)
        twin = oracle(model, source)
        found = model[place](X, X, X)[0]
        assert_near(found, twin[place](X.double(), X.double(), X.double())[0])
        assert_near(model[1 - place](X), twin[1 - place](X.double()))


def test_a_weight_tied_to_that_of_attention_is_stored_once() -> None:
    attention = nn.MultiheadAttention(64, 4, batch_first=True)
    head = nn.Linear(64, 64, bias=False)
    head.weight = attention.out_proj.weight
    model = WEIGHTS_ONLY.apply(nn.ModuleList([attention, head])).model
    one, other = model.get_submodule("0.out_proj"), model[1]
    assert isinstance(one, QuantizedLinear)
    assert isinstance(other, QuantizedLinear)
    first, second = one.packed_weights()["weight"], other.packed_weights()["weight"]
    assert first.tensors["codes"] is second.tensors["codes"]


def test_containers_know_only_their_own() -> None:
    container = MultiheadAttentionContainer()
    assert not container.matches(nn.Linear(4, 4))
    assert container.refuse_child(nn.MultiheadAttention(4, 1), "out_proj") is None


def test_containers_call_float_layers_for_as_long_as_they_are_watched() -> None:
    block = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = nn.TransformerEncoder(block, 2).eval()

    def state() -> list[object]:
        attentions = [type(model.get_submodule(f"layers.{place}.self_attn")) for place in (0, 1)]
        switches = [bool(layer.activation_relu_or_gelu) for layer in model.layers]
        return [*attentions, *switches, model.use_nested_tensor]

    own = nn.MultiheadAttention
    before: list[object] = [own, own, True, True, True]
    assert state() == before
    with calling(model, BUILT_IN_CONTAINERS, ["layers.0.self_attn.out_proj"]):
        assert state() == [CallingMultiheadAttention, own, False, True, False]
    assert state() == before


def test_what_is_adapted_already_stays_so_after_watching() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, batch_first=True), 1)
    model = WEIGHTS_ONLY.only("*.out_proj").apply(encoder).model
    with calling(model, BUILT_IN_CONTAINERS, ["layers.0.linear1"]):
        pass
    assert type(model.get_submodule("layers.0.self_attn")) is CallingMultiheadAttention
    assert not model.use_nested_tensor
