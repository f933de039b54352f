"""Moving a quantized layer to another dtype moves its float rest and the dtype it computes in."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mono_quant import QuantizedLayer
from tests.helpers import TOLERANCES, assert_near, oracle, same_bits, same_tensors
from tests.modules.layers import FLOAT_INPUTS, LAYERS, TAUGHT, cast

Make = Callable[[], tuple[nn.Module, Tensor]]
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def packed(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the tensors of a layer's packed weight."""
    assert isinstance(model, QuantizedLayer)
    tensors = model.packed_weights()["weight"].tensors
    return {name: tensor.clone() for name, tensor in tensors.items()}


@each_layer
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_moving_keeps_codes_and_scales_and_changes_the_output(
    make: Make, bits: int, dtype: torch.dtype
) -> None:
    source, x = make()
    model = FLOAT_INPUTS.bits(bits).apply(source).model
    before, twin = packed(model), oracle(model, source)
    moved = model.to(dtype)
    assert moved is model
    after = packed(model)
    assert all(same_bits(before[name], after[name]) for name in before)
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    narrow = cast(x, dtype)
    expected = twin(cast(narrow, torch.float64))
    assert_near(model(narrow), expected, dtype)


@each_layer
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_half_and_back_loses_nothing_of_the_weight(make: Make, bits: int) -> None:
    source, x = make()
    source._parameters["bias"] = None
    model = TAUGHT.bits(bits).apply(source).model
    before = model(x)
    for there in (torch.float16, torch.bfloat16, torch.float64):
        model.to(there).float()
        assert same_bits(model(x), before)


@each_layer
def test_a_moved_layer_dequantizes_to_the_dtype_it_was_moved_to(make: Make) -> None:
    result = TAUGHT.apply(make()[0])
    result.model.to(torch.bfloat16)
    floats = result.dequantize()
    assert {parameter.dtype for parameter in floats.parameters()} == {torch.bfloat16}


def test_moving_one_layer_of_a_model_moves_only_that() -> None:
    model = TAUGHT.apply(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))).model
    model[1].half()
    assert model[0](torch.randn(1, 64)).dtype == torch.float32
    assert model[1](torch.randn(1, 64).half()).dtype == torch.float16


@each_layer
def test_a_layer_may_be_moved_to_the_meta_device(make: Make) -> None:
    source, x = make()
    model = TAUGHT.apply(source).model
    shape = model(x).shape
    model.to("meta")
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    found = model(x.to("meta"))
    assert found.is_meta
    assert found.shape == shape


@each_layer
def test_training_mode_is_followed_and_changes_nothing(make: Make) -> None:
    source, x = make()
    model = TAUGHT.apply(source.eval()).model
    assert not model.training
    before = model(x)
    model.train()
    assert all(module.training for module in model.modules())
    assert same_bits(model(x), before)
    model.eval()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", [name for name in LAYERS if not name.startswith("embedding")])
def test_gradients_reach_the_input_and_the_bias(name: str) -> None:
    source, x = LAYERS[name]()
    model = TAUGHT.apply(source).model
    twin, wide = oracle(model, source), x.double().requires_grad_()
    x.requires_grad_()
    slope = torch.randn_like(model(x))
    (model(x) * slope).sum().backward()
    (twin(wide) * slope.double()).sum().backward()
    assert x.grad is not None
    assert wide.grad is not None
    assert_near(x.grad, wide.grad)
    for parameter, other in zip(model.parameters(), [twin.bias], strict=True):
        assert parameter.grad is not None
        assert isinstance(other, nn.Parameter)
        assert other.grad is not None
        assert_near(parameter.grad, other.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_of_half_precision_stays_one(dtype: torch.dtype) -> None:
    source = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).to(dtype)
    result = TAUGHT.apply(source)
    assert result.model(torch.randn(2, 64, dtype=dtype)).dtype == dtype
    assert {tensor.dtype for tensor in result.dequantize().parameters()} == {dtype}
    assert not same_tensors(result.dequantize(), source)
