"""Activations that layers compute themselves: when, that nothing changes, and the way back."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mono_quant import (
    BiasCorrection,
    CheckpointError,
    EqualizeLayers,
    QuantizationResult,
    Quantizer,
    load_model,
)
from mono_quant.base import CorrectionContext
from mono_quant.checkpoint import rebuild, to_checkpoint
from mono_quant.flow import integer_flow
from mono_quant.kernels import KERNELS, use
from mono_quant.modules import QuantizedLayer
from mono_quant.numerics.metrics import sqnr_db
from tests.helpers import noise, same_tensors

IN_PLACE: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "relu6": nn.ReLU6,
    "hardtanh": lambda: nn.Hardtanh(-0.3, 0.7),
    "leaky relu": lambda: nn.LeakyReLU(0.3),
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
}

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(24, 37), (5, 24)),
    "conv1d": (lambda: nn.Conv1d(8, 37, 3), (2, 8, 13)),
    "conv2d": (lambda: nn.Conv2d(8, 37, 3), (2, 8, 9, 7)),
    "conv3d": (lambda: nn.Conv3d(3, 5, 2), (2, 3, 5, 4, 5)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(8, 37, 3), (2, 8, 13)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(8, 9, 3, stride=2), (2, 8, 9, 7)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(3, 5, 2), (2, 3, 5, 4, 5)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8, padding="same"), (2, 8, 9, 7)),
    "reflecting": (lambda: nn.Conv2d(8, 9, 3, padding=1, padding_mode="reflect"), (2, 8, 9, 7)),
    "unbatched": (lambda: nn.Conv2d(8, 37, 3), (8, 9, 7)),
}


class Net(nn.Module):
    """Convolutions with every kind of follower."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.relu = nn.ReLU()  # called twice
        self.third = nn.Conv2d(16, 8, 3)
        self.six = nn.ReLU6(inplace=True)
        self.head = nn.Linear(8, 12)
        self.gelu = nn.GELU()
        self.last = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.relu(x + self.relu(self.second(x)))
        x = self.six(self.third(x)).mean((2, 3))
        return functional.relu(self.last(self.gelu(self.head(x))))


IMAGES = noise(4, 3, 12, 12)
FUSED = {"first.2": "first.0", "six": "third"}


def net() -> Net:
    torch.manual_seed(0)
    made = Net().eval()
    made.first[1].get_buffer("running_mean").normal_()
    made.first[1].get_buffer("running_var").uniform_(0.5, 2)
    return made


def static(model: nn.Module, x: Tensor) -> QuantizationResult[nn.Module]:
    """Return a model with calibrated inputs."""
    return Quantizer().activations("static").fit([x]).apply(model, progress=False)


def applied(model: nn.Module) -> dict[str, str]:
    return dict(to_checkpoint(model).applied)


