"""What `quality` chooses, and that whatever is said wins over it."""

import pytest
import torch
from torch import Tensor, nn

from mono_quant import (
    GPTQ,
    MSE,
    Affine,
    BiasCorrection,
    ConfigurationError,
    EqualizeLayers,
    FittedCodebook,
    MinMax,
    PerGroup,
    QuantizationResult,
    Quantizer,
    RoundToNearest,
    TuneScales,
)
from mono_quant.settings import QUALITIES, Recipe, Settings
from tests.helpers import noise, same_tensors

TABLE = FittedCodebook(4, PerGroup(32), torch.float8_e4m3fn)
SHAPE = (1, 64, 64)
DATA = [noise(16, 64, seed=place) for place in range(4)]


def recipe(*, has_data: bool = True, **said: object) -> Recipe:
    return Settings(**{"bits": 4, **said}).recipe(SHAPE, has_data)  # type: ignore[arg-type]  # as said


@pytest.mark.parametrize("quality", QUALITIES)
def test_it_chooses_a_table_in_fine_groups_and_ranges_of_least_error(quality: str) -> None:
    found = recipe(quality=quality)
    assert found.grid.scheme == TABLE
    assert found.grid.observer == MSE()


@pytest.mark.parametrize("quality", QUALITIES)
def test_without_data_every_quality_rounds_to_nearest(quality: str) -> None:
    assert recipe(quality=quality, has_data=False).rounding == RoundToNearest()


def test_with_data_the_better_ones_compensate() -> None:
    assert recipe(quality="fast").rounding == RoundToNearest()
    assert recipe(quality="balanced").rounding == GPTQ(damping=0.1)
    assert recipe(quality="best").rounding == GPTQ(damping=0.1, refinements=2)


def test_what_is_said_wins() -> None:
    grid = recipe(quality="best", granularity=PerGroup(16)).grid
    assert grid.scheme == Affine(4, symmetric=False, granularity=PerGroup(16))
    assert recipe(quality="best", rounding=RoundToNearest()).rounding == RoundToNearest()
    assert recipe(quality="best", observer=MinMax()).grid.observer == MinMax()
    assert recipe(quality="best", symmetric=True).grid.scheme == Affine(4, granularity=PerGroup(64))


@pytest.mark.parametrize(("row", "size"), [(9, 9), (27, 27), (96, 32), (112, 28), (240, 30)])
def test_rows_that_32_does_not_divide_are_cut_into_the_next_smaller_groups(
    row: int, size: int
) -> None:
    found = Settings(bits=4, quality="fast").recipe((1, 8, row))
    assert found.grid.scheme == FittedCodebook(4, PerGroup(size), torch.float8_e4m3fn)


@pytest.mark.parametrize("row", [4, 37, 74])
def test_rows_that_no_such_group_divides_have_a_scale_for_each_channel(row: int) -> None:
    found = Settings(bits=4, quality="fast").recipe((1, 8, row))
    assert found.grid.scheme == Affine(4, symmetric=False)


def test_eight_bits_keep_their_grid_and_their_inputs() -> None:
    found = recipe(bits=8, quality="fast")
    assert found.grid.scheme == Affine(8)
    assert found.activations.mode == "static"
    assert found.observer == MSE()


def test_casts_are_casts() -> None:
    assert recipe(bits=16, quality="best").rounding == RoundToNearest()


def test_an_unknown_one_is_refused_with_the_names() -> None:
    with pytest.raises(ConfigurationError, match="quality is 'fast', 'balanced', 'best', not 'b"):
        Quantizer().quality("better")


def test_it_is_written_down_and_pastes_back() -> None:
    quantizer = Quantizer().bits(3).quality("balanced")
    assert repr(quantizer) == "Quantizer().bits(3).quality('balanced')"
    assert repr(Quantizer.from_config(quantizer.to_config())) == repr(quantizer)


