"""The program itself: help, version, and a process of its own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mono_quant
from mono_quant import Quantizer
from tests.cli.conftest import Monoquant
from tests.cli.networks import small

COMMANDS = (
    "quantize",
    "plan",
    "calibrate",
    "info",
    "validate",
    "benchmark",
    "compare",
    "dequantize",
    "check",
    "demo",
    "completion",
)


ACTIVATION = ("dtype", "bits", "symmetric", "granularity", "observer")


def test_the_version_is_that_of_the_package(monoquant: Monoquant) -> None:
    done = monoquant("--version")
    assert (done.code, done.out) == (0, f"monoquant {mono_quant.__version__}\n")


def test_help_names_every_command_and_exit_code(monoquant: Monoquant) -> None:
    done = monoquant("--help")
    assert done.code == 0
    assert all(command in done.out for command in COMMANDS)
    assert "could not be read or written" in done.out


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_has_examples_and_exit_codes(
    command: str, monoquant: Monoquant
) -> None:
    done = monoquant(command, "--help")
    assert done.code == 0
    assert f"examples:\n  {'pip' if command == 'demo' else f'monoquant {command} '}" in done.out
    assert "exit codes:\n  0    done" in done.out


COMPLETE = """
source ./script
COMP_WORDS=({words} '{word}')
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_monoquant
printf '%s\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("words", "word", "found"),
    [
        ("monoquant", "", {*COMMANDS, "--help", "--version"}),
        ("monoquant", "qu", {"quantize"}),
        ("monoquant quantize model.pt", "--calib", {"--calibration"}),
        ("monoquant plan", "--acti", {"--activations", *(f"--activation-{n}" for n in ACTIVATION)}),
        ("monoquant quantize --quality", "b", {"balanced", "best"}),
        ("monoquant quantize", "mod", {"model.pt", "model.safetensors"}),
        ("monoquant info", "--only", {""}),
    ],
)
def test_bash_completes_what_the_parser_knows(
    words: str, word: str, found: set[str], folder: Path, monoquant: Monoquant
) -> None:
    (folder / "script").write_text(monoquant("completion").out)
    done = subprocess.run(
        ["bash", "-c", COMPLETE.format(words=words, word=word)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    assert set(done.stdout.splitlines()) == found


def test_the_package_runs_as_a_module(folder: Path) -> None:
    Quantizer().bits(4).apply(small()).save("small.safetensors")
    done = subprocess.run(
        [sys.executable, "-m", "mono_quant", "info", "small.safetensors", "--json"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout)["format"] == "safetensors"
    assert done.stderr == ""


def test_a_reader_that_goes_away_is_no_error(folder: Path) -> None:
    Quantizer().bits(4).apply(small()).save("small.safetensors")
    with subprocess.Popen(
        [sys.executable, "-m", "mono_quant", "info", "small.safetensors"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 3
