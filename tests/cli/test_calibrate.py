"""``monoquant calibrate``: statistics to a file, and runs that go by it."""

from pathlib import Path

import pytest

from mono_quant import load_model
from tests.cli.conftest import SMALL, Monoquant
from tests.cli.networks import small
from tests.helpers import same_tensors

MODEL = ("model.pt", "--factory", SMALL)
DATA = ("--calibration", "batches.pt")


@pytest.mark.parametrize(
    "how",
    [(), ("--bits", "4", "--activations", "static", "--activation-observer", "entropy:bins=300")],
    ids=["8 bits", "4 bits"],
)
def test_a_run_goes_by_what_was_gathered(
    how: tuple[str, ...], folder: Path, monoquant: Monoquant
) -> None:
    done = monoquant("calibrate", *MODEL, *how, *DATA, "-o", "known.safetensors")
    assert done.code == 0, done.err
    assert done.out.startswith("saved known.safetensors (")
    assert done.out.endswith("the inputs of 2 weights)\n")
    known = ("--statistics", "known.safetensors")
    for name, words in {"a.pt": DATA, "b.pt": known, "c.pt": (*known, *DATA)}.items():
        done = monoquant("quantize", *MODEL, *how, *words, "-o", name)
        assert done.code == 0, done.err
    one, *others = (load_model(name, small()) for name in ("a.pt", "b.pt", "c.pt"))
    assert all(same_tensors(other, one) for other in others)
    assert "static" in monoquant("plan", *MODEL, *how, *known).out


def test_what_has_no_use_in_gathering_is_no_option(folder: Path, monoquant: Monoquant) -> None:
    for word in ("--only-if-faster", "--statistics=known.safetensors", "--in-place"):
        done = monoquant("calibrate", *MODEL, *DATA, word, "-o", "known.safetensors")
        assert done.code == 2
        assert f"unrecognized arguments: {word}" in done.complaint


def test_what_was_gathered_is_told_as_json(folder: Path, monoquant: Monoquant) -> None:
    said = monoquant("calibrate", *MODEL, *DATA, "-o", "known.safetensors", "--json").json
    assert said["weights"] == ["0.weight", "2.weight"]
    assert said["file_bytes"] == (folder / "known.safetensors").stat().st_size
    assert monoquant("calibrate", *MODEL, *DATA, "-o", "k.safetensors", "--quiet").out == ""


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("calibrate", *MODEL, "-o", "k.safetensors"), "add --calibration FILE"),
        (("calibrate", "model.pt", *DATA, "-o", "k.safetensors"), "add --factory"),
        (("calibrate", *MODEL, *DATA, "-o", "k.pt"), "call it .safetensors"),
        (
            ("calibrate", *MODEL, *DATA, "--bits", 4, "-o", "k.safetensors"),
            "nothing is asked of the data: inputs that are calibrated (--activations static)",
        ),
        (("quantize", "model.pt", "--statistics", "known.safetensors", "-o", "s.pt"), "--factory"),
        (
            ("quantize", *MODEL, "--statistics", "model.safetensors", "-o", "s.pt"),
            "holds no statistics",
        ),
        (
            (
                *("quantize", *MODEL, "--statistics", "known.safetensors", "-o", "s.pt"),
                *("--bits", 4, "--rounding", "gptq"),
            ),
            "have no Hessian() of the inputs of 0, 2; gather them with the same options: "
            "monoquant calibrate",
        ),
        (
            (
                *("quantize", *MODEL, "--statistics", "known.safetensors", "-o", "s.pt"),
                *(*DATA, "--sequential"),
            ),
            "--sequential asks for those that quantized layers make",
        ),
        (
            (
                *("quantize", *MODEL, "--statistics", "known.safetensors", "-o", "s.pt"),
                *("--forward", "tests.cli.networks:doubled"),
            ),
            "--forward calls the model with --calibration; add that",
        ),
    ],
    ids=["data", "bare", "suffix", "nothing", "no model", "foreign", "lacking", "both", "forward"],
)
def test_what_cannot_be_is_refused_in_one_line(
    words: tuple[object, ...], complaint: str, folder: Path, monoquant: Monoquant
) -> None:
    assert monoquant("calibrate", *MODEL, *DATA, "-o", "known.safetensors").code == 0
    done = monoquant(*words)
    assert done.code == 2
    assert complaint in done.complaint
