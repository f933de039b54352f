"""Turned inputs: the same function in float, less damage on a grid, a file that comes back."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from mono_quant import (
    GPTQ,
    Change,
    CheckpointError,
    MinMax,
    Quantizer,
    Rotate,
    TransformContext,
    kernels,
    load_model,
    sqnr_db,
)
from mono_quant.base import WITHOUT_DATA
from mono_quant.modules import QuantizedLayer, kernels_run
from mono_quant.transforms import repeat
from mono_quant.transforms.rotated import RotatedLinear
from tests.helpers import noise, same_bits, same_tensors
from tests.transforms.models import on

FOUR = Quantizer().bits(4).activations(None).only("*")


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(64, 256, bias=False), nn.GELU(), nn.Linear(256, 48))
    return made.eval().to(dtype)


def turned(
    model: nn.Module, context: TransformContext = WITHOUT_DATA
) -> tuple[nn.Module, dict[str, Change]]:
    """Return a turned copy of a model, and what was done, by path."""
    twin = copy.deepcopy(model)
    return twin, {change.path: change for change in Rotate().apply(twin, context)}


def refusal(model: nn.Module, path: str, context: TransformContext = WITHOUT_DATA) -> str:
    """Return why a layer of a model is left alone, and see that it is."""
    twin, changes = turned(model, context)
    assert not changes[path].done
    assert not changes[path].edits
    assert type(twin.get_submodule(path)) is type(model.get_submodule(path))
    return changes[path].text


# --- in float ------------------------------------------------------------------------------------


class Attending(nn.Module):
    """Three layers of one input, one that is called twice, and a weight that is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(96, 96) for _ in range(3))
        self.out = nn.Linear(96, 96)
        self.v.weight = nn.Parameter(torch.randn(96, 96).t() / 10)

    def forward(self, x: Tensor) -> Tensor:
        found = functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        result: Tensor = self.out(self.out(found) + x)
        return result


@torch.no_grad()
def test_a_float_model_computes_what_it_did() -> None:
    torch.manual_seed(0)
    model, x = Attending().double().eval(), noise(2, 5, 96).double()
    twin, changes = turned(model)
    assert all(change.done for change in changes.values())
    assert set(changes) == {"q", "k", "v", "out"}
    assert changes["q"].text == "the inputs of 'q' are turned in blocks of 32"
    assert all(isinstance(one, RotatedLinear) for one in twin.children())
    torch.testing.assert_close(twin(x), model(x), rtol=0, atol=1e-12)
    assert not torch.equal(twin.get_parameter("q.weight"), model.get_parameter("q.weight"))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_turned_in_more(dtype: torch.dtype) -> None:
    model, x = mlp(dtype), noise(4, 64).to(dtype)
    twin, _ = turned(model)
    assert twin.get_parameter("0.weight").dtype == dtype
    assert sqnr_db(model(x), twin(x)) > (40 if dtype == torch.bfloat16 else 58)


def test_the_source_keeps_its_weights_and_gradients_are_asked_as_before() -> None:
    model = mlp()
    model.get_parameter("0.weight").requires_grad_(False)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    result = FOUR.transform(Rotate()).apply(model, progress=False)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert type(model[0]) is nn.Linear
    floats = result.dequantize()
    assert isinstance(floats[0], RotatedLinear)
    trained = {name: one.requires_grad for name, one in floats.named_parameters()}
    assert trained == {"0.weight": False, "2.weight": True, "2.bias": True}


# --- what is left alone --------------------------------------------------------------------------


class Reading(nn.Module):
    """Multiplies by the weight of a layer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = functional.linear(self.one(x), self.two.weight)
        return result


class Branching(Reading):
    """Cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e6:
            return x
        result: Tensor = self.two(self.one(x))
        return result


class Peeking(Reading):
    """Cannot be traced, and multiplies by the weight of a layer that it calls as well."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e6:
            return x
        result: Tensor = self.one(x) + functional.linear(x, self.one.weight.data.clone())
        return result


class Own(nn.Linear):
    """A Linear of somebody else's."""


def with_one(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(layer, nn.ReLU()).eval()


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).eval()
    model[1].weight = model[0].weight
    return model


