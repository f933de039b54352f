"""The pictures by matplotlib, where that is installed."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from mono_quant import Quantizer, Report
from mono_quant.errors import ConfigurationError
from tests.helpers import noise
from tests.test_public_api import run

INSTALLED = importlib.util.find_spec("matplotlib") is not None


def report(*, data: bool = True) -> Report:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(5)))
    quantizer = Quantizer().bits(4)
    return (quantizer.fit(noise(8, 64)) if data else quantizer).apply(model, progress=False).report


WITHOUT = """
import sys
sys.modules["matplotlib"] = None  # any import of it fails from here on
from mono_quant import ConfigurationError, Report
try:
    Report(()).plot()
except ConfigurationError as error:
    print(error)
"""


def test_without_matplotlib_the_error_says_what_to_install() -> None:
    assert "pip install matplotlib" in run(WITHOUT)


@pytest.mark.skipif(not INSTALLED, reason="matplotlib is not installed")
def test_lines_are_the_figures_of_the_report(tmp_path: Path) -> None:
    from mono_quant.pictures.plot import draw

    found = report()
    figure = draw(found.layers, found.output_sqnr_db, found.estimated)
    first, second, *histograms = figure.axes
    weights, layers, *_ = first.get_lines()
    assert list(weights.get_ydata()) == [row.sqnr_db for row in found.quantized]
    assert list(layers.get_ydata()) == [row.output_sqnr_db for row in found.quantized]
    _, inside, *_ = second.get_lines()
    expected = [*(row.accumulated_db for row in found.quantized), found.output_sqnr_db]
    assert list(inside.get_ydata()) == expected
    worst = sorted(found.quantized, key=lambda row: row.harm_db)[:3]
    assert [axes.get_title() for axes in histograms] == [row.name for row in worst]
    found.plot().savefig(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.skipif(not INSTALLED, reason="matplotlib is not installed")
def test_a_notebook_shows_the_figure_without_pyplot() -> None:
    from mono_quant.pictures.plot import draw

    found = report(data=False)
    figure = draw(found.layers, found.output_sqnr_db, found.estimated)
    assert figure._repr_png_()[:4] == b"\x89PNG"
    assert len(figure.axes) == 4  # nothing accumulates without data


@pytest.mark.skipif(not INSTALLED, reason="matplotlib is not installed")
def test_gaps_are_gaps() -> None:
    from mono_quant.pictures.plot import _floats

    one, other = _floats([None, 1.0])
    assert math.isnan(one)
    assert other == 1.0


@pytest.mark.skipif(INSTALLED, reason="matplotlib is installed")
def test_where_it_is_not_installed_the_error_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="matplotlib"):
        report().plot()
