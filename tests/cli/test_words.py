"""Advice of reports in the options of the command line."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

from mono_quant import MinMax, OutlierColumns, Quantizer
from mono_quant.cli.words import data_in_options, in_options
from tests.cli.conftest import SMALL, Monoquant

SAME: dict[str, Quantizer] = {
    "override('0', bits=16)": Quantizer().override("0", bits=16),
    "override('0', granularity=\"channel\")": Quantizer().override("0", granularity="channel"),
    "override('*.weight', group_size=32)": Quantizer().override("*.weight", group_size=32),
    "override('0', activations=\"float\")": Quantizer().override("0", activations="float"),
    "override('0', activation_observer=MinMax())": Quantizer().override(
        "0", activation_observer=MinMax()
    ),
    "override('0', bits=8, symmetric=True)": Quantizer().override("0", bits=8, symmetric=True),
    "override('0', outliers=OutlierColumns(), activations=\"dynamic\")": Quantizer().override(
        "0", outliers=OutlierColumns(), activations="dynamic"
    ),
    "skip('0')": Quantizer().skip("0"),
    "skip('it\\'s (one)')": Quantizer().skip("it's (one)"),
    "activations(None)": Quantizer().activations(None),
    "activations('dynamic')": Quantizer().activations("dynamic"),
    'on_damage("keep")': Quantizer().on_damage("keep"),
}


@pytest.mark.parametrize("call", SAME)
def test_an_option_says_what_the_call_says(call: str, folder: Path, monoquant: Monoquant) -> None:
    words = in_options(f"say {call}; that mends it")
    assert words.startswith("say --")
    assert words.endswith("; that mends it")
    given = shlex.split(words.removeprefix("say ").removesuffix("; that mends it"))
    done = monoquant("quantize", "--factory", SMALL, "--dump-config", *given)
    assert done.json == SAME[call].to_config()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("give some with fit(data)", "give some with --calibration FILE"),
        ("leave it out with skip(...)", "leave it out with --skip PATTERN"),
        (
            'activations(None), or override(..., activations="float"), does',
            "--activations float, or --override PATTERN:activations=float, does",
        ),
        ("graph() passes codes on", "--graph passes codes on"),
        ("no example: validate(example=...)", "no example: --example FILE"),
        ("is quantized first, with quantize(...)", "is quantized first, with monoquant quantize"),
        ("call quantize(model) for that", "call quantize(model) for that"),
        (
            "peak memory: 2 MB for apply, 1 MB for apply_\nmore",
            "peak memory: 2 MB, 1 MB with --in-place\nmore",
        ),
    ],
)
def test_what_is_no_whole_setting_is_worded_too(text: str, words: str) -> None:
    assert in_options(text) == words


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no call",
        "to skip (or not)",
        "override(",
        "skip('unclosed",
        "fit(data, forward=f)",
        "activations(mode)",
        "skip(a, b)",
        "override('0')",
        "override('0', observer=MSE(levels=3))",
        "layer(LinearQuantizer(own_forward=True))",
    ],
)
def test_what_has_no_option_stays(text: str) -> None:
    assert in_options(text) == text


def test_data_is_worded_but_for_its_keys() -> None:
    data = {"skip('a')": ["skip('a')", {"n": 1.5}, None, True]}
    assert data_in_options(data) == {"skip('a')": ["--skip a", {"n": 1.5}, None, True]}


def hurt() -> nn.Module:
    """Return a model of whose weights and inputs much is warned."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 50), nn.LSTM(50, 64))
    with torch.no_grad():
        model[0].get_parameter("weight")[:, 0] *= 3000
        model[2].get_parameter("weight")[3] *= 60
    return model


HURT = "tests.cli.test_words:hurt"
CALLS = re.compile(r"\b(override|skip|activations|on_damage|fit)\(|for apply")


@pytest.mark.parametrize("more", [[], ["--granularity", "tensor"], ["--bits", "3"]])
@pytest.mark.parametrize("data", [True, False])
def test_reports_advise_options(
    data: bool, more: list[str], folder: Path, monoquant: Monoquant
) -> None:
    torch.save([torch.randn(16, 64) * torch.logspace(0, 3, 64)], "data.pt")
    given = ["--factory", HURT, *more, *(["--calibration", "data.pt"] if data else [])]
    done = monoquant("quantize", *given, "-o", "out.pt", "--no-validate")
    assert done.code == 0, done.err
    assert "warning" in done.out
    assert "--override" in done.out
    assert not CALLS.search(done.out)
    planned = monoquant("plan", *given)
    assert "peak memory" in planned.out
    assert not CALLS.search(planned.out)
    said = monoquant("quantize", *given, "-o", "out.pt", "--no-validate", "--json")
    report = said.json["report"]
    assert isinstance(report, dict)
    assert report["warnings"]
    assert not CALLS.search(str(report))


def test_what_a_file_and_its_validation_say_advises_options(
    folder: Path, monoquant: Monoquant
) -> None:
    made = monoquant("quantize", "--factory", SMALL, "--bits", "4", "-o", "out.pt")
    assert "no example: --example FILE" in made.out
    told = monoquant("info", "out.pt")
    assert "--skip 2" in told.out
    assert not CALLS.search(told.out)
    seen = monoquant("validate", "out.pt", "--factory", SMALL)
    assert "no example: --example FILE" in seen.out


def test_damage_as_an_error_advises_options(folder: Path, monoquant: Monoquant) -> None:
    done = monoquant("quantize", "--factory", HURT, "--on-damage", "error", "-o", "out.pt")
    assert done.code == 2
    assert "--override 0.weight:bits=16" in done.complaint
    assert "override(" not in done.complaint
