"""Plans carried out: what is refused, measured and left alone."""

import copy
import weakref
from collections.abc import Sequence

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from mono_quant import (
    Affine,
    Change,
    Grid,
    InputError,
    MinMax,
    PerGroup,
    QuantizationResult,
    QuantizedModule,
    Quantizer,
    Target,
    TransformContext,
)
from mono_quant.base import WITHOUT_DATA
from mono_quant.plan.request import WeightPlan
from mono_quant.plan.run import LayerRun
from tests.helpers import (
    Doubled,
    noise,
    same_bits,
    same_tensors,
)
from tests.plan.models import (
    MODELS,
    mlp,
    normed,
    original,
    weight_of,
)


@pytest.mark.parametrize("name", MODELS)
def test_in_place_gives_the_bytes_that_a_copy_gives(name: str) -> None:
    model = original(name)
    copied = Quantizer().bits(4).only("*").apply(model, progress=False)
    placed = Quantizer().bits(4).only("*").plan(model).run(in_place=True, progress=False)
    assert placed.model is model
    assert same_tensors(placed.model, copied.model)
    assert placed.report == copied.report


def test_the_same_plan_gives_the_same_bytes_again() -> None:
    model = mlp()
    plan = Quantizer().bits(4).fit(noise(8, 128)).plan(model)
    first, second = plan.run(progress=False), plan.run(progress=False)
    assert same_tensors(first.model, second.model)
    assert first.report == second.report


def test_the_damage_of_each_weight_is_its_sqnr_in_float64() -> None:
    model = mlp()
    result = Quantizer().bits(4).apply(model, progress=False)
    for place, row in zip((0, 2), result.report.quantized, strict=True):
        weight = weight_of(model, str(place)).detach().to(torch.float64)
        error = weight - dequantized(result, place).to(torch.float64)
        expected = 10 * torch.log10(weight.square().sum() / error.square().sum())
        assert row.sqnr_db == pytest.approx(float(expected), abs=1e-4)


def test_the_damage_of_the_output_is_its_sqnr_in_float64() -> None:
    model, data = mlp(), [noise(4, 128), noise(3, 128, seed=1)]
    result = Quantizer().bits(4).fit(data).apply(model, progress=False)
    with torch.no_grad():
        expected, found = model(torch.cat(data)).double(), result.model(torch.cat(data)).double()
    ratio = expected.square().sum() / (expected - found).square().sum()
    assert result.report.samples == 7
    assert result.report.output_sqnr_db == pytest.approx(float(10 * ratio.log10()), abs=1e-3)


def test_a_weight_that_changes_when_it_is_read_in_train_mode_is_read_in_eval() -> None:
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(64, 64)))
    before = copy.deepcopy(model)
    trained = Quantizer().apply(model.train(), progress=False)
    assert same_tensors(model, before)
    assert trained.model.training
    calm = Quantizer().apply(copy.deepcopy(before).eval(), progress=False)
    assert same_tensors(trained.model, calm.model)


def test_a_scale_that_half_precision_cannot_hold_is_said_and_counted() -> None:
    model = mlp()
    with torch.no_grad():
        weight_of(model, "0")[3] *= 1e-7
    plan = Quantizer().plan(model)
    report = plan.run(progress=False).report
    row = next(row for row in report.layers if row.name == "0.weight")
    assert row.note is not None
    assert "its scales are float32" in row.note
    assert row.bytes == 64 * 128 + 64 * 4
    assert report.bytes == plan.outline.report.bytes + 64 * 2
    assert any("its scales are float32" in warning for warning in report.warnings)


def test_what_was_left_out_of_each_batch_is_said() -> None:
    data = [(noise(4, 128), torch.zeros(4))]
    report = Quantizer().fit(data).apply(mlp(), progress=False).report
    assert any("the last 1 of 2 items of each batch were left out" in note for note in report.notes)


def test_a_plan_that_quantizes_nothing_says_so() -> None:
    plan = Quantizer().skip("*").plan(mlp())
    assert "no weight is quantized by this" in plan.explain()
    result = plan.run(progress=False)
    assert result.report.ratio == 1
    assert same_tensors(result.model, plan.run(progress=False).model)


def test_a_weight_plan_knows_where_its_values_are() -> None:
    plan = Quantizer().bits(4).group_size(32).plan(normed())
    first, second = plan.weights
    assert first.key == "0.weight"
    assert first.sources == (
        "0.parametrizations.weight.original0",
        "0.parametrizations.weight.original1",
    )
    assert first.parameters == 64 * 64 + 64
    assert second.sources == ("1.weight",)
    assert first.recipe is not None
    assert first.recipe.grid.scheme == Affine(4, False, PerGroup(32))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_weight_that_is_not_finite_is_planned_and_then_refused_by_name(
    bad: float, in_place: bool
) -> None:
    model = mlp()
    with torch.no_grad():
        weight_of(model, "2")[3, 5] = bad
    plan = Quantizer().plan(model)
    assert "2.weight" in plan.explain()
    message = (
        r"2\.weight holds NaN or infinity; mend the weight, or leave .* float with skip\('2'\)"
    )
    with pytest.raises(InputError, match=message):
        plan.run(in_place=in_place, progress=False)
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]


def test_a_weight_that_is_not_finite_may_stay_float() -> None:
    model = mlp()
    with torch.no_grad():
        weight_of(model, "2").fill_(float("nan"))
    result = Quantizer().skip("2").apply(model, progress=False)
    assert [row.name for row in result.report.quantized] == ["0.weight"]


