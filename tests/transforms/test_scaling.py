"""AWQ and SmoothQuant: the same function, less error once it is quantized, or a reason why not."""

import copy
from collections.abc import Sequence
from pathlib import Path

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mono_quant import (
    AWQ,
    CalibrationError,
    Change,
    ConfigurationError,
    InputError,
    Quantizer,
    SmoothQuant,
    Target,
    Transform,
    TransformContext,
    load_model,
)
from mono_quant.base import WITHOUT_DATA
from mono_quant.transforms.groups import find_groups
from mono_quant.transforms.objective import Consumer
from mono_quant.transforms.samples import ROWS, inputs_of
from tests.helpers import noise, same_tensors
from tests.transforms.models import ModelT
from tests.transforms.wirings import DYNAMIC, FOUR, STATIC, WIDTH, WIRINGS, Gated, aimed

METHODS: dict[str, tuple[Transform, Target]] = {
    "AWQ": (AWQ(steps=5), FOUR),
    "SmoothQuant, dynamic": (SmoothQuant(steps=4), DYNAMIC),
    "SmoothQuant, static": (SmoothQuant(steps=4), STATIC),
    "SmoothQuant(0.5), static": (SmoothQuant(0.5), STATIC),
}


def uneven(model: ModelT) -> ModelT:
    """Return a model in float64 whose inputs and weights have channels of very different sizes."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.mul_(torch.randn(len(parameter)).exp())
            else:
                columns = torch.randn(1, parameter.shape[1], *[1] * (parameter.dim() - 2))
                parameter.mul_(columns.exp())
    return model.double().eval()


def outliers(*shape: int) -> Tensor:
    """Return inputs of which some channels are far larger than the others."""
    x = noise(*shape).double()
    x[..., 1] *= 30
    return x


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", WIRINGS)
def test_the_function_stays_the_same(name: str, method: str) -> None:
    make, shape, groups = WIRINGS[name]
    transform, target = METHODS[method]
    model, x = uneven(make()), outliers(*shape)
    twin = copy.deepcopy(model)
    before = [one.clone() for one in model.parameters()]
    changes = transform.apply(twin, aimed(twin, target, x, x / 2))
    assert len(changes) >= len(groups)
    assert not any(change.edits for change in changes)
    if name != "joined":  # the outliers of its input reach the layer past all modules
        assert any(change.done for change in changes)
        assert not same_tensors(model, twin)
    assert all(map(torch.equal, before, model.parameters())), "the source's tensors are its own"
    with torch.no_grad():
        exact, found = model(x), twin(x)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-11 * float(exact.abs().max()))


def behind_norm(model: nn.Module, target: Target, x: Tensor) -> TransformContext:
    """Return what a transform knows of a `Gated` of which only the layers behind its norm count."""
    context = aimed(model, target, x)
    targets = {name: one for name, one in context.targets.items() if name != "down.weight"}
    return attrs.evolve(context, targets=targets)


def quantized_error(model: nn.Module, twin: nn.Module, x: Tensor, target: Target) -> float:
    """Return the mean noise over signal of the layers behind the norm of a `Gated`, from scratch.

    Of rows of their inputs; weights and inputs rounded by formulas of this test's own.
    """
    total = 0.0
    for name in ("gate", "up"):
        norm, layer = (model.get_submodule(one) for one in ("norm", name))
        scaled_norm, scaled = (twin.get_submodule(one) for one in ("norm", name))
        weight, bias = scaled.get_parameter("weight").detach(), getattr(layer, "bias", None)
        with torch.no_grad():
            exact = functional.linear(norm(x), layer.get_parameter("weight"), bias)
            inputs = scaled_norm(x)
            if target is FOUR:
                groups = weight.reshape(len(weight), -1, 8)
                low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
                step = ((high - low) / 15).half().double()[..., None]
                zero = (-low[..., None] / step).round().clamp(0, 15)
                rounded = ((groups / step + zero).round().clamp(0, 15) - zero) * step
                rounded = rounded.reshape(weight.shape)
            else:
                step = (weight.abs().amax(1, keepdim=True) / 127).half().double()
                rounded = (weight / step).round().clamp(-128, 127) * step
                dims = None if target is STATIC else 1
                low = inputs.amin() if dims is None else inputs.amin(1, keepdim=True)
                high = inputs.amax() if dims is None else inputs.amax(1, keepdim=True)
                step = (high.clamp(min=0) - low.clamp(max=0)) / 255
                zero = (-low.clamp(max=0) / step).round()
                inputs = ((inputs / step + zero).round().clamp(0, 255) - zero) * step
            found = functional.linear(inputs, rounded, bias)
        total += float((exact - found).square().sum() / exact.square().sum()) / 2
    return total


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(5))
def test_the_error_is_never_more_than_without_scaling(method: str, seed: int) -> None:
    transform, target = METHODS[method]
    torch.manual_seed(seed)
    model = Gated().double().eval()
    x = torch.randn(100, WIDTH).double() * torch.randn(WIDTH).exp()
    twin = copy.deepcopy(model)
    (change,) = transform.apply(twin, behind_norm(twin, target, x))
    assert change.done == (not torch.equal(model.norm.weight, twin.norm.weight))
    before = quantized_error(model, model, x, target)
    after = quantized_error(model, twin, x, target)
    assert after <= before * (1 + 1e-3), "but for values on a half, which float32 may round over"


@pytest.mark.parametrize("method", METHODS)
def test_outliers_make_it_worth_while(method: str) -> None:
    transform, target = METHODS[method]
    torch.manual_seed(0)
    model = Gated().double().eval()
    with torch.no_grad():
        model.norm.weight[3] = 60
    x = noise(100, WIDTH).double()
    twin = copy.deepcopy(model)
    (change,) = transform.apply(twin, behind_norm(twin, target, x))
    assert change.done
    before = quantized_error(model, model, x, target)
    after = quantized_error(model, twin, x, target)
    assert after < before / 1.2
    told = float(change.text.rpartition("for ")[2].removesuffix(" dB less error"))
    assert told == pytest.approx(10 * torch.tensor(before / after).log10().item(), abs=0.05)


def test_an_alpha_that_makes_it_worse_is_not_used() -> None:
    torch.manual_seed(0)
    model = Gated().double().eval()
    with torch.no_grad():
        model.up.weight[:, 2] *= 1e-3
        model.gate.weight[:, 2] *= 1e-3
    x = noise(100, WIDTH).double()
    twin = copy.deepcopy(model)
    (change,) = SmoothQuant(0.0).apply(twin, behind_norm(twin, DYNAMIC, x))
    assert change.text == (
        "the inputs of gate and up are not scaled: no scale that was tried lessens their error"
    )
    assert torch.equal(twin.norm.weight, model.norm.weight)


def consumers_of(model: nn.Module, target: Target, x: Tensor) -> Sequence[Consumer]:
    inputs = inputs_of(model, aimed(model, target, x), ["gate", "up"])
    layers = ((name, model.get_submodule(name)) for name in ("gate", "up"))
    return [Consumer(name, layer, target, inputs[name]) for name, layer in layers]


def test_scales_are_those_of_the_papers() -> None:
    model, x = uneven(Gated()), outliers(20, WIDTH)
    context = aimed(model, FOUR, x)
    group = next(one for one in find_groups(model, context)[0] if one.source == "norm")
    with torch.no_grad():
        sizes = model.norm(x).abs()
        columns = torch.cat([model.gate.weight, model.up.weight]).abs().amax(0)
    consumers = consumers_of(model, FOUR, x)

    for alpha, scale in AWQ().scales(group, consumers).items():
        expected = sizes.mean(0) ** alpha
        expected /= (expected.max() * expected.min()).sqrt()
        torch.testing.assert_close(scale, expected)
    assert list(AWQ(steps=4).scales(group, consumers)) == [0.25, 0.5, 0.75]

    for alpha, scale in SmoothQuant().scales(group, consumers).items():
        expected = sizes.amax(0) ** alpha / columns ** (1 - alpha)
        torch.testing.assert_close(scale, expected)
    assert list(SmoothQuant(0.3).scales(group, consumers)) == [0.3]
    assert list(SmoothQuant(steps=2).scales(group, consumers)) == [0, 0.5, 1]


def test_a_weight_that_is_not_finite_is_left_for_the_plan_to_name() -> None:
    model = Gated().eval()
    with torch.no_grad():
        model.up.weight[0, 0] = float("nan")
    quantizer = Quantizer().bits(4).group_size(8).only("gate", "up").transform(AWQ())
    x = noise(9, WIDTH)
    (change,) = AWQ().apply(copy.deepcopy(model), behind_norm(model, FOUR, x))
    assert "no scale that was tried lessens their error" in change.text
    with pytest.raises(InputError, match=r"up\.weight holds NaN"):
        quantizer.fit(x, forward=lambda model, batch: torch.ones(1)).apply(model, progress=False)


def test_channels_that_are_never_used_keep_their_scale() -> None:
    model, x = uneven(Gated()), outliers(20, WIDTH)
    with torch.no_grad():
        model.norm.weight[4] = -1
    for transform in (AWQ(), SmoothQuant()):
        twin = copy.deepcopy(model)
        (change,) = transform.apply(twin, behind_norm(twin, DYNAMIC, x))
        assert change.done
        for name in ("gate", "up"):
            one, other = (of.get_submodule(name).get_parameter("weight") for of in (model, twin))
            assert torch.equal(one[:, 4], other[:, 4])


def test_a_sample_is_spread_over_the_data_and_shared() -> None:
    model = Gated().eval()
    batches = [noise(100, WIDTH) + place for place in range(9)]
    found = inputs_of(model, aimed(model, FOUR, *batches), ["gate", "up", "down"])
    with torch.no_grad():
        seen = model.norm(torch.cat(batches))
    for name in ("gate", "up"):
        rows = found[name].rows
        assert ROWS // 2 <= len(rows) <= ROWS
        torch.testing.assert_close(torch.stack(rows), seen[::4])
        torch.testing.assert_close(found[name].mean, seen.abs().double().mean(0))
        assert torch.equal(found[name].peak, seen.abs().amax(0).double())
    assert all(map(torch.equal, found["gate"].rows, found["up"].rows))
    assert found["gate"].rows[0] is found["up"].rows[0]
    assert found["down"].rows[0].shape == (24,)


def text_of(changes: Sequence[Change], layer: str) -> str:
    (found,) = (one.text for one in changes if f" {layer}" in one.text.partition(":")[0])
    return found


def test_without_data_and_without_targets_nothing_is_done() -> None:
    model = Gated().eval()
    twin = copy.deepcopy(model)
    (change,) = AWQ().apply(twin, WITHOUT_DATA)
    assert not change.done
    assert "give some with fit(data)" in change.text
    context = attrs.evolve(aimed(twin, FOUR, noise(9, WIDTH)), targets={})
    assert AWQ().apply(twin, context) == ()
    assert same_tensors(model, twin)


def test_a_plan_without_data_refuses_them_with_the_mending_call() -> None:
    for transform in (AWQ(), SmoothQuant()):
        with pytest.raises(CalibrationError, match=r"needs data; give some with fit\(data\)"):
            Quantizer().transform(transform).plan(Gated())


def test_smooth_quant_leaves_float_inputs_to_awq() -> None:
    x = noise(9, WIDTH)
    report = Quantizer().bits(4).group_size(8).only("gate", "up").transform(SmoothQuant())
    changes = report.fit(x).apply(Gated().eval(), progress=False).report.changes
    assert text_of(changes, "gate and up") == (
        "the inputs of gate and up are not scaled: they stay float; for weights alone there is "
        "AWQ()"
    )


def test_layers_that_stay_float_are_scaled_along_and_not_searched_for() -> None:
    torch.manual_seed(0)
    model, x = uneven(Gated()).float(), outliers(50, WIDTH).float()
    quantizer = Quantizer().bits(4).group_size(8).only("up").transform(AWQ()).fit(x)
    result = quantizer.apply(model, progress=False)
    (change,) = result.report.changes
    assert "the inputs of gate and up are divided" in change.text
    assert not torch.equal(result.model.gate.weight, model.gate.weight)


def test_what_cannot_be_scaled_is_reported_by_the_layers() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.last = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 64)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.last(self.words(x))
            return result

    x = torch.arange(50)
    result = Quantizer().transform(AWQ()).fit(x).apply(Plain().eval(), progress=False)
    texts = [change.text for change in result.report.changes]
    assert texts == [
        "the inputs of last are not scaled: its input comes from 'words'",
        "the inputs of words are not scaled: scales are moved into Linears and convolutions, not "
        "into a Embedding",
    ]


def test_what_changes_the_outputs_is_taken_back() -> None:
    class Deep(Gated):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = super().forward(x) + self.state_dict()["norm.weight"].square().sum()
            return result

    model, x = uneven(Deep()), outliers(50, WIDTH)
    before = copy.deepcopy(model)
    changes = AWQ().apply(model, aimed(model, FOUR, x))
    assert "it changes the model's outputs" in text_of(changes, "gate and up")
    assert torch.equal(model.norm.weight, before.norm.weight)
    assert "it changes" not in text_of(changes, "down")


@pytest.mark.parametrize("transform", [AWQ(), SmoothQuant(), SmoothQuant(0.5)], ids=repr)
def test_in_place_copied_saved_and_configured_it_is_the_same(
    transform: Transform, tmp_path: Path
) -> None:
    model, x = uneven(Gated()).float(), outliers(50, WIDTH).float()
    base = Quantizer().bits(8).only("gate", "up", "down")
    quantizer = base.transform(transform).fit(x)
    assert repr(quantizer) == (
        f"Quantizer().bits(8).only('gate', 'up', 'down').transform({transform!r}).fit(<list>)"
    )
    result = quantizer.apply(model, progress=False)
    assert any(change.done for change in result.report.changes)
    again = Quantizer.from_config(quantizer.to_config()).fit(x).apply(model, progress=False)
    path = result.save(tmp_path / "model.safetensors")
    loaded = load_model(path, Gated())
    in_place = quantizer.apply_(copy.deepcopy(model), progress=False)
    with torch.no_grad():
        expected = result.model(x)
        for one in (again.model, loaded, in_place.model):
            assert torch.equal(one(x), expected)


def test_less_error_is_left_in_the_whole_model_too() -> None:
    torch.manual_seed(0)
    model = Gated().eval()
    with torch.no_grad():
        model.norm.weight[3] = 60
    x = noise(100, WIDTH)
    base = Quantizer().bits(4).group_size(8).only("gate", "up", "down").fit(x)
    plain = base.apply(model, progress=False).report.output_sqnr_db
    scaled = base.transform(AWQ()).apply(model, progress=False).report.output_sqnr_db
    assert plain is not None
    assert scaled is not None
    assert scaled > plain + 1


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_an_alpha_is_from_0_to_1_and_steps_are_1_or_more(alpha: float) -> None:
    with pytest.raises(ConfigurationError, match="alpha is 0 to 1, or None"):
        SmoothQuant(alpha)
    with pytest.raises(ConfigurationError, match="steps is 1 or more"):
        AWQ(steps=0)
    with pytest.raises(ConfigurationError, match="steps is 1 or more"):
        SmoothQuant(steps=0)
