"""Biases that make up for what rounding did to the mean."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mono_quant import BiasCorrection, InputError, Quantizer, load_model
from mono_quant.base import CorrectionContext
from mono_quant.calibration import CalibrationData
from tests.helpers import WEIGHTS_ONLY, noise

COARSE = WEIGHTS_ONLY.bits(3).granularity("channel").only("*")
CORRECTED = COARSE.transform(BiasCorrection())


def depthwise(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 8, 3, groups=8, bias=bias),
        nn.ReLU(),
        nn.Conv2d(8, 16, 1, bias=bias),
        nn.Flatten(),
        nn.Linear(16 * 36, 4, bias=bias),
    ).eval()


def images() -> Tensor:
    return noise(64, 8, 8, 8) + 1.5  # inputs of which the mean is not zero


def means(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the mean of each channel after each layer of a sequence, in float64."""
    found = []
    for layer in model.children():
        x = layer(x)
        if not isinstance(layer, nn.ReLU | nn.Flatten):
            found.append(x.double().transpose(0, 1).flatten(1).mean(1))
    return found


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_every_layer_returns_the_mean_of_its_float_twin(bias: bool) -> None:
    source, x = depthwise(bias), images()
    batches = list(torch.split(x, 16))
    plain = COARSE.fit(batches).apply(source).model
    result = CORRECTED.fit(batches).apply(source)
    expected = means(source, x)
    for one, two in zip(means(plain, x), expected, strict=True):
        assert (one - two).abs().max() > 1e-3, "there is something to correct"
    for one, two in zip(means(result.model, x), expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


def test_the_output_is_closer_and_the_report_says_what_was_done() -> None:
    source, batches = depthwise(), [images()]
    plain = COARSE.fit(batches).apply(source).report
    report = CORRECTED.fit(batches).apply(source).report
    assert plain.output_sqnr_db is not None
    assert report.output_sqnr_db is not None
    assert report.output_sqnr_db > plain.output_sqnr_db + 1
    assert [change.path for change in report.changes] == ["0", "2", "4"]
    assert "the bias of '0' is corrected" in str(report)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_biases_that_were_added_are_counted_and_come_back(suffix: str, tmp_path: Path) -> None:
    source, x = depthwise(bias=False), images()
    result = CORRECTED.fit([x]).apply(source)
    assert "bias" not in dict(source.named_parameters())
    (row,) = [row for row in result.report.kept if "bias" in row.name]
    assert row.bytes == 4 * (8 + 16 + 4)
    loaded = load_model(result.save(tmp_path / f"model{suffix}"), depthwise(bias=False))
    assert torch.equal(loaded(x), result.model(x))
    assert result.validate()


def test_a_layer_that_runs_twice_and_one_that_shares_its_bias_are_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.again = nn.Linear(64, 64)
            self.one = nn.Linear(64, 64)
            self.two = nn.Linear(64, 64)
            self.two.bias = self.one.bias

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.two(self.one(self.again(torch.relu(self.again(x)))))
            return found

    source = Twice().eval()
    result = CORRECTED.fit([noise(8, 64)]).apply(source)
    texts = {change.path: change.text for change in result.report.changes}
    assert texts["again"].endswith("it runs more than once")
    assert texts["one"].endswith("it shares its bias")
    assert not any(change.done for change in result.report.changes)
    assert torch.equal(result.model.one.bias, source.one.bias)
    assert "left alone: the bias of 'again' is not corrected" in str(result.report)


def test_what_does_not_run_once_for_each_batch_is_left_alone() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice = nn.Linear(64, 64)
            self.positive = nn.Linear(64, 64)
            self.negative = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            x = self.twice(self.twice(x))
            found: Tensor = self.positive(x) if bool(x.sum() > 0) else self.negative(x)
            return found

    source = Routed().eval()
    batches = [noise(8, 64) + shift for shift in (-20, 20, 40)]
    report = CORRECTED.fit(batches).apply(source).report
    texts = {change.path: change.text.rpartition(": ")[2] for change in report.changes}
    assert texts == {
        "twice": "it runs more than once",
        "positive": "it does not run for each batch",
        "negative": "it does not run for each batch",
    }
    twice = nn.Sequential(layer := nn.Linear(64, 64), nn.ReLU(), layer)
    (change,) = CORRECTED.fit([noise(8, 64)]).apply(twice).report.changes
    assert change.text.endswith("it runs more than once"), "and no other layer to compare with"


def test_in_place_it_is_refused() -> None:
    with pytest.raises(InputError, match="use apply"):
        CORRECTED.fit([images()]).apply_(depthwise())


def test_a_batch_that_is_smaller_counts_for_less() -> None:
    source, x = depthwise(), images()
    whole = CORRECTED.fit([x]).apply(source).model
    split = CORRECTED.fit([x[:50], x[50:]]).apply(source).model
    for one, two in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_the_quantizer_writes_it_down() -> None:
    made = Quantizer().transform(BiasCorrection()).fold(False).on_damage("keep")
    assert repr(made) == ("Quantizer().fold(False).on_damage('keep').transform(BiasCorrection())")
    again = Quantizer.from_config(made.to_config())
    assert repr(again) == repr(made)


@pytest.mark.parametrize("bias", [False, True])
def test_corrections_that_undo_what_layers_make_up_for_are_taken_back(bias: bool) -> None:
    torch.manual_seed(0)
    floats = nn.Sequential(nn.Linear(64, 64, bias), nn.ReLU(), nn.Linear(64, 64, bias)).eval()
    other = copy.deepcopy(floats)
    with torch.no_grad():  # the same function, and other means between
        for place, factor in ((0, 2.0), (2, 0.5)):
            other.get_parameter(f"{place}.weight").mul_(factor)
        if bias:
            other.get_parameter("0.bias").mul_(2)
    model = WEIGHTS_ONLY.bits(8).only("*").apply(other).model
    given = [model[place].bias for place in (0, 2)]
    data = CalibrationData.bind([noise(32, 64) + 0.5])
    context = CorrectionContext(floats, floats, data.inner_outputs)
    changes = BiasCorrection().apply(model, context)
    assert [change.done for change in changes] == [False, False]
    assert all("further off" in change.text and not change.edits for change in changes)
    assert all(model[place].bias is one for place, one in zip((0, 2), given, strict=True))