def apart(model: nn.Module) -> nn.Module:
    """Return a copy whose activations are modules of their own again."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, QuantizedLayer):
            module.give_back()
    return twin


@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("kernel", sorted({kernel.name for kernel in KERNELS}))
@pytest.mark.parametrize("name", IN_PLACE)
def test_values_are_those_of_the_activation_after_the_layer(
    name: str, kernel: str, mode: str
) -> None:
    model = nn.Sequential(nn.Linear(64, 33), IN_PLACE[name](), nn.Linear(33, 4)).eval()
    x = 3 * noise(7, 64)
    quantizer = Quantizer().activations(mode).fit([x])
    with use(kernel):
        found = quantizer.apply(model, progress=False).model
        layer, other = found[0], quantizer.fold(False).apply(model, progress=False).model
        assert applied(found) == {"1": "0"}
        assert isinstance(other[0], QuantizedLayer)
        assert other[0].stand_in is None
        expected = model[1](other[0](x))  # the float model's own module
        assert torch.equal(layer(x), expected)
        assert torch.equal(found(x), other(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_that_multiplies_computes_its_activation(name: str, dtype: torch.dtype) -> None:
    make, shape = LAYERS[name]
    model = nn.Sequential(make(), nn.Hardtanh(-0.123, 0.345)).to(dtype).eval()
    x = noise(*shape).to(dtype)
    found = static(model, x).model
    assert applied(found) == {"1": "0"}
    assert torch.equal(found(x), apart(found)(x))
    assert found(x).min() == torch.tensor(-0.123, dtype=dtype)


def test_only_what_alone_follows_a_layer_is_fused() -> None:
    result = static(net(), IMAGES)
    assert applied(result.model) == FUSED
    assert type(result.model.get_submodule("first.2")) is nn.Identity
    assert type(result.model.get_submodule("relu")) is nn.ReLU
    assert type(result.model.get_submodule("gelu")) is nn.GELU
    said = [change.text for change in result.report.changes]
    assert "six (ReLU6) is computed by third, in place" in said
    assert torch.equal(result.model(IMAGES), apart(result.model)(IMAGES))


def test_the_float_model_stays_as_it_is() -> None:
    model = net()
    before = str(model)
    static(model, IMAGES)
    assert str(model) == before
    assert model.six.inplace


def test_fold_false_leaves_them_apart() -> None:
    found = Quantizer().activations("static").fold(False).fit([IMAGES]).apply(net(), progress=False)
    assert applied(found.model) == {}
    assert found.report.changes == ()


def test_float_inputs_leave_them_apart() -> None:
    quantizer = Quantizer().activations("static").fit([IMAGES]).fold()
    found = quantizer.override("third", activations="float").apply(net(), progress=False)
    assert applied(found.model) == {"first.2": "first.0"}


def test_a_model_changed_in_place_has_them_fused_too() -> None:
    kept, changed = net(), net()
    quantizer = Quantizer().activations("static").fit([IMAGES])
    result = quantizer.apply_(changed, progress=False)
    assert applied(changed) == FUSED
    assert torch.equal(result.model(IMAGES), quantizer.apply(kept, progress=False).model(IMAGES))


class Dropping(nn.Module):
    """In train mode a dropout comes before the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.ReLU6())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


class Twice(nn.Module):
    """The activation is also called without the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(8, 8), nn.ReLU()

    def forward(self, x: Tensor, plain: bool = False) -> Tensor:
        y: Tensor = self.act(x if plain else self.layer(x))
        return y


class Seen(nn.Module):
    """What the layer returns is read by something else too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(8, 8), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return self.act(y) + y  # type: ignore[no-any-return]  # torch's modules return Any


class Reading(nn.Module):
    """Asks the activation for something that an Identity has not, and traces so."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(8, 8), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.layer(x))
        return y * 2 if self.act.inplace else y


class Branching(Reading):
    """Computes something else without the class of the activation."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.layer(x))
        return y if type(self.act) is nn.ReLU else 2 * y


class Own(nn.ReLU):
    """A subclass may compute anything."""


def slope() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.LeakyReLU(-0.5))


def replaced() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    setattr(model[1], "forward", torch.sin)  # noqa: B010  # mypy knows a method there
    return model


def hooked(which: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    model[which].register_forward_hook(_look)
    return model


def _look(module: nn.Module, args: object, output: object) -> None:
    """See what a module returns."""


APART: dict[str, Callable[[], nn.Module]] = {
    "dropout": Dropping,
    "called without the layer": Twice,
    "read by something else": Seen,
    "a negative slope": slope,
    "a subclass": lambda: nn.Sequential(nn.Linear(8, 8), Own()),
    "tanh": lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh()),
    "a forward of its own": replaced,
    "a hook of the activation": lambda: hooked(1),
    "a hook of the layer": lambda: hooked(0),
    "not traced": lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Untraced()),
}


class Untraced(nn.Module):
    """Branches on values."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize("name", APART)
def test_what_is_not_proven_stays(name: str) -> None:
    model = APART[name]().eval()
    found = static(model, noise(4, 8))
    assert applied(found.model) == {}
    assert found.report.changes == ()


def test_a_forward_that_goes_on_after_the_product_keeps_its_activation() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Padding(8, 8, 3), nn.ReLU()).eval()
    assert applied(static(model, noise(2, 3, 9, 9)).model) == {"1": "0"}


class Padding(nn.Conv2d):
    """Pads by itself."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(functional.pad(input, (1, 1, 1, 1))) - 1


class Named(nn.Conv2d):
    """A subclass whose forward is torch's."""


def test_a_subclass_with_torchs_forward_computes_its_activation() -> None:
    model = nn.Sequential(Named(3, 8, 3), nn.ReLU()).eval()
    assert applied(static(model, noise(2, 3, 9, 9)).model) == {"1": "0"}