def uncalled() -> nn.Module:
    model = Reading()
    model.register_module("three", nn.Linear(32, 32))
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "few channels": (lambda: with_one(nn.Linear(20, 32)), "0", "20 inputs are no multiple of 16"),
    "another class": (lambda: with_one(Own(32, 32)), "0", "it is a Own"),
    "tied": (tied, "0", "the weight of '0' is also that of '1'"),
    "parametrized": (
        lambda: with_one(parametrizations.weight_norm(nn.Linear(32, 32))),
        "0",
        "it is a ParametrizedLinear",
    ),
    "read by the model": (Reading, "two", "two"),
    "not called": (uncalled, "three", "the model does not call it"),
    "not traced": (Branching, "one", "give some with fit"),
    "a fused layer": (
        lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval(),
        "linear1",
        "'linear1' are not turned",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_turned_is_left_alone_with_the_reason(name: str) -> None:
    make, path, reason = REFUSED[name]
    assert reason in refusal(make(), path)


def test_the_whole_model_has_no_name_in_a_file() -> None:
    (change,) = Rotate().apply(nn.Linear(32, 32))
    assert not change.done
    assert "it is the whole model" in change.text


def test_data_shows_what_cannot_be_traced() -> None:
    torch.manual_seed(0)
    model = Branching().eval()
    twin, changes = turned(model, on(noise(4, 32)))
    assert changes["one"].done
    assert isinstance(twin.get_submodule("two"), RotatedLinear)
    torch.testing.assert_close(twin(noise(4, 32)), model(noise(4, 32)))


def test_what_moves_the_outputs_is_taken_back() -> None:
    torch.manual_seed(0)
    model = Peeking().eval()
    assert "changes the model's outputs" in refusal(model, "one", on(noise(4, 32)))
    assert same_tensors(turned(model, on(noise(4, 32)))[0], model)


def test_a_second_time_nothing_is_turned() -> None:
    once, _ = turned(mlp())
    twice, changes = turned(once)
    assert all("turned already" in change.text for change in changes.values())
    assert same_tensors(once, twice)


def test_layers_that_stay_float_are_not_turned() -> None:
    quantizer = Quantizer().bits(4).only("0").transform(Rotate())
    result = quantizer.apply(mlp(), progress=False)
    assert [change.path for change in result.report.changes] == ["0"]
    assert type(result.model[2]) is nn.Linear


# --- on a grid -----------------------------------------------------------------------------------


def loud() -> Tensor:
    """Return inputs two of whose channels are loud."""
    x = noise(64, 64, seed=2)
    x[:, [5, 40]] *= 30
    return x


@torch.no_grad()
@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_quantized_inputs_with_loud_channels_gain(mode: str) -> None:
    model, x, y = mlp(), loud(), loud().roll(1, 0) * 0.9
    plain = Quantizer().bits(8).activations(mode, bits=6).only("0").fit(x)
    without, found = (
        one.apply(model, progress=False) for one in (plain, plain.transform(Rotate()))
    )
    expected = model[0](y)
    gained = sqnr_db(expected, found.model[0](y)) - sqnr_db(expected, without.model[0](y))
    assert gained > 5


@torch.no_grad()
def test_the_range_of_static_inputs_is_that_of_what_is_turned() -> None:
    model, x = mlp(), loud()
    quantizer = Quantizer().activations("static").observer(activations=MinMax()).only("0").fit(x)
    layer = quantizer.transform(Rotate()).apply(model, progress=False).model[0]
    assert isinstance(layer, QuantizedLayer)
    blocks = RotatedLinear(64, 64, bias=False)
    blocks.weight.copy_(torch.eye(64))
    low, high = torch.aminmax(blocks(x))
    scale = layer.activations()["weight"].scale
    assert scale is not None
    torch.testing.assert_close(scale.flatten()[0], (high - low) / 255)


@torch.no_grad()
def test_weights_with_values_that_stand_out_gain_with_every_rounding() -> None:
    model, x, y = mlp(), noise(256, 64), noise(64, 64, seed=7)
    torch.manual_seed(1)
    for weight in (model.get_parameter("0.weight"), model.get_parameter("2.weight")):
        weight.mul_(torch.where(torch.rand_like(weight) < 0.01, 12.0, 1.0))
    for quantizer in (FOUR, FOUR.rounding(GPTQ()).fit(x)):
        results = [
            one.apply(model, progress=False).model(y)
            for one in (quantizer, quantizer.transform(Rotate()))
        ]
        decibels = [sqnr_db(model(y), one) for one in results]
        assert decibels[1] > decibels[0] + 2


@torch.no_grad()
def test_it_runs_by_the_kernels_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(512, 512)).eval()
    layer = FOUR.transform(Rotate()).apply(wide, progress=False).model
    x = noise(3, 512)
    with kernels_run() as ran:
        found = layer(x)
    assert kernels.KERNELS[-1].name not in ran.values()
    with kernels.use("reference"):
        assert sqnr_db(layer(x), found) > 40


