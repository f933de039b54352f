"""Weights that share their memory share one fate."""

import pytest
import torch
from torch import Tensor, nn

from mono_quant import (
    ConfigurationError,
    LinearLikeQuantizer,
    QuantizedModule,
    Quantizer,
)
from tests.helpers import (
    TiedModel,
    fates,
    layer_rows,
)
from tests.plan.models import DYNAMIC8, FLOAT8, INDICES8, Raw, Shared, held_bytes, weight_of

SKIPPED = "float: tied to 'head.weight', which stays float: skipped; also head.weight"


@pytest.mark.parametrize(
    ("quantizer", "fate"),
    [
        (
            Quantizer(),
            f"{INDICES8}; dynamic 8-bit asymmetric per-token inputs of head.weight; "
            "also head.weight",
        ),
        (
            Quantizer().bits(4),
            "float: embeddings stay float below 8 bits unless asked for; also head.weight",
        ),
        (
            Quantizer().bits(4).override("head", bits=4),
            "4-bit asymmetric per-group 64; also head.weight",
        ),
        (
            Quantizer().bits(4).override("head", bits=8),
            f"{FLOAT8}; dynamic 8-bit asymmetric per-token inputs of head.weight; also head.weight",
        ),
        (Quantizer().bits(4).override("embedding", bits=8), f"{INDICES8}; also head.weight"),
        (
            Quantizer().bits(4).only("embedding", "head"),
            "4-bit asymmetric per-group 64; also head.weight",
        ),
        (
            Quantizer().override("head", bits=5).override("embedding", bits=5),
            "5-bit asymmetric per-group 64; also head.weight",
        ),
        (Quantizer().skip("head"), SKIPPED),
        (Quantizer().skip("embedding"), "float: skipped; also head.weight"),
        (Quantizer().override("embedding", bits=4).skip("head"), SKIPPED),
        (
            Quantizer().only("embedding"),
            "float: tied to 'head.weight', which stays float: not among only(...); "
            "also head.weight",
        ),
        (
            Quantizer().group_size(48),
            "float: a group of 48 does not divide a row of 64; also head.weight",
        ),
    ],
    ids=lambda value: repr(value) if isinstance(value, Quantizer) else "",
)
def test_tied_weights_share_one_fate(quantizer: Quantizer, fate: str) -> None:
    model = TiedModel()
    found = fates(quantizer, model)
    assert found["embedding.weight"] == fate
    assert "head.weight" not in found
    result = quantizer.apply(model, progress=False)
    embedding, head = result.model.embedding, result.model.head
    assert isinstance(embedding, QuantizedModule) == isinstance(head, QuantizedModule)
    assert isinstance(embedding, QuantizedModule) != fate.startswith("float")
    if isinstance(embedding, QuantizedModule) and isinstance(head, QuantizedModule):
        first, second = embedding.packed_weights()["weight"], head.packed_weights()["weight"]
        assert all(first.tensors[name] is second.tensors[name] for name in first.tensors)
    else:
        assert head.weight is embedding.weight
    assert result.report.bytes == held_bytes(result.model)
    assert result.model(torch.arange(64)).shape == (64, 64)


def test_tied_weights_asked_for_two_things_are_refused() -> None:
    quantizer = Quantizer().override("head", bits=4).override("embedding", bits=8)
    message = "embedding.weight and head.weight are one tied weight, and different things are asked"
    with pytest.raises(ConfigurationError, match=message):
        quantizer.plan(TiedModel())


def test_a_fork_without_the_tie_may_ask_for_two_things() -> None:
    model = TiedModel()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    quantizer = Quantizer().override("head", bits=4).override("embedding", bits=8)
    found = fates(quantizer, model)
    assert found["head.weight"] == "4-bit asymmetric per-group 64"
    assert found["embedding.weight"] == INDICES8


def test_a_weight_tied_to_a_parameter_that_no_layer_reads_stays_float() -> None:
    model = Raw()
    model.direct = model.inner.weight
    rows = layer_rows(Quantizer(), model)
    assert rows["inner.weight"].reason == "tied to 'direct', which no layer quantizer reads"
    report = Quantizer().apply(model, progress=False).report
    assert not report.quantized
    assert report.bytes == held_bytes(model)


def test_parameters_on_one_memory_are_tied_though_they_are_two_objects() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    for layer in (model[1], model[2]):
        layer.register_parameter("weight", nn.Parameter(weight_of(model, "0").detach()))
    assert fates(Quantizer(), model) == {"0.weight": f"{DYNAMIC8}; also 1.weight, 2.weight"}
    result = Quantizer().apply(model, progress=False)
    layers = [layer for layer in result.model if isinstance(layer, QuantizedModule)]
    assert len({id(layer.packed_weights()["weight"].tensors["codes"]) for layer in layers}) == 1
    assert len(layers) == 3


def test_equal_values_in_two_places_are_no_tie() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    copied = nn.Parameter(weight_of(model, "0").detach().clone())
    model[1].register_parameter("weight", copied)
    assert fates(Quantizer().skip("0"), model)["1.weight"] == DYNAMIC8


class Turned(nn.Module):
    """A layer whose weight is ``[in, out]``."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_a_weight_that_two_layers_read_in_two_shapes_stays_float() -> None:
    linear = nn.Linear(64, 64, bias=False)
    model = nn.Sequential(linear, Turned(linear.get_parameter("weight")))
    turned = LinearLikeQuantizer(f"{__name__}.Turned", transposed=True)
    found = fates(Quantizer().layer(turned), model)
    assert found == {
        "0.weight": "float: tied to a layer that reads the weight in another shape; also 1.weight"
    }
    assert fates(Quantizer().layer(turned), nn.Sequential(model[1])) == {"0.weight": DYNAMIC8}


def test_one_layer_under_two_names_is_quantized_once() -> None:
    result = Quantizer().apply(Shared(), progress=False)
    assert [row.name for row in result.report.quantized] == ["one.weight"]
    assert result.model.one is result.model.two