@pytest.mark.parametrize("make", [Reading, Branching])
def test_a_model_that_asks_for_the_activation_keeps_it_and_says_so(
    make: type[nn.Module],
) -> None:
    model, x = make().eval(), noise(4, 8)
    found = static(model, x)
    (change,) = found.report.changes
    assert not change.done
    assert change.text.startswith("act is not computed by its layer: ")
    assert isinstance(found.model.get_submodule("act"), nn.ReLU)
    assert torch.equal(found.model(x), apart(found.model)(x))
    assert (found.model(x) > 0).any()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_has_layers_compute_them_again(suffix: str, tmp_path: Path) -> None:
    result = static(net(), IMAGES)
    path = result.save(tmp_path / f"model{suffix}")
    loaded = load_model(path, net())
    assert applied(loaded) == FUSED
    assert torch.equal(loaded(IMAGES), result.model(IMAGES))
    assert result.validate(IMAGES).status == "valid"
    again = load_model(path, result.dequantize())
    assert torch.equal(again(IMAGES), result.model(IMAGES))


def test_a_skeleton_whose_hooks_would_see_it_keeps_them_apart(tmp_path: Path) -> None:
    result = static(net(), IMAGES)
    path = result.save(tmp_path / "model.pt")
    skeleton, seen = net(), []
    skeleton.six.register_forward_hook(lambda module, args, output: seen.append(output))
    loaded = load_model(path, skeleton)
    assert applied(loaded) == {"first.2": "first.0"}
    assert torch.equal(loaded(IMAGES), result.model(IMAGES))
    assert len(seen) == 1


HOSTILE: dict[str, dict[str, str]] = {
    "no such activation": {"nowhere": "third"},
    "the model itself": {"": "third"},
    "no activation": {"second": "third"},
    "one that is not computed in place": {"gelu": "third"},
    "no such layer": {"six": "nowhere"},
    "an activation as the layer": {"six": "relu"},
    "two of one layer": {"six": "third", "relu": "third"},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_does_not_fit_is_refused(name: str) -> None:
    checkpoint = to_checkpoint(static(net(), IMAGES).model)
    skeleton = net()
    with pytest.raises(CheckpointError):
        rebuild(skeleton, attrs.evolve(checkpoint, applied=HOSTILE[name]))
    assert "Quantized" not in str(skeleton)
    assert type(skeleton.six) is nn.ReLU6


def test_a_layer_with_code_of_its_own_is_refused_as_the_one_that_computes() -> None:
    model = nn.Sequential(Padding(3, 8, 3), nn.ReLU()).eval()
    checkpoint = to_checkpoint(static(model, noise(2, 3, 9, 9)).model)
    with pytest.raises(CheckpointError, match="forward of its own"):
        rebuild(copy.deepcopy(model), attrs.evolve(checkpoint, applied={"1": "0"}))


def test_an_activation_whose_place_is_gone_is_not_saved(tmp_path: Path) -> None:
    result = static(net(), IMAGES)
    result.model.add_module("six", nn.Identity())
    with pytest.raises(CheckpointError, match=r"give_back\(\)"):
        result.save(tmp_path / "model.pt")


def test_a_dequantized_model_has_them_where_they_were() -> None:
    model, result = net(), static(net(), IMAGES)
    floats = result.dequantize()
    for name in FUSED:
        was, now = model.get_submodule(name), floats.get_submodule(name)
        assert type(now) is type(was)
        assert str(now) == str(was)
        assert vars(now).keys() == vars(was).keys()
    assert all(type(one).__name__[:9] != "Quantized" for one in floats.modules())
    assert not any("then" in name for name, _ in floats.named_modules())
    assert (floats(IMAGES) - model(IMAGES)).abs().max() < 0.1
    assert applied(result.model) == FUSED  # of a copy


def test_a_layer_that_is_dequantized_alone_gives_its_activation_back() -> None:
    found = static(net(), IMAGES).model
    kept = []
    found.get_submodule("six").register_forward_hook(lambda *seen: kept.append(seen[2].min()))
    layer = found.get_submodule("third")
    assert isinstance(layer, QuantizedLayer)
    layer.dequantize()
    with torch.no_grad():
        found(IMAGES)
    assert type(found.get_submodule("six")) is nn.ReLU6
    assert kept == [0]  # by a hook that was given meanwhile and stays


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_and_give_back(how: Callable[[nn.Module], nn.Module]) -> None:
    model = static(net(), IMAGES).model
    twin = how(model)
    assert applied(twin) == FUSED
    assert torch.equal(twin(IMAGES), model(IMAGES))
    assert torch.equal(apart(twin)(IMAGES), model(IMAGES))
    assert applied(model) == FUSED


def test_a_layer_copied_alone_goes_on_computing_it() -> None:
    layer = static(net(), IMAGES).model.get_submodule("third")
    found = copy.deepcopy(layer)(x := noise(2, 16, 6, 6))
    assert torch.equal(found, layer(x))
    assert torch.equal(found.min(), torch.tensor(0.0))


def test_gradients_are_those_of_the_activation_after_the_layer() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.1), nn.Conv2d(8, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 1)
    )
    found = static(model.eval(), noise(2, 3, 9, 9)).model
    assert applied(found) == {"1": "0", "3": "2"}
    grads = []
    for one in (found, apart(found)):
        x = noise(2, 3, 9, 9).requires_grad_()
        one(x).square().sum().backward()
        grads.append((x.grad, one.get_parameter("0.bias").grad))
    for one, other in zip(*grads, strict=True):
        assert one is not None
        assert torch.equal(one, other)