def test_a_weight_that_does_not_fit_its_grid_is_refused_by_name() -> None:
    model = mlp()
    with torch.no_grad():
        weight_of(model, "2")[0, 0] = 1e6
    with pytest.raises(InputError, match=r"2\.weight cannot be quantized: values up to 1e\+06"):
        Quantizer().bits(16).apply(model, progress=False)


def dequantized(result: QuantizationResult[nn.Sequential], place: int) -> Tensor:
    layer = result.model[place]
    assert isinstance(layer, QuantizedModule)
    return layer.packed_weights()["weight"].dequantize()


def test_a_transform_is_applied_to_a_copy_and_leaves_the_source_alone() -> None:
    model = mlp()
    before = copy.deepcopy(model)
    plain = Quantizer().apply(model, progress=False)
    result = Quantizer().transform(Doubled()).apply(model, progress=False)
    assert same_tensors(model, before)
    for place in (0, 2):
        assert same_bits(dequantized(result, place), dequantized(plain, place) * 2)


def test_a_transform_is_told_what_will_be_done_to_each_weight_and_its_inputs() -> None:
    told: dict[str, Target] = {}

    class Listening(Doubled):
        def apply(self, model: nn.Module, context: TransformContext = WITHOUT_DATA) -> list[Change]:
            told.update(context.targets)
            return super().apply(model, context)

    model, x = mlp(), noise(8, 128)
    quantizer = Quantizer().override("2", bits=4, group_size=32).transform(Listening())
    result = quantizer.fit(x).apply(model, progress=False)
    assert set(told) == {"0.weight", "2.weight"}
    assert told["2.weight"] == Target(Grid(Affine(4, False, PerGroup(32)), MinMax()))
    assert told["2.weight"].activation(x) is None

    static = told["0.weight"]
    assert static.grid.scheme == Affine(8)
    assert static.observer == MinMax()
    layer, foreseen = result.model.get_submodule("0"), static.activation(x)
    assert isinstance(layer, QuantizedModule)
    assert foreseen is not None
    made = layer.activations()["weight"]
    assert foreseen.describe() == made.describe() == "static 8-bit asymmetric per-tensor"
    for name, tensor in made.tensors.items():
        assert torch.equal(foreseen.tensors[name], tensor)

    Quantizer().skip("2").transform(Listening()).apply(model, progress=False)
    dynamic = told["0.weight"].activation(x)
    assert dynamic is not None
    assert dynamic.describe() == "dynamic 8-bit asymmetric per-token"


def test_a_transform_reaches_what_stays_float() -> None:
    model = mlp()
    result = Quantizer().skip("2").transform(Doubled()).apply(model, progress=False)
    doubled = weight_of(model, "2").detach() * 2
    assert same_bits(weight_of(result.model, "2").detach(), doubled)


def test_the_damage_of_a_transform_is_measured_against_the_source() -> None:
    result = Quantizer().transform(Doubled()).fit(noise(8, 128)).apply(mlp(), progress=False)
    assert result.report.output_sqnr_db is not None
    assert result.report.output_sqnr_db < 0  # the outputs are four times too large


def test_in_place_a_transform_changes_the_model_itself() -> None:
    torch.manual_seed(0)
    model = mlp()
    copied = Quantizer().transform(Doubled()).fit(noise(8, 128)).apply(model, progress=False)
    result = Quantizer().transform(Doubled()).fit(noise(8, 128)).apply_(model, progress=False)
    assert result.model is model
    assert same_tensors(result.model, copied.model)
    rows = [
        attrs.evolve(row, output_sqnr_db=None, accumulated_db=None, place=None, inputs=())
        for row in copied.report.layers
    ]
    assert result.report.layers == tuple(rows), "in place, no float layer is left to measure by"
    assert attrs.evolve(result.report, layers=copied.report.layers) == copied.report


def test_in_place_a_cast_that_does_not_fit_is_refused_before_anything_is_changed() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        weight_of(model, "1")[0, 0] = 1e6
    before = copy.deepcopy(model)
    with pytest.raises(InputError, match=r"1\.weight cannot be quantized: .*float16"):
        Quantizer().bits(16).apply_(model, progress=False)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
    assert same_tensors(model, before)


@pytest.mark.parametrize("again", [False, True])
def test_a_plan_that_was_carried_out_in_place_is_spent(again: bool) -> None:
    plan = Quantizer().plan(nn.Sequential(nn.Linear(64, 64)))
    plan.run(in_place=True, progress=False)
    with pytest.raises(InputError, match=r"'0' is quantized already.*make another with plan"):
        plan.run(in_place=again, progress=False)


def test_what_was_rounded_is_not_held_while_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[weakref.ref[LayerRun[nn.Module]]] = []
    held: list[bool] = []

    class Watched(LayerRun[nn.Module]):
        def __init__(self, model: nn.Module, todo: Sequence[WeightPlan], *, drawn: bool) -> None:
            super().__init__(model, todo, drawn=drawn)
            runs.append(weakref.ref(self))

    def forward(model: nn.Module, batch: object) -> object:
        held.append(any(run() is not None for run in runs))
        found: object = model(batch)
        return found

    monkeypatch.setattr("mono_quant.plan.plan.LayerRun", Watched)
    quantizer = Quantizer().bits(4).fit([noise(4, 128)], forward=forward)
    assert quantizer.apply(mlp(), progress=False).report.quantized[0].histogram is not None
    assert len(runs) == 1
    assert held
    assert not any(held)
