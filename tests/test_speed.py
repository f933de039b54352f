"""Speed beside the float model: what is compared, how often, and how it is told."""

import html
from pathlib import Path
from typing import cast

import attrs
import pytest
import torch
from torch import Tensor, nn

from mono_quant import InputError, LayerReport, Quantizer, Report, Speed, kernels
from mono_quant.benchmark import measure_speed
from mono_quant.calibration import CalibrationData
from mono_quant.configurable import Config
from mono_quant.speed import LayerSpeed, Turns
from tests.helpers import noise


class Clock:
    """Time that passes when a model runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Timed(nn.Module):
    """Takes as long as the next of its durations says, and notes that it was called."""

    def __init__(self, name: str, clock: Clock, durations: list[float], log: list[str]) -> None:
        super().__init__()
        self.name, self.clock, self.durations, self.log = name, clock, durations, log

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        place = self.log.count(self.name)
        self.clock.now += self.durations[min(place, len(self.durations) - 1)]
        self.log.append(self.name)
        return x


def timed(
    monkeypatch: pytest.MonkeyPatch, floats: list[float], quantized: list[float], seconds: float
) -> tuple[Speed, list[str]]:
    """Return the speed of two models that take so long for their calls, and who was called."""
    clock, log = Clock(), list[str]()
    monkeypatch.setattr("mono_quant.speed.time", clock)
    one, other = Timed("float", clock, floats, log), Timed("quantized", clock, quantized, log)
    data = CalibrationData.bind(torch.ones(2, 3), 1, None)
    found = measure_speed(one.train(), other.train(), data, seconds)
    assert one.training
    assert other.training
    return found, log


def test_models_take_turns_and_the_first_call_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, log = timed(monkeypatch, [100.0, 3.0], [200.0, 2.0], 0.0)
    assert (found.float_seconds, found.seconds, found.ratio, found.rounds) == (3.0, 2.0, 1.5, 5)
    assert log[:6] == ["float", "quantized", "float", "quantized", "quantized", "float"]
    assert found.faster
    assert "1.50 times as fast as float: 3000 ms -> 2000 ms a call" in str(found)


def test_the_ratio_is_of_each_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = [0.0, 1.0, 10.0, 1.0, 10.0, 1.0]  # a machine that is busy every other turn
    found, _ = timed(monkeypatch, slow, [2 * one for one in slow], 0.0)
    assert found.ratio == 0.5
    assert not found.faster
    assert "slower than float, 2.00 times its time" in str(found)


def test_it_goes_on_for_the_time_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = timed(monkeypatch, [1.0], [1.0], 20.0)
    assert found.rounds == 11
    assert "as fast as float" in str(found)
    assert not found.faster


def test_a_layer_is_judged_by_what_a_quiet_moment_shows() -> None:
    turns = Turns((9.0, 1.0, 2.0, 9.0, 9.0), (1.0, 9.0, 3.0, 5.0, 9.0))
    assert turns.quiet == LayerSpeed(2.0, 3.0)
    assert Turns((3.0,), (2.0,)).quiet.ratio == 1.5


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(512, 256), nn.Dropout(), nn.Sequential(nn.Linear(256, 8)), nn.LSTM(8, 8)
    )


def test_it_names_what_computed_each_weight() -> None:
    result = Quantizer().only("*").fit(noise(4, 512)).apply(network(), progress=False)
    with kernels.use("reference"):
        found = result.benchmark(seconds=0.0)
    assert found.kernels == {
        "0.weight": "reference",
        "2.0.weight": "reference",
        "3.weight_ih_l0": "reference",
        "3.weight_hh_l0": "reference",
    }
    assert "kernels: reference 4" in str(found)
    assert found.threads == torch.get_num_threads()
    assert found.to_dict()["kernels"] == dict(found.kernels)


def test_an_example_may_be_given_and_one_is_needed() -> None:
    x = noise(2, 512)
    result = Quantizer().apply(network()[:1], progress=False)
    before = {name: tensor.clone() for name, tensor in result.model.state_dict().items()}
    assert result.benchmark(x, seconds=0.0).rounds == 5
    after = result.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(InputError, match=r"benchmark\(example\)"):
        result.benchmark()
    bare = Quantizer().apply({"weight": noise(64, 64)}, progress=False)
    with pytest.raises(InputError, match="needs a model"):
        bare.benchmark(x)


def test_a_graph_is_measured_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))
    result = Quantizer().only("*").fit(noise(2, 3, 9, 9)).graph().apply(model, progress=False)
    found = result.benchmark(seconds=0.0)
    assert found.rounds == 5
    assert result.report.speed == found
    assert result.kept.report.speed is None


def test_the_report_tells_the_speed_once_it_is_measured(tmp_path: Path) -> None:
    result = Quantizer().fit(noise(4, 512)).apply(network()[:3], progress=False)
    before, saved = result.report, result.save(tmp_path / "before.safetensors").read_bytes()
    assert before.speed is None
    assert "kernel" not in str(before)
    with kernels.use("reference"):
        found = result.benchmark(seconds=0.0)
    report = result.report
    assert report.speed == found
    assert {row.name: row.kernel for row in report.quantized} == found.kernels
    assert all(row.kernel is None for row in report.kept)
    line, kernels_line = str(found).splitlines()
    for text in (str(report), report.to_markdown(), html.unescape(report._repr_html_())):
        assert line in text
        assert kernels_line in text
        assert "kernel" in text.replace(kernels_line, "")
    assert report.to_dict()["speed"] == found.to_dict()
    assert attrs.evolve(report, speed=None, layers=before.layers) == before
    assert result.save(tmp_path / "after.safetensors").read_bytes() == saved


def test_a_tied_weight_tells_every_kernel_that_computed_with_it() -> None:
    row = LayerReport("a", "Linear", (8, 8), 64, 256, 64, "8-bit", aliases=("b", "c", "d"))
    ran = {"a": "int4", "b": "blocks", "c": "int4"}
    report = Report((row,)).with_speed(Speed(1.0, 1.0, 1.0, 5, 1, ran))
    assert report.layers[0].kernel == "int4, blocks"


def test_nothing_else_of_a_result_can_be_set() -> None:
    result = Quantizer().apply(nn.Linear(64, 64), progress=False)
    for name in ("model", "plan"):
        with pytest.raises(attrs.exceptions.FrozenAttributeError):
            setattr(result, name, None)


def test_rows_of_one_layer_count_its_speed_once_and_floats_gain_nothing() -> None:
    both, kept = LayerSpeed(4.0, 1.0), LayerSpeed(2.0, 8.0)
    rows = [
        LayerReport("a.ih", "LSTM", (8, 8), 64, 256, 64, "8-bit", speed=both, kernel="integer"),
        LayerReport("a.hh", "LSTM", (8, 8), 64, 256, 64, "8-bit", speed=both),
        LayerReport("b", "Linear", (8, 8), 64, 256, 256, reason="no gain in speed", speed=kept),
        LayerReport("c", "Linear", (8, 8), 64, 256, 64, "8-bit"),
    ]
    report = Report(tuple(rows))
    assert report.layers_speed == LayerSpeed(6.0, 3.0)
    told = "layers measured one by one: 6000 ms -> 3000 ms a call of the model, 2.00 times as fast"
    for text in (str(report), report.to_markdown(), report.forecast(0, 0)):
        assert told in html.unescape(text)
        assert "4.00x" in text
        assert "integer" in text
    shown = report.to_dict()["layers"]
    assert isinstance(shown, list)
    assert cast("Config", shown[2])["speed"] == {
        "float_seconds": 2.0, "seconds": 8.0, "ratio": 0.25,
    }  # fmt: skip
    assert Report(tuple(rows[3:])).layers_speed is None


def test_bytes_that_kernels_keep_are_told_where_there_are_any() -> None:
    one = Speed(1.0, 1.0, 1.0, 5, 1, {"weight": "onednn"})
    assert str(one).endswith("kernels: onednn 1")
    kept = attrs.evolve(one, kernel_bytes=1_500_000)
    assert str(kept).endswith("kernels: onednn 1; they keep 1.50 MB beside the codes")
    assert kept.to_dict()["kernel_bytes"] == 1_500_000


def test_one_thread_is_told_as_one() -> None:
    one = Speed(1.0, 1.0, 1.0, 5, 1, {})
    assert str(one).endswith("1 thread")
    assert str(attrs.evolve(one, threads=2)).endswith("2 threads")
