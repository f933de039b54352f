"""Reports that are measured on other data than what was calibrated on, or on data alone."""

import pytest
import torch
from torch import Tensor, nn

from mono_quant import (
    GPTQ,
    CalibrationError,
    DamageError,
    InputError,
    QuantizationResult,
    Quantizer,
)
from tests.helpers import WEIGHTS_ONLY, noise, same_tensors, sqnr64
from tests.plan.models import mlp
from tests.plan.test_damage import uneven

CALIBRATION = [noise(16, 128) for _ in range(2)]
APART = [noise(16, 128) * 3 for _ in range(3)]
NOTE = "measured on other data than it was calibrated on"

WAYS = {
    "static": Quantizer().activations("static"),
    "GPTQ": Quantizer().bits(4).rounding(GPTQ()),
}


def output_db(model: nn.Module, result: QuantizationResult[nn.Sequential]) -> float:
    with torch.no_grad():
        found = [(model(x), result.model(x)) for x in APART]
    return sqnr64([before for before, _ in found], [after for _, after in found])


@pytest.mark.parametrize("way", WAYS)
def test_the_report_is_of_that_data_and_the_model_of_the_other(way: str) -> None:
    model, quantizer = mlp(), WAYS[way].fit(CALIBRATION)
    plain = quantizer.apply(model, progress=False)
    apart = quantizer.measure_on(APART).apply(model, progress=False)
    assert same_tensors(plain.model, apart.model)
    assert apart.report.output_sqnr_db == pytest.approx(output_db(model, apart), abs=0.01)
    assert abs(output_db(model, apart) - (plain.report.output_sqnr_db or 0)) > 0.05
    assert (plain.report.samples, apart.report.samples) == (32, 48)
    assert NOTE in apart.report.notes
    assert NOTE not in plain.report.notes
    assert all(row.output_sqnr_db is not None for row in apart.report.quantized)


@pytest.mark.parametrize("way", WAYS)
def test_the_order_of_the_calls_does_not_matter(way: str) -> None:
    model = mlp()
    one = WAYS[way].fit(CALIBRATION).measure_on(APART).apply(model, progress=False)
    other = WAYS[way].measure_on(APART).fit(CALIBRATION).apply(model, progress=False)
    assert one.report.to_dict() == other.report.to_dict()


def test_a_model_that_needs_no_data_is_measured() -> None:
    model, quantizer = mlp(), WEIGHTS_ONLY.bits(4)
    plain = quantizer.apply(model, progress=False)
    found = quantizer.measure_on(APART).apply(model, progress=False)
    assert same_tensors(plain.model, found.model)
    assert plain.report.output_sqnr_db is None
    assert found.report.output_sqnr_db == pytest.approx(output_db(model, found), abs=0.01)
    assert NOTE not in found.report.notes
    assert found.validate()


def test_it_calibrates_nothing() -> None:
    with pytest.raises(CalibrationError, match=r"give some with fit\(data\)"):
        Quantizer().activations("static").measure_on(APART).plan(mlp())
    with pytest.raises(CalibrationError, match=r"give some with fit\(data\)"):
        Quantizer().measure_on(APART).graph().plan(mlp())
    eight = Quantizer().measure_on(APART).apply(mlp(), progress=False)
    assert "dynamic" in (eight.report.quantized[0].activation or "")


def test_statistics_calibrate_beside_it() -> None:
    model, quantizer = mlp(), WAYS["static"]
    gathered = quantizer.fit(CALIBRATION).plan(model).calibrate()
    found = quantizer.statistics(gathered).measure_on(APART).apply(model, progress=False)
    assert found.report.output_sqnr_db == pytest.approx(output_db(model, found), abs=0.01)
    assert NOTE in found.report.notes


def test_in_place_and_as_a_graph() -> None:
    quantizer = Quantizer().fit(CALIBRATION).measure_on(APART)
    model = mlp()
    float_outputs = [model(x).detach() for x in APART]
    graph = quantizer.graph().apply(model, progress=False)
    with torch.no_grad():
        expected = sqnr64(float_outputs, [graph.model(x) for x in APART])
    assert graph.report.output_sqnr_db == pytest.approx(expected, abs=0.01)
    kept = quantizer.apply(model, progress=False).report.output_sqnr_db
    assert graph.report.class_kept_sqnr_db == pytest.approx(kept, abs=0.01)
    inside = quantizer.apply_(model, progress=False)
    assert inside.report.output_sqnr_db == pytest.approx(kept, abs=0.01)
    assert inside.report.samples == 48


def test_damage_is_told_by_it() -> None:
    model, quiet = uneven()
    loud = quiet.clone()
    loud[:, 0] *= 1e5  # what the large weights are met by is as loud as all else
    quantizer = WEIGHTS_ONLY.on_damage("error")
    quantizer.measure_on(loud).apply(model, progress=False)
    with pytest.raises(DamageError, match=r"mix\.weight"):
        quantizer.fit(loud).measure_on(quiet).apply(model, progress=False)
    kept = WEIGHTS_ONLY.on_damage("keep").fit(loud).measure_on(quiet)
    rows = {row.name: row for row in kept.apply(model, progress=False).report.layers}
    assert "16" in (rows["mix.weight"].scheme or "")


def test_the_model_is_called_as_for_calibration_unless_it_says_how() -> None:
    def doubled(model: nn.Module, batch: object) -> Tensor:
        assert isinstance(batch, Tensor)
        found: Tensor = model(2 * batch)
        return found

    def plainly(model: nn.Module, batch: object) -> Tensor:
        found: Tensor = model(batch)
        return found

    model, quantizer = mlp(), WAYS["static"].fit(CALIBRATION, forward=doubled)
    same = quantizer.measure_on(APART).apply(model, progress=False).report
    own = quantizer.measure_on(APART, forward=plainly).apply(model, progress=False).report
    twice = [2 * x for x in APART]
    told = quantizer.measure_on(twice, forward=plainly).apply(model, progress=False).report
    assert same.output_sqnr_db == told.output_sqnr_db != own.output_sqnr_db


def test_labels_of_either_data_are_named_once() -> None:
    labels = torch.zeros(16)
    pairs = [(x, labels) for x in CALIBRATION], [(x, labels) for x in APART]
    quantizer = WAYS["static"]
    for calibration, apart in (pairs, (pairs[0], APART), (CALIBRATION, pairs[1])):
        found = quantizer.fit(calibration).measure_on(apart).apply(mlp(), progress=False)
        assert sum("taken for labels" in note for note in found.report.notes) == 1


def test_what_cannot_be_measured_on_is_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        Quantizer().measure_on([])
    with pytest.raises(InputError, match=r"measure_on\(data\) has no use"):
        Quantizer().measure_on(APART).plan({"0.weight": torch.randn(8, 8)})
    bad = Quantizer().measure_on([APART[0], APART[1] * float("nan")])
    with pytest.raises(CalibrationError, match="batch 1 of the data holds NaN"):
        bad.apply(mlp(), progress=False)
