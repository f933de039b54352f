"""Histograms of the worst layers, and the ranges that are drawn into them."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from mono_quant import Distribution, Microscaling, Quantizer
from tests.helpers import GRIDS, noise


def network(layers: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(layers))).eval()


def drawn(quantizer: Quantizer, model: nn.Module) -> dict[str, Distribution]:
    rows = quantizer.apply(model, progress=False).report.layers
    return {row.name: row.histogram for row in rows if row.histogram is not None}


@pytest.mark.parametrize("data", [False, True])
def test_a_histogram_counts_every_value_of_its_weight(data: bool) -> None:
    model = network()
    with torch.no_grad():
        model.get_parameter("1.weight")[:, :5] = 0
    quantizer = Quantizer().bits(4).fit(noise(8, 64)) if data else Quantizer().bits(4)
    found = drawn(quantizer, model)
    assert set(found) == {f"{place}.weight" for place in range(3)}
    for name, histogram in found.items():
        values = model.get_parameter(name).detach().flatten()
        assert histogram.zeros == int((values == 0).sum())
        assert (histogram.low, histogram.high) == (float(values.min()), float(values.max()))
        ends = [
            histogram.start + place * histogram.width for place in range(len(histogram.counts) + 1)
        ]
        rest = values[values != 0].double()
        counts = [int(((rest >= low) & (rest < high)).sum()) for low, high in pairwise(ends)]
        assert list(histogram.counts) == counts
        assert sum(counts) == rest.numel()


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_range_of_a_symmetric_grid_is_its_codes_times_its_scales(bits: int) -> None:
    model = network(1)
    (histogram,) = drawn(Quantizer().bits(bits).symmetric().granularity("channel"), model).values()
    most = (1 << (bits - 1)) - 1
    peaks = model.get_parameter("0.weight").detach().abs().amax(1)
    scales = (peaks / most).half().float()  # as they are stored
    low, high = -(most + 1) * scales, most * scales
    assert histogram.covered == pytest.approx((float(low.min()), float(high.max())), rel=1e-6)
    median = (float(low.median()), float(high.median()))
    assert histogram.typical == pytest.approx(median, rel=1e-6)


RANGED = {
    **{name: grid for name, grid in GRIDS.items() if name != "16-bit"},
    "MXFP4": Quantizer().scheme(Microscaling.mxfp4()),
    "NVFP4": Quantizer().scheme(Microscaling.nvfp4()),
}


@pytest.mark.parametrize("name", RANGED)
def test_the_range_that_is_drawn_holds_every_dequantized_weight_and_little_more(name: str) -> None:
    result = RANGED[name].apply(network(1), progress=False)
    histogram = result.report.layers[0].histogram
    assert histogram is not None
    assert histogram.covered is not None
    values = result.dequantize().state_dict()["0.weight"]
    low, high = histogram.covered
    room = 1e-6 * (high - low)
    assert low - room <= float(values.min())
    assert float(values.max()) <= high + room
    assert high - low < 1.6 * (histogram.high - histogram.low)


def test_columns_that_are_kept_apart_are_not_drawn() -> None:
    model = network(1)
    with torch.no_grad():
        model.get_parameter("0.weight")[:, 7] *= 100
    (histogram,) = drawn(Quantizer().outliers(1), model).values()
    rest = model.get_parameter("0.weight").detach().clone()
    rest[:, 7] = 0
    assert (histogram.low, histogram.high) == (float(rest.min()), float(rest.max()))
    assert histogram.covered is not None
    assert histogram.covered[1] < 2 * histogram.high


def test_one_range_for_all_has_no_median_block() -> None:
    (histogram,) = drawn(Quantizer().granularity("tensor"), network(1)).values()
    assert histogram.covered is not None
    assert histogram.typical is None


def test_a_cast_has_no_range() -> None:
    (histogram,) = drawn(Quantizer().bits(16), network(1)).values()
    assert (histogram.covered, histogram.typical) == (None, None)


@pytest.mark.parametrize("data", [False, True])
def test_only_the_worst_six_are_kept(data: bool) -> None:
    quantizer = Quantizer().bits(4).fit(noise(8, 64)) if data else Quantizer().bits(4)
    report = quantizer.apply(network(20), progress=False).report
    ranked = sorted(report.quantized, key=lambda row: row.harm_db)
    assert [row.histogram is not None for row in ranked] == [True] * 6 + [False] * 14
    figures = [row.output_sqnr_db if data else row.estimated_db for row in ranked]
    assert figures == sorted(figures, key=lambda figure: figure or 0)


def test_in_place_weights_are_drawn_too() -> None:
    copied, model = network(), network()
    quantizer = Quantizer().bits(4)
    expected = quantizer.apply(copied, progress=False).report
    found = quantizer.apply_(model, progress=False).report
    assert [row.histogram for row in found.layers] == [row.histogram for row in expected.layers]


def test_inputs_are_drawn_with_a_calibrated_range() -> None:
    model, data = network(1), noise(64, 64)
    report = Quantizer().activations("static").fit(data).apply(model, progress=False).report
    (one,) = report.layers[0].inputs
    assert one.histogram is not None
    assert sum(one.histogram.counts) + one.histogram.zeros == data.numel()
    assert (one.histogram.low, one.histogram.high) == (one.low, one.high)
    assert one.histogram.covered is not None
    low, high = one.histogram.covered
    step = (high - low) / 255
    assert low == pytest.approx(one.low, abs=step)
    assert high == pytest.approx(one.high, abs=step)


def test_dynamic_inputs_have_no_range() -> None:
    quantizer = Quantizer().activations("dynamic").fit([noise(8, 64), noise(8, 64, seed=1)])
    (one,) = quantizer.apply(network(1), progress=False).report.layers[0].inputs
    assert one.histogram is not None
    assert one.histogram.covered is None
    assert sum(one.histogram.counts) + one.histogram.zeros == 2 * 8 * 64


def test_what_is_drawn_is_the_same_every_time() -> None:
    quantizer = Quantizer().bits(4).fit(noise(8, 64))
    one, other = (quantizer.apply(network(8), progress=False).report for _ in range(2))
    assert one.to_dict() == other.to_dict()


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-10, 1e30, 3e38])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_of_any_size_are_drawn(size: float, bits: int, tmp_path: Path) -> None:
    model = network(1)
    with torch.no_grad():
        model.get_parameter("0.weight").sign_().mul_(size)
    result = Quantizer().bits(bits).apply(model, progress=False)
    histogram = result.report.layers[0].histogram
    assert histogram is not None
    assert (histogram.low, histogram.high) == pytest.approx((-size, size), rel=1e-6)
    page = result.report.to_html(tmp_path / "report.html").read_text("utf-8")
    assert not re.search(r'="[^"]*\b(nan|inf)\b', page)
