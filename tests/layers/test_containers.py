"""Modules that read their children by attribute."""

import pytest
import torch
from torch import nn

from mono_quant.layers import MultiheadAttentionContainer
from mono_quant.modules import QuantizedLinear
from tests.helpers import WEIGHTS_ONLY

REASON = "MultiheadAttention reads this weight by attribute and never calls the layer"


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_output_projection_of_attention_stays_float_with_the_reason(bits: int) -> None:
    source = nn.ModuleDict({"attention": nn.MultiheadAttention(64, 4), "out": nn.Linear(64, 64)})
    result = WEIGHTS_ONLY.bits(bits).apply(source)
    reasons = {row.name: row.reason for row in result.report.kept}
    assert reasons["attention.out_proj.weight"] == REASON
    assert type(result.model["out"]) is QuantizedLinear


def test_the_output_projection_stays_float_even_when_it_is_asked_for() -> None:
    source = nn.ModuleDict({"attention": nn.MultiheadAttention(64, 4)})
    result = WEIGHTS_ONLY.override("attention.out_proj", bits=4).apply(source)
    assert not result.report.quantized


def test_attention_computes_what_it_did() -> None:
    source = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    model = WEIGHTS_ONLY.apply(source).model
    x = torch.randn(2, 5, 64)
    torch.testing.assert_close(model(x, x, x), source(x, x, x), rtol=0, atol=0)


def test_a_layer_shared_with_attention_stays_float_everywhere() -> None:
    attention = nn.MultiheadAttention(64, 4, batch_first=True)
    source = nn.ModuleList([attention, attention.out_proj]).eval()
    model = WEIGHTS_ONLY.apply(source).model
    assert model[1] is model[0].out_proj
    assert not isinstance(model[1], QuantizedLinear)
    x = torch.randn(2, 5, 64)
    torch.testing.assert_close(model[0](x, x, x), source[0](x, x, x), rtol=0, atol=0)


def test_a_weight_tied_to_that_of_attention_stays_float_too() -> None:
    attention = nn.MultiheadAttention(64, 4, batch_first=True)
    head = nn.Linear(64, 64, bias=False)
    head.weight = attention.out_proj.weight
    model = WEIGHTS_ONLY.apply(nn.ModuleList([attention, head])).model
    assert type(model[1]) is nn.Linear


def test_containers_know_only_their_own() -> None:
    container = MultiheadAttentionContainer()
    assert not container.matches(nn.Linear(4, 4))
    assert container.refuse_child(nn.MultiheadAttention(4, 1), "something") is None
