"""Weights that torch.nn.utils.parametrizations computes from others."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from mono_quant import Quantizer, load_model
from mono_quant.modules import QuantizedConv2d, QuantizedLinear
from tests.helpers import WEIGHTS_ONLY, assert_like_float, same_tensors

Parametrize = Callable[[nn.Module], nn.Module]
KINDS: dict[str, Parametrize] = {
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "orthogonal": orthogonal,
}


class Stretch(nn.Module):
    """A parametrization of our own."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(factor))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        factor = self.get_buffer("factor")
        return weight * factor


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_parametrized_weight_is_quantized_as_it_reads_in_eval(
    kind: Parametrize, bits: int, training: bool
) -> None:
    source = nn.Sequential(kind(nn.Linear(64, 12)), nn.ReLU(), kind(nn.Linear(12, 8)))
    source.train(training)
    before = copy.deepcopy(source)
    model = WEIGHTS_ONLY.bits(bits).only("*").apply(source).model
    assert type(model[0]) is type(model[2]) is QuantizedLinear
    assert_like_float(model, before, torch.randn(5, 64))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_spectral_norm_in_training_is_read_as_eval_would(in_place: bool) -> None:
    """Else the reading itself would step its power iteration, and the weight would be another."""
    source = spectral_norm(nn.Linear(64, 12))
    with torch.no_grad():
        source.get_parameter("parametrizations.weight.original").normal_()
    before = copy.deepcopy(source)
    quantizer = Quantizer().bits(16)
    model = (quantizer.apply_ if in_place else quantizer.apply)(source.train()).model
    assert model.training
    assert_like_float(model, before, torch.randn(5, 64))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_source_and_its_buffers_are_not_touched(kind: Parametrize, training: bool) -> None:
    source = nn.Sequential(kind(nn.Linear(64, 12))).train(training)
    before = copy.deepcopy(source)
    result = WEIGHTS_ONLY.apply(source)
    result.model(torch.randn(5, 64))
    assert same_tensors(source, before)
    assert parametrize.is_parametrized(source[0], "weight")
    assert source.training is training
    assert result.model.training is training


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_nothing_of_the_parametrization_is_left(kind: Parametrize) -> None:
    model = WEIGHTS_ONLY.apply(kind(nn.Linear(64, 12))).model
    assert type(model) is QuantizedLinear
    assert [name for name, _ in model.named_parameters()] == ["bias"]
    assert not parametrize.is_parametrized(model)


def test_a_parametrized_convolution_is_quantized() -> None:
    source = weight_norm(nn.Conv2d(8, 12, 3, groups=2)).eval()
    model = WEIGHTS_ONLY.apply(source).model
    assert type(model) is QuantizedConv2d
    assert_like_float(model, source, torch.randn(2, 8, 6, 6))


def test_two_parametrizations_on_one_weight_are_both_applied() -> None:
    source = weight_norm(nn.Linear(64, 12))
    parametrize.register_parametrization(source, "weight", Stretch(3.0))
    assert_like_float(WEIGHTS_ONLY.apply(source).model, source, torch.randn(5, 64))


@pytest.mark.parametrize("make", [weight_norm, nn.Sequential], ids=["both", "bias alone"])
def test_a_parametrized_bias_is_refused_with_the_reason(make: Parametrize) -> None:
    layer = nn.Linear(64, 12)
    make(layer)
    parametrize.register_parametrization(layer, "bias", Stretch(3.0))
    result = WEIGHTS_ONLY.apply(nn.Sequential(layer, nn.Linear(12, 12)))
    assert parametrize.is_parametrized(result.model[0], "bias")
    reasons = {row.reason for row in result.report.kept}
    assert "it also has a parametrized bias" in reasons


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_in_place_gives_the_same_weights(kind: Parametrize) -> None:
    source = nn.Sequential(kind(nn.Linear(64, 12))).eval()
    twin = copy.deepcopy(source)
    apart = WEIGHTS_ONLY.apply(source).model
    in_place = WEIGHTS_ONLY.apply_(twin).model
    assert in_place is twin
    assert same_tensors(apart, in_place)


def test_a_file_fits_a_parametrized_and_a_plain_skeleton(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    result = WEIGHTS_ONLY.apply(nn.Sequential(weight_norm(nn.Linear(64, 12))))
    result.save(path)
    for layer in (nn.Linear(64, 12), weight_norm(nn.Linear(64, 12))):
        skeleton = nn.Sequential(layer)
        assert same_tensors(load_model(path, skeleton), result.model)


def test_shared_parametrizations_are_computed_for_each_layer() -> None:
    """Two layers that share the tensor under their parametrizations still differ by these."""
    one, other = nn.Linear(64, 64), nn.Linear(64, 64)
    other.weight = one.weight
    parametrize.register_parametrization(one, "weight", Stretch(2.0))
    parametrize.register_parametrization(other, "weight", Stretch(5.0))
    source = nn.Sequential(one, other)
    assert_like_float(WEIGHTS_ONLY.apply(source).model, source, torch.randn(5, 64))
