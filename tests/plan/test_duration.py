"""How long a plan will take, as it is foreseen; benchmarks compare that with what it takes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mono_quant import (
    AWQ,
    GPTQ,
    MSE,
    CalibrationError,
    LearnedRounding,
    Quantizer,
    TimeEstimate,
)
from tests.helpers import same_tensors
from tests.plan.models import mlp

DATA = [torch.randn(16, 128, generator=torch.Generator().manual_seed(0)) for _ in range(4)]


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have everything that is measured take a second, whatever there is of it."""

    def timed(call: Callable[[], object], device: torch.device) -> float:
        call()
        return 1.0

    monkeypatch.setattr("mono_quant.plan.duration.timed", timed)


def test_time_is_foreseen_and_nothing_is_touched() -> None:
    model, before, state = mlp(), mlp(), torch.random.get_rng_state()
    before.load_state_dict(model.state_dict())
    found = Quantizer().bits(4).observer(MSE()).fit(DATA).plan(model).estimate_time()
    assert isinstance(found, TimeEstimate)
    assert found.rounding_seconds > 0
    assert found.data_seconds > 0
    assert found.samples == 64
    assert same_tensors(model, before)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.usefixtures("second")
def test_each_weight_is_counted_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(64, 64), nn.Linear(64, 64)
            self.other.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.other(self.one(x))
            return found

    assert Quantizer().plan(mlp()).estimate_time().rounding_seconds == 2
    assert Quantizer().skip("2").plan(mlp()).estimate_time().rounding_seconds == 1
    assert Quantizer().plan(Tied()).estimate_time().rounding_seconds == 1
    assert Quantizer().only("0").plan(mlp()).estimate_time().data_seconds == 0


@pytest.mark.usefixtures("second")
def test_runs_over_the_data_are_counted() -> None:
    plan = Quantizer().bits(4).fit(DATA).plan(mlp())
    assert plan.estimate_time().data_seconds == 64 * 2  # nothing is asked of the inputs, in a pass
    plan = Quantizer().bits(4).rounding(GPTQ()).fit(DATA).plan(mlp())
    assert plan.estimate_time().data_seconds == 64 * 4
    static = Quantizer().fit(DATA)
    assert static.plan(mlp()).estimate_time().data_seconds == 64 * 2
    assert static.graph().plan(mlp()).estimate_time().data_seconds == 64 * 4
    gathered = static.plan(mlp()).calibrate()
    plan = static.statistics(gathered).plan(mlp())
    assert plan.estimate_time().data_seconds == 64
    apart = Quantizer().bits(4).rounding(GPTQ()).fit(DATA).measure_on(DATA[:2]).plan(mlp())
    found = apart.estimate_time()
    assert (found.data_seconds, found.samples) == (64 * 3 + 32, 96)
    alone = Quantizer().bits(4).measure_on(DATA[:2]).plan(mlp()).estimate_time()
    assert (alone.data_seconds, alone.samples) == (32, 32)


@pytest.mark.usefixtures("second")
def test_batches_that_are_learned_from_are_counted() -> None:
    def learned(steps: int) -> float:
        quantizer = Quantizer().bits(4).rounding(LearnedRounding(steps=steps)).fit(DATA)
        return quantizer.plan(mlp()).estimate_time().rounding_seconds

    two, four, eight = map(learned, (2, 4, 8))
    assert eight - four == pytest.approx(2 * (four - two))
    assert four > two


def test_what_is_not_foreseen_is_named() -> None:
    quantizer = Quantizer().bits(4).fit(DATA)
    slow = quantizer.transform(AWQ()).rounding(LearnedRounding(minutes=1)).on_damage("keep")
    found = slow.plan(mlp()).estimate_time()
    assert str(found).endswith(
        "; not counted: AWQ, what LearnedRounding learns and beginning again where a layer is "
        "destroyed"
    )
    plan = Quantizer().only_if_faster(torch.randn(2, 128)).plan(mlp())
    assert plan.estimate_time().left_out
    assert not plan.measured().estimate_time().left_out


def test_a_layer_that_the_sample_does_not_reach_is_named() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.layers[int(x[0, 0] > 0)](x)
            return found

    batch = torch.randn(8, 64)
    model, rounding = Chosen(), GPTQ()
    skipped = "layers.0" if batch[0, 0] < 0 else "layers.1"
    found = Quantizer().bits(4).rounding(rounding).skip(skipped).fit(batch).plan(model)
    (text,) = found.estimate_time().left_out
    assert text.endswith("which a sample of the data did not reach")


def test_a_state_dict_and_an_empty_plan_take_their_time() -> None:
    state = {"0.weight": torch.randn(64, 64)}
    assert Quantizer().plan(state).estimate_time().seconds > 0
    found = Quantizer().skip("*").fit(DATA).plan(mlp()).estimate_time()
    assert found.seconds == 0
    assert str(found) == "time: under a second, an estimate from samples measured here"


def test_a_long_time_says_what_it_is_made_of() -> None:
    found = TimeEstimate(170.4, 12.3, 64, ("AWQ", "BiasCorrection"))
    assert str(found) == (
        "time: 3 min, an estimate from samples measured here: 3 min for the weights and 12 s to "
        "run 64 samples; not counted: AWQ and BiasCorrection"
    )
    assert str(TimeEstimate(1.6, 0, 0)).endswith("measured here: 2 s for the weights")


def test_columns_that_stand_out_without_data_take_their_time() -> None:
    found = Quantizer().bits(4).outliers(2).plan(mlp()).estimate_time()
    assert found.rounding_seconds > 0
    assert not found.left_out


@pytest.mark.usefixtures("second")
def test_a_model_that_takes_whole_batches_alone_is_run_on_one() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x: Tensor, by: Tensor) -> Tensor:
            found: Tensor = self.layer(x.reshape(2, 4, 64)) * by
            return found

    batch = {"x": torch.randn(8, 64), "by": torch.ones(2, 4, 64)}
    found = Quantizer().bits(4).fit([batch, batch]).plan(Mixing()).estimate_time()
    assert (found.samples, found.data_seconds) == (16, 2 * 2)
    with pytest.raises(CalibrationError, match="failed on batch 0"):
        Quantizer().fit({"x": torch.randn(7, 64), "by": 3}).plan(Mixing()).estimate_time()
