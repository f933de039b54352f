"""Layers that share a weight go on sharing it."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mono_quant import QuantizedLayer, Quantizer
from tests.helpers import TiedModel, assert_near, oracle, quantized, same_bits


class Siamese(nn.Module):
    """Uses one layer twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(64, 64)
        self.right = self.left
        self.stack = nn.Sequential(self.left, nn.ReLU(), self.left)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.right(self.stack(x))
        return found


def pickled(model: TiedModel) -> TiedModel:
    again: TiedModel = pickle.loads(pickle.dumps(model))
    return again


def reloaded(model: TiedModel) -> TiedModel:
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    return model


MOVES: dict[str, Callable[[TiedModel], TiedModel]] = {
    "nothing": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "half": lambda model: model.half(),
    "bfloat16 and back": lambda model: model.bfloat16().float(),
    "double": lambda model: model.double(),
    "cpu": lambda model: model.cpu(),
    "meta": lambda model: model.to("meta"),
    "state dict": reloaded,
}


def assert_tied(one: nn.Module, other: nn.Module) -> None:
    """Assert that two layers hold one weight: the same module, so the same tensors."""
    assert isinstance(one, QuantizedLayer)
    assert isinstance(other, QuantizedLayer)
    assert one.quantized_weights["weight"] is other.quantized_weights["weight"]


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_tied_weights_stay_tied(move: Callable[[TiedModel], TiedModel], bits: int) -> None:
    model = move(quantized(TiedModel(), Quantizer().bits(bits)))
    assert_tied(model.embedding, model.head)


def test_tied_layers_compute_on_one_weight() -> None:
    source, x = TiedModel().eval(), torch.arange(64)
    model = quantized(source, Quantizer().bits(4))
    assert_near(model(x), oracle(model, source)(x))


def test_tied_weights_are_kept_once() -> None:
    model = quantized(TiedModel())
    codes = [tensor for name, tensor in model.named_buffers() if name.endswith("codes")]
    assert len(codes) == 2
    assert sum(tensor.numel() for tensor in codes) == 2 * 64 * 64


def test_dequantized_layers_are_tied_again() -> None:
    floats = Quantizer().apply(TiedModel()).dequantize()
    assert floats.head.weight is floats.embedding.weight
    assert isinstance(floats.head.weight, nn.Parameter)


def test_tied_weights_left_in_float_stay_tied() -> None:
    source = TiedModel()
    model = Quantizer().bits(4).skip("head").apply(source).model
    assert model.head.weight is model.embedding.weight
    assert model.head.weight is not source.head.weight


@pytest.mark.parametrize("in_place", [False, True])
def test_a_layer_used_twice_stays_one_layer(in_place: bool) -> None:
    source = Siamese()
    twin, x = copy.deepcopy(source), torch.randn(3, 64)
    quantizer = Quantizer()
    model = (quantizer.apply_ if in_place else quantizer.apply)(source).model
    assert model.left is model.right is model.stack[0] is model.stack[2]
    assert isinstance(model.left, QuantizedLayer)
    assert_near(model(x), oracle(model, twin)(x.double()))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_layer_used_twice_is_copied_once(again: Callable[[Siamese], Siamese]) -> None:
    model = Quantizer().apply(Siamese()).model
    other = again(model)
    assert other.left is other.right is other.stack[0]
    assert other.left is not model.left
    x = torch.randn(3, 64)
    assert same_bits(model(x), other(x))


@pytest.mark.parametrize("bits", [4, 8])
def test_views_of_one_memory_are_tied_as_one_parameter_is(bits: int) -> None:
    """What comes out of a checkpoint: two tensors on one storage."""
    source = TiedModel()
    source.head.weight = nn.Parameter(source.embedding.weight.detach())
    model = quantized(source, Quantizer().bits(bits))
    assert_tied(model.embedding, model.head)


def test_layers_of_equal_but_separate_weights_are_not_tied() -> None:
    source = TiedModel()
    source.head.weight = nn.Parameter(source.embedding.weight.detach().clone())
    model = quantized(source)
    assert isinstance(model.embedding, QuantizedLayer)
    assert isinstance(model.head, QuantizedLayer)
    assert model.embedding.quantized_weights["weight"] is not model.head.quantized_weights["weight"]