def net() -> nn.Sequential:
    """Return a model whose weights are spread as trained ones are."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if name.endswith("weight"):
                weight.copy_(noise(*weight.shape) * noise(*weight.shape, seed=1) / 8)
    return made


def test_the_plan_says_what_was_chosen_and_what_that_takes() -> None:
    said = Quantizer().bits(4).quality("balanced").fit(DATA).plan(net()).explain()
    assert "quality 'balanced': 2 weights by GPTQ, block after block, in about three runs" in said
    assert "ranges by MSE(" in said
    assert "TuneScales" not in said


TUNED = "quality 'best': the quantized model is put right by TuneScales(steps=64"
TURNED = "quality 'best': the float model is changed first by Rotate()"
LEFT_OUT = "quality 'best' leaves out TuneScales("


def texts(result: QuantizationResult[nn.Sequential], done: bool) -> str:
    return "; ".join(change.text for change in result.report.changes if change.done is done)


def test_the_best_one_tunes_the_whole_model_and_the_plan_says_so() -> None:
    plan = Quantizer().bits(4).quality("best").fit(DATA).plan(net())
    assert TUNED in plan.explain()
    assert TURNED in plan.explain()
    assert {"Rotate", "TuneScales"} <= set(plan.estimate_time().left_out)
    assert "scales, biases and norms are tuned" in texts(plan.run(progress=False), done=True)


@pytest.mark.parametrize(
    "said",
    [
        Quantizer().bits(4).quality("best"),
        Quantizer().bits(4).quality("best").fit(DATA).rounding(RoundToNearest()),
        Quantizer().bits(4).quality("best").fit(DATA).rounding(GPTQ(damping=0.1, refinements=2)),
        Quantizer().bits(4).quality("best").fit(DATA).transform(BiasCorrection()),
        Quantizer().bits(16).quality("best").fit(DATA),
        Quantizer().bits(4).quality("fast").fit(DATA),
    ],
    ids=["no data", "rounding", "the same rounding", "correction", "cast", "fast"],
)
def test_what_is_said_leaves_nothing_to_be_chosen(said: Quantizer) -> None:
    result = said.apply(net(), progress=False)
    assert "tuned" not in texts(result, done=True) + texts(result, done=False)
    assert "TuneScales" not in said.plan(net()).explain()


def test_a_correction_of_ones_own_takes_the_place_of_the_chosen_one() -> None:
    own = Quantizer().bits(4).quality("best").transform(TuneScales(steps=9)).fit(DATA)
    assert TUNED not in own.plan(net()).explain()
    assert TURNED in own.plan(net()).explain()
    assert "are tuned to what the model returns" in texts(own.apply(net()), done=True)


def test_a_transform_of_ones_own_takes_the_place_of_the_chosen_one() -> None:
    own = Quantizer().bits(4).quality("best").transform(EqualizeLayers()).fit(DATA)
    assert TURNED not in own.plan(net()).explain()
    assert TUNED in own.plan(net()).explain()
    assert "turned" not in texts(own.apply(net()), done=True)


def test_statistics_are_no_data_to_tune_on() -> None:
    quantizer = Quantizer().bits(4).quality("best")
    statistics = quantizer.fit(DATA).plan(net()).calibrate(progress=False)
    assert "TuneScales" not in quantizer.statistics(statistics).plan(net()).explain()


def test_in_place_nothing_is_tuned_and_the_report_says_so() -> None:
    quantizer = Quantizer().bits(4).quality("best").fit(DATA)
    result = quantizer.apply_(net(), progress=False)
    assert LEFT_OUT in texts(result, done=False)
    assert "not kept in place" in texts(result, done=False)
    assert TUNED not in str(result.report)


def test_a_model_that_is_too_large_is_not_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mono_quant.plan.chosen.LARGEST_TUNED", 4 * 2 * 64 * 128 - 1)
    plan = Quantizer().bits(4).quality("best").fit(DATA).plan(net())
    assert LEFT_OUT in plan.explain()
    assert "are 65.54 kB in float32, and up to 65.53 kB is worked on" in plan.explain()
    result = plan.run(progress=False)
    assert LEFT_OUT in texts(result, done=False)
    assert "tuned" not in texts(result, done=True)
    monkeypatch.setattr("mono_quant.plan.chosen.LARGEST_TUNED", 4 * 2 * 64 * 128)
    assert TUNED in Quantizer().bits(4).quality("best").fit(DATA).plan(net()).explain()


def test_a_file_tells_how_to_make_the_same_model_again() -> None:
    quantizer = Quantizer().bits(4).quality("best")
    again = Quantizer.from_config(quantizer.to_config())
    one, other = (each.fit(DATA).apply(net(), progress=False) for each in (quantizer, again))
    assert same_tensors(one.model, other.model)


def test_the_plan_says_that_there_is_nothing_to_learn_from() -> None:
    said = Quantizer().bits(4).quality("best").plan(net()).explain()
    assert "quality 'best' learns from data, of which fit(data) gave none" in said
    assert "learns from data" not in Quantizer().bits(4).quality("fast").plan(net()).explain()


def test_better_ones_are_better() -> None:
    found = [
        Quantizer().bits(3).quality(name).fit(DATA).apply(net()).report.output_sqnr_db
        for name in QUALITIES
    ]
    fast, balanced, best = (one if one is not None else 0.0 for one in found)
    assert fast + 1 < balanced
    assert balanced - 0.2 < best  # on the data of its own, which is little


class Worded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.net = nn.Embedding(16, 64), net()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(self.words(x))
        return out


@pytest.mark.parametrize("quality", ["balanced", "best"])
def test_weights_that_are_looked_up_have_no_inputs_to_learn_from(quality: str) -> None:
    torch.manual_seed(0)
    model, data = Worded().eval(), [torch.arange(16).reshape(4, 4)]
    plan = Quantizer().bits(8).quality(quality).fit(data).plan(model)
    roundings = {one.key: one.recipe.rounding for one in plan.weights if one.recipe is not None}
    assert roundings["words.weight"] == RoundToNearest()
    assert roundings["net.0.weight"] == QUALITIES[quality].rounding
    assert "gave none" not in plan.explain()
    tied = nn.Sequential(nn.Embedding(16, 64), nn.Linear(64, 64), nn.Linear(64, 16)).eval()
    tied[2].weight = tied[0].weight
    assert Quantizer().bits(8).quality(quality).fit(data).apply(tied).validate()


def test_what_does_not_learn_because_so_was_said_lacks_no_data() -> None:
    quantizer = Quantizer().quality("best").fit(DATA)
    for said in (quantizer.bits(16), quantizer.bits(4).rounding(RoundToNearest())):
        assert "gave none" not in said.plan(net()).explain()
