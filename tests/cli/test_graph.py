"""`--graph`: layers that pass codes on, and the file that holds the model of its class."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from mono_quant import Quantizer, load_model
from tests.cli.conftest import SMALL, Monoquant
from tests.cli.networks import convolutions
from tests.helpers import same_tensors

MODEL = ("--factory", "tests.cli.networks:convolutions", "--calibration", "images.pt")


@pytest.fixture
def images(folder: Path) -> torch.Tensor:
    """Save a batch of images, and return it."""
    batch = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.save(batch, folder / "images.pt")
    return batch


def test_a_graph_is_what_the_builder_makes_of_it(
    images: torch.Tensor, monoquant: Monoquant
) -> None:
    done = monoquant("quantize", *MODEL, "--graph", "-o", "s.safetensors")
    result = Quantizer().fit(images).graph().apply(convolutions(), progress=False)
    assert done.code == 0
    for line in result.report.flow:
        assert line in done.out
    assert "validation: valid" in done.out
    loaded = load_model("s.safetensors", convolutions())
    assert isinstance(loaded, nn.Sequential)
    assert same_tensors(loaded, result.kept.model)


def test_a_graph_is_planned_and_measured(images: torch.Tensor, monoquant: Monoquant) -> None:
    assert "written as a graph" in monoquant("plan", *MODEL, "--graph").out
    assert monoquant("quantize", *MODEL, "-o", "s.safetensors", "--quiet").code == 0
    model = (*MODEL[:2], "--example", "images.pt")
    words = ("benchmark", "s.safetensors", *model, "--seconds", 0.01, "--json")
    kept, graph = monoquant(*words).json, monoquant(*words, "--graph").json
    assert kept["kernels"]
    assert kept["kernels"] != graph["kernels"]


def test_a_configuration_says_that_it_is_of_a_graph(
    images: torch.Tensor, folder: Path, monoquant: Monoquant
) -> None:
    dumped = monoquant("quantize", "--graph", "--bits", 8, "--dump-config")
    assert dumped.json == Quantizer().bits(8).graph().to_config()
    (folder / "graph.json").write_text(json.dumps(dumped.json))
    done = monoquant("plan", *MODEL, "--config", "graph.json")
    assert "written as a graph" in done.out
    words = ("calibrate", *MODEL, "--config", "graph.json", "-o", "t.safetensors")
    assert "take 'graph' out of the configuration" in monoquant(*words).complaint


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("model.pt",), "a bare checkpoint has none: add --factory package.module:name"),
        (("--factory", SMALL), "give some with --calibration FILE"),
        ((*MODEL, "--in-place"), "--in-place does not go together with --graph"),
        ((*MODEL, "--sequential"), "--sequential does not go together with --graph"),
        ((*MODEL, "--resume", "blocks"), "--resume does not go together with --graph"),
        ((*MODEL, "--only-if-faster", "--example", "images.pt"), "leave one of the two out"),
        ((*MODEL, "--activations", "float"), "no layer would pass codes in a graph"),
    ],
    ids=["bare", "data", "in place", "sequential", "resume", "faster", "float"],
)
def test_what_no_graph_can_be_made_of_is_refused_in_one_line(
    words: tuple[str, ...], complaint: str, images: torch.Tensor, monoquant: Monoquant
) -> None:
    done = monoquant("quantize", *words, "--graph", "-o", "s.pt")
    assert done.code == 2
    assert complaint in done.complaint
    assert not Path("s.pt").exists()