@torch.no_grad()
def test_copies_pickles_and_files_compute_the_same(tmp_path: Path) -> None:
    quantizer = Quantizer().bits(4).activations("static").fit(loud()).only("*")
    result = quantizer.transform(Rotate()).apply(mlp(), progress=False)
    x = loud()
    expected = result.model(x)
    path = result.save(tmp_path / "model.safetensors")
    with torch.device("meta"):
        skeleton = mlp()
    for other in (
        copy.deepcopy(result.model),
        pickle.loads(pickle.dumps(result.model)),
        load_model(path, skeleton),
        load_model(path, mlp()),
    ):
        assert same_bits(other(x), expected)
    assert result.validate()


@torch.no_grad()
@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 3, 64)])
def test_inputs_of_any_leading_shape_are_taken(shape: tuple[int, ...]) -> None:
    model = Quantizer().transform(Rotate()).only("*").apply(mlp(), progress=False).model
    assert model(torch.ones(shape)).shape == (*shape[:-1], 48)


@pytest.mark.parametrize("shape", [(3, 65), (), (128,)])
def test_inputs_that_do_not_fit_are_refused_as_by_a_linear_layer(shape: tuple[int, ...]) -> None:
    twin, _ = turned(mlp())
    quantized = Quantizer().transform(Rotate()).only("*").apply(mlp(), progress=False).model
    for model in (twin, quantized):
        with pytest.raises(RuntimeError):
            model(torch.ones(shape))


def test_speeds_of_layers_that_leave_it_out_say_so() -> None:
    quantizer = Quantizer().transform(Rotate()).only("*")
    told = "speeds of layers are without Rotate, which takes time at each call"
    plan = quantizer.only_if_faster(noise(3, 64), margin=0.0).plan(mlp())
    assert told in plan.explain()
    assert told in plan.measured(progress=False).explain()
    assert told not in quantizer.plan(mlp()).explain()


@torch.no_grad()
def test_codes_flow_around_it() -> None:
    quantizer = Quantizer().activations("static").only("*").fit(loud()).transform(Rotate())
    model, x = mlp(), loud()
    result = quantizer.graph().apply(model, progress=False)
    assert sqnr_db(quantizer.apply(model, progress=False).model(x), result.model(x)) > 30
    assert result.validate()


def test_it_is_traced_and_exported() -> None:
    model = Quantizer().transform(Rotate()).only("*").apply(mlp(), progress=False).model
    x = noise(3, 64)
    with torch.no_grad():
        expected = model(x)
        program = torch.export.export(model, (x,)).module()
        assert sqnr_db(expected, program(x)) > 60
        compiled = torch.compile(model, backend="aot_eager")
        assert sqnr_db(expected, compiled(x)) > 60


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        ({"op": "rotate", "path": "1"}, "it is a GELU"),
        ({"op": "rotate", "path": "3"}, "which the model lacks"),
        ({"op": "rotate", "path": ""}, "which the model lacks"),
        ({"op": "rotate", "path": "0", "size": 3}, "is no change of a model"),
    ],
)
def test_a_file_that_turns_something_else_is_refused(edit: dict[str, object], reason: str) -> None:
    model = mlp()
    with pytest.raises(CheckpointError, match=reason):
        repeat(model, [{"op": "rotate", "path": "2"}, edit])  # type: ignore[list-item]  # as a file may
    assert type(model[2]) is nn.Linear
