"""Quantized recurrent layers as modules: memory, moves, copies, files, and the way back."""

import copy
import io
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from mono_quant import Quantizer, SlowPathWarning, dequantize_model, load_model
from mono_quant.modules import QuantizedGRU, QuantizedLSTM, QuantizedRecurrent
from tests.helpers import assert_near, same_bits, same_tensors
from tests.layers.recurrences import KINDS, LAYERS, UNITS, WIDTH, decoded, recurrent

Make = Callable[[], nn.RNNBase]
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
each_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
each_mode = pytest.mark.parametrize("mode", [None, "dynamic", "static"])
# The float layer says it too.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


class Own(nn.LSTM):
    """Has a forward of its own."""

    def forward(self, input, hx=None):  # type: ignore[no-untyped-def]  # as people write it
        return super().forward(2 * input, hx)


class Plain(nn.GRU):
    """A subclass without a forward of its own."""


class Pair(nn.Module):
    """Two LSTMs that share the weights of their inputs, and of h across directions."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.LSTM(WIDTH, UNITS)
        self.two = nn.LSTM(WIDTH, UNITS, bidirectional=True)
        self.two.weight_ih_l0 = self.one.weight_ih_l0
        self.two.weight_hh_l0_reverse = self.two.weight_hh_l0

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.one(x)[0], self.two(x)[0]
        return torch.cat((one, two), -1)


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(x)[0]
    return found


@each_layer
def test_no_float_weight_is_held_any_more(make: Make) -> None:
    source = make()
    watched = [weakref.ref(parameter) for parameter in source.parameters()]
    sizes = [parameter.numel() for parameter in source.parameters() if parameter.dim() == 2]
    Quantizer().only("*").apply_(source)
    assert isinstance(source, QuantizedRecurrent)
    alive = [one() for one in watched]
    assert sum(one is not None and one.dim() == 2 for one in alive) == 0
    held = sum(
        one.numel() * one.element_size() for one in (*source.parameters(), *source.buffers())
    )
    biases = sum(4 * parameter.numel() for parameter in source.parameters())
    scales = sum(2 * packed.layout.stack[1] for packed in source.packed_weights().values())
    assert held == sum(sizes) + biases + scales
    known = [one for one in source._flat_weights if one is not None]
    assert all(one.dim() == 1 for one in known)


@each_layer
@each_mode
def test_copies_and_pickles_compute_the_same_twice_over(make: Make, mode: str | None) -> None:
    x = torch.randn(4, 5, WIDTH)
    quantizer = Quantizer().activations(mode)
    model = recurrent(make(), quantizer.fit(x) if mode == "static" else quantizer)
    before = output(model, x)
    for _ in range(2):
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        for other in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
            assert type(other) is type(model)
            assert same_bits(output(other, x), before)
        model = other


@each_layer
def test_a_move_changes_the_float_rest_and_no_code(make: Make) -> None:
    source = make()
    model = recurrent(source)
    x = torch.randn(4, 5, WIDTH)
    twin, before = decoded(model, source), copy.deepcopy(model)
    assert model.to(torch.float64) is model
    assert_near(output(model, x.double()), output(twin, x.double()))
    assert all(parameter.dtype == torch.float64 for parameter in model.parameters())
    assert same_tensors(model.float(), before)


@each_layer
@each_mode
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_layer_comes_back_from_a_file(
    make: Make, mode: str | None, suffix: str, tmp_path: Path
) -> None:
    x = torch.randn(4, 5, WIDTH)
    quantizer = Quantizer().activations(mode).only("*")
    result = (quantizer.fit(x) if mode == "static" else quantizer).apply(make())
    path = result.save(tmp_path / f"model.{suffix}")
    with torch.device("meta"):
        skeleton = make()
    for fresh in (make(), skeleton):
        loaded = load_model(path, fresh)
        assert same_tensors(loaded, result.model)
        assert same_bits(output(loaded, x), output(result.model, x))
    other = Quantizer().activations(mode).only("*").fit(x).apply(make()).model
    other.load_state_dict(result.model.state_dict())
    assert same_bits(output(other, x), output(result.model, x))


@each_layer
def test_dequantizing_gives_a_working_float_layer_back(make: Make) -> None:
    source = make()
    model = recurrent(source)
    twin, x = decoded(model, source), torch.randn(4, 5, WIDTH)
    floats = model.dequantize()
    assert floats is model
    assert type(floats) is type(source)
    assert isinstance(floats, nn.RNNBase)
    assert list(floats.state_dict()) == list(source.state_dict())
    named = [floats.get_parameter(name) for name in floats._flat_weights_names]
    assert all(one is other for one, other in zip(floats._flat_weights, named, strict=True))
    assert_near(output(floats, x), output(twin, x.double()))
    assert_near(output(copy.deepcopy(floats).double(), x.double()), output(twin, x.double()))


@each_kind
def test_a_weight_read_by_attribute_is_a_decoded_copy_with_a_warning(
    make: Callable[..., nn.RNNBase],
) -> None:
    source = make(WIDTH, UNITS)
    model = recurrent(source)
    with pytest.warns(SlowPathWarning, match=r"Quantized\w+ was read by attribute") as seen:
        weight = model.weight_ih_l0
    assert seen[0].filename == __file__
    twin = decoded(model, source)
    assert isinstance(weight, Tensor)
    assert torch.equal(weight.double(), twin.get_parameter("weight_ih_l0"))
    with pytest.warns(SlowPathWarning):
        every = model.all_weights
    assert [[one.shape for one in some] for some in every] == [
        [one.shape for one in some] for some in source.all_weights
    ]
    with pytest.raises(AttributeError, match="weight_ih_l1"):
        assert model.weight_ih_l1


def test_a_bias_can_be_replaced() -> None:
    source = nn.LSTM(WIDTH, UNITS)
    model, x = recurrent(source), torch.randn(4, 5, WIDTH)
    source.bias_hh_l0 = model.bias_hh_l0 = nn.Parameter(torch.randn(4 * UNITS))
    assert_near(output(model, x), output(decoded(model, source), x.double()))


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    source, x = Pair(), torch.randn(4, 5, WIDTH)
    result = Quantizer().activations(None).only("*").apply(source)
    one, two = result.model.one, result.model.two
    assert isinstance(one, QuantizedLSTM)
    assert isinstance(two, QuantizedLSTM)
    assert one.quantized_weights["weight_ih_l0"] is two.quantized_weights["weight_ih_l0"]
    assert two.quantized_weights["weight_hh_l0"] is two.quantized_weights["weight_hh_l0_reverse"]
    assert one.quantized_weights["weight_hh_l0"] is not two.quantized_weights["weight_hh_l0"]
    loaded = load_model(result.save(tmp_path / "model.safetensors"), Pair())
    again = loaded.one
    assert isinstance(again, QuantizedLSTM)
    assert isinstance(loaded.two, QuantizedLSTM)
    assert again.quantized_weights["weight_ih_l0"] is loaded.two.quantized_weights["weight_ih_l0"]
    expected = result.model(x)
    assert same_bits(loaded(x), expected)
    floats = dequantize_model(loaded)
    assert floats.two.weight_ih_l0 is floats.one.weight_ih_l0
    assert floats.two.weight_hh_l0 is floats.two.weight_hh_l0_reverse
    torch.testing.assert_close(floats(x), expected)


def test_a_subclass_without_a_forward_is_quantized_and_stays_one() -> None:
    source = Plain(WIDTH, UNITS)
    model, x = recurrent(source), torch.randn(4, 5, WIDTH)
    assert {Plain, QuantizedGRU} <= set(type(model).__mro__)
    assert_near(output(model, x), output(decoded(model, source), x.double()))
    assert same_bits(output(copy.deepcopy(model), x), output(model, x))


def test_a_subclass_with_a_forward_of_its_own_stays_float_with_the_reason() -> None:
    result = Quantizer().apply(nn.Sequential(Own(WIDTH, UNITS)))
    assert type(result.model[0]) is Own
    assert {row.reason for row in result.report.kept if row.shape} == {
        "Own is a LSTM with a forward of its own"
    }


def test_a_parametrized_layer_stays_float_with_the_reason() -> None:
    source = nn.LSTM(WIDTH, UNITS)
    parametrizations.weight_norm(source, "weight_hh_l0")
    rows = Quantizer().apply(nn.Sequential(source)).report.kept
    assert all("a weight of it is parametrized" in str(row.reason) for row in rows if row.shape)


def test_a_weight_made_by_an_old_style_hook_stays_float_with_the_reason() -> None:
    with pytest.warns(FutureWarning, match="deprecated"):
        source = nn.utils.weight_norm(nn.LSTM(WIDTH, UNITS), "weight_hh_l0")
    rows = Quantizer().plan(nn.Sequential(source)).outline.report.kept
    assert any("made by a hook" in str(row.reason) for row in rows)


def test_data_parallel_copies_share_the_weights() -> None:
    model = recurrent(nn.LSTM(WIDTH, UNITS))
    replica = model._replicate_for_data_parallel()
    for name, module in model._modules.items():
        replica._modules[name] = module
    for name, parameter in model.named_parameters():
        setattr(replica, name, parameter)
    x = torch.randn(4, 5, WIDTH)
    assert same_bits(output(replica, x), output(model, x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within torch
@pytest.mark.parametrize("name", ["LSTM all of it", "GRU plain", "relu plain"])
@each_mode
def test_a_layer_is_exported_and_runs_under_the_compiler(name: str, mode: str | None) -> None:
    x = torch.randn(4, 5, WIDTH)
    quantizer = Quantizer().activations(mode).only("*")
    result = (quantizer.fit(x) if mode == "static" else quantizer).apply(LAYERS[name]().eval())
    expected = output(result.model, x)
    program = torch.export.export(result.model, (x,))
    torch.testing.assert_close(output(program.module(), x), expected)
    torch.compiler.reset()
    compiled = torch.compile(result.model, backend="eager")
    assert isinstance(compiled, nn.Module)
    torch.testing.assert_close(output(compiled, x), expected)


def test_only_the_weights_count_as_small() -> None:
    """Below 8 bits a small weight of a large layer stays float, and the layer works."""
    source = nn.LSTM(2, 16)
    model = Quantizer().bits(4).apply(nn.Sequential(source)).model[0]
    assert isinstance(model, QuantizedLSTM)
    assert set(model.packed_weights()) == {"weight_hh_l0"}
    x = torch.randn(4, 5, 2)
    assert_near(output(model, x), output(decoded(model, source), x.double()))
    assert set(recurrent(source).packed_weights()) == {"weight_ih_l0", "weight_hh_l0"}