def test_compiled_and_exported_models_compute_the_same() -> None:
    result = static(net(), IMAGES)
    other = apart(result.model)
    exported = result.export(IMAGES).module()(IMAGES)
    assert torch.equal(exported, torch.export.export(other, (IMAGES,)).module()(IMAGES))
    one, expected = (
        torch.compile(model, fullgraph=True, backend="aot_eager")(IMAGES)
        for model in (result.model, other)
    )
    assert torch.equal(one, expected)


@pytest.mark.parametrize(
    "quantizer",
    [
        Quantizer(),
        Quantizer().transform(EqualizeLayers(), BiasCorrection()),
        Quantizer().bits(2),
        Quantizer().bits(2).on_damage("keep"),
    ],
    ids=str,
)
def test_reports_and_corrections_are_those_of_layers_without_activation(
    quantizer: Quantizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantizer = quantizer.activations("static", bits=8).fit([IMAGES])
    fused = quantizer.apply(net(), progress=False)
    with monkeypatch.context() as patch:
        patch.setattr("mono_quant.plan.plan.fuse_activations", lambda *_: ())
        left = quantizer.apply(net(), progress=False)
    assert applied(left.model) == {}
    assert fused.report.layers == left.report.layers
    assert fused.report.warnings == left.report.warnings
    assert same_tensors(fused.model, left.model)


def test_a_correction_of_a_finished_model_leaves_such_layers_alone() -> None:
    model = net()
    result = static(model, IMAGES)
    twin = Quantizer().bits(16).fold().apply(model, progress=False).model
    before = result.model(IMAGES)
    changes = BiasCorrection().apply(result.model, CorrectionContext(twin, model))
    left = {change.path: change.text for change in changes if not change.done}
    for name in FUSED.values():
        assert left[name].endswith("it computes the activation behind it, too")
    assert torch.equal(result.model(IMAGES), before)


def test_the_output_of_a_layer_is_measured_before_its_activation() -> None:
    result, floats = static(net(), IMAGES), net()
    kept: dict[str, Tensor] = {}

    def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        kept.update(x=args[0].clone(), y=output.clone())  # the ReLU6 after it is in place

    floats.third.register_forward_hook(keep)
    with torch.no_grad():
        floats(IMAGES)
        noise_of = apart(result.model).get_submodule("third")(kept["x"]) - kept["y"]
    (row,) = [row for row in result.report.layers if row.name == "third.weight"]
    assert row.output_sqnr_db == pytest.approx(sqnr_db(kept["y"], kept["y"] + noise_of), abs=1e-3)


def test_a_graph_has_activations_of_its_own() -> None:
    result = static(net(), IMAGES)
    flows = [integer_flow(one, reference=True) for one in (result.model, apart(result.model))]
    one, other = flows
    assert one.lines == other.lines
    assert torch.equal(one.model(IMAGES), other.model(IMAGES))
    assert applied(result.model) == FUSED  # the graph is of a copy
    graph = Quantizer().activations("static").graph().fit([IMAGES]).apply(net(), progress=False)
    assert applied(graph.kept.model) == FUSED
    assert graph.validate(IMAGES).status == "valid"
    assert not any(name.endswith("then") for name, _ in graph.model.named_modules())
