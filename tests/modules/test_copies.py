"""Quantized layers are copied, pickled, saved and loaded as any module is."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mono_quant import QuantizedLayer
from tests.helpers import quantized, same_bits, same_tensors
from tests.modules.layers import LAYERS, TAUGHT, PadsFirst

Make = Callable[[], tuple[nn.Module, Tensor]]
Again = Callable[[nn.Module], nn.Module]


def pickled(model: nn.Module) -> nn.Module:
    again: nn.Module = pickle.loads(pickle.dumps(model))
    return again


def saved(model: nn.Module) -> nn.Module:
    file = BytesIO()
    torch.save(model, file)
    file.seek(0)
    again: nn.Module = torch.load(file, weights_only=False)
    return again


AGAIN: dict[str, Again] = {"deepcopy": copy.deepcopy, "pickle": pickled, "torch.save": saved}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
each_again = pytest.mark.parametrize("again", AGAIN.values(), ids=AGAIN)


@each_layer
@each_again
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_copy_computes_the_same_and_shares_nothing(make: Make, again: Again, bits: int) -> None:
    source, x = make()
    model = TAUGHT.bits(bits).apply(source).model
    other = again(model)
    assert type(other) is type(model)
    assert isinstance(other, type(source))
    assert same_tensors(other, model)
    assert same_bits(other(x), model(x))
    ours = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert ours.isdisjoint(tensor.data_ptr() for tensor in other.state_dict().values())


@each_layer
@each_again
def test_a_copy_dequantizes_as_the_original_does(make: Make, again: Again) -> None:
    source, _ = make()
    model = TAUGHT.apply(source).model
    other = again(model)
    assert isinstance(model, QuantizedLayer)
    assert isinstance(other, QuantizedLayer)
    one, two = model.dequantize(), other.dequantize()
    assert type(one) is type(two) is type(source)
    assert same_tensors(one, two)


def test_a_layer_of_a_made_up_class_opens_in_a_fresh_process(tmp_path: Path) -> None:
    source, x = LAYERS["own forward"]()
    model = TAUGHT.apply(source).model
    path = tmp_path / "layer.pickle"
    path.write_bytes(pickle.dumps((model, x, model(x).detach())))
    code = (
        "import pickle, sys, torch\n"
        "model, x, expected = pickle.load(open(sys.argv[1], 'rb'))\n"
        "assert torch.equal(model(x), expected)\n"
        "print(type(model).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.strip() == "QuantizedPadsFirst"


def test_classes_made_of_one_class_are_one_class() -> None:
    first, second = (TAUGHT.apply(PadsFirst(8, 12, 3)).model for _ in range(2))
    assert type(first) is type(second)


@each_layer
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_state_dict_goes_into_another_quantized_layer(make: Make, bits: int) -> None:
    source, x = make()
    quantizer = TAUGHT.bits(bits)
    model, other = quantizer.apply(source).model, quantizer.apply(make()[0]).model
    assert not same_tensors(model, other)
    other.load_state_dict(model.state_dict(), strict=True)
    assert same_tensors(model, other)
    assert same_bits(model(x), other(x))


@each_layer
def test_a_state_dict_holds_codes_scales_and_the_rest(make: Make) -> None:
    source, _ = make()
    model = TAUGHT.apply(source).model
    names = {"quantized_weights.weight.codes", "quantized_weights.weight.scale"}
    if source.state_dict().keys() & {"bias"}:
        names.add("bias")
    assert set(model.state_dict()) == names


def test_codes_of_another_dtype_are_refused() -> None:
    model = quantized(nn.Linear(16, 4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    codes = "quantized_weights.weight.codes"
    with pytest.raises(RuntimeError, match=rf"{codes} is torch.uint8, where torch.int8"):
        model.load_state_dict({**before, codes: before[codes].view(torch.uint8)})
    assert all(same_bits(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_float_state_dict_is_refused() -> None:
    model = TAUGHT.apply(nn.Linear(64, 12)).model
    with pytest.raises(RuntimeError, match=r"quantized_weights\.weight\.codes"):
        model.load_state_dict(nn.Linear(64, 12).state_dict())


@each_layer
def test_parameters_are_the_float_ones_and_buffers_the_codes(make: Make) -> None:
    source, _ = make()
    model = TAUGHT.bits(4).apply(source).model
    expected = [name for name, _ in source.named_parameters() if name != "weight"]
    assert [name for name, _ in model.named_parameters()] == expected
    persistent = {name for name in model.state_dict() if name not in expected}
    assert persistent == {
        f"quantized_weights.weight.{name}" for name in ("codes", "scale", "zero_point")
    }
    assert persistent <= {name for name, _ in model.named_buffers()}


@each_layer
def test_dequantized_parameters_keep_their_order(make: Make) -> None:
    source, _ = make()
    floats = TAUGHT.apply(source).dequantize()
    assert [name for name, _ in floats.named_parameters()] == [
        name for name, _ in source.named_parameters()
    ]


@pytest.mark.filterwarnings("ignore::mono_quant.SlowPathWarning")
@each_layer
def test_a_float_weight_cannot_be_put_over_the_quantized_one(make: Make) -> None:
    """It would be ignored in silence."""
    model = TAUGHT.apply(make()[0]).model
    with pytest.raises((KeyError, AttributeError), match="weight"):
        model.weight = nn.Parameter(torch.randn(3))


@each_layer
def test_the_result_is_an_instance_of_the_float_class(make: Make) -> None:
    source, _ = make()
    model = TAUGHT.apply(source).model
    assert isinstance(model, type(source))
    assert isinstance(model, QuantizedLayer)


@each_layer
def test_the_repr_says_what_the_weight_is(make: Make) -> None:
    source, _ = make()
    model = TAUGHT.bits(4).apply(source).model
    assert type(model).__name__ == f"Quantized{type(source).__name__}" or "LinearLike" in repr(
        model
    )
    assert "bits=4" in repr(model)


def test_hooks_and_attributes_of_the_layer_are_kept() -> None:
    source = nn.Linear(64, 12)
    calls: list[str] = []
    source.register_forward_hook(lambda *_: calls.append("hook"))
    source.__dict__["remark"] = "the first"
    model = TAUGHT.apply(source).model
    model(torch.randn(1, 64))
    assert calls == ["hook"]
    assert vars(model)["remark"] == "the first"


def test_scales_that_had_to_be_wider_survive_a_state_dict() -> None:
    """Their dtype goes with them: in float16 these scales are zero."""
    small, usual = nn.Linear(64, 64), nn.Linear(64, 64)
    with torch.no_grad():
        small.weight *= 1e-7
    model, other = TAUGHT.apply(small).model, TAUGHT.apply(usual).model
    other.load_state_dict(model.state_dict())
    assert same_tensors(other, model)
    assert isinstance(other, QuantizedLayer)
    weight = other.packed_weights()["weight"].dequantize()
    assert float(weight.abs().max()) == pytest.approx(
        float(small.weight.detach().abs().max()), rel=1e-2
    )
