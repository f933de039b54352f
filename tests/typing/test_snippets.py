"""Type checkers reject what is wrong, on its line, and nothing else."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("snippets")
ROOT = Path(__file__).parents[2]
EXPECTED = re.compile(r"# E: ([a-z-]+)")
REPORTED = re.compile(r"^(?P<path>[^:]+):(?P<line>\d+): error: (?P<text>.*)\[(?P<code>[a-z-]+)\]$")

Place = tuple[str, int]


def expected() -> dict[Place, str]:
    """Return the code of the error that is expected on each line."""
    return {
        (path.name, place): found[1]
        for path in sorted(FOLDER.glob("*.py"))
        for place, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if (found := EXPECTED.search(line))
    }


def test_every_wrong_line_is_rejected_and_no_other() -> None:
    api = pytest.importorskip("mypy.api", reason="mypy is of the typecheck session")
    printed, complaints, _ = api.run([*map(str, FOLDER.glob("*.py")), "--no-error-summary"])
    assert not complaints, complaints
    found = {
        (Path(match["path"]).name, int(match["line"])): match["code"]
        for line in printed.splitlines()
        if (match := REPORTED.match(line))
    }
    assert found == expected(), printed


def test_pyright_rejects_the_same_lines(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--pyright"):
        pytest.skip("pyright is asked with --pyright, as `nox -s pyright` does")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(
        [*command, str(FOLDER)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    found = {
        (Path(one["file"]).name, one["range"]["start"]["line"] + 1)
        for one in json.loads(done.stdout)["generalDiagnostics"]
        if one["severity"] == "error"
    }
    assert found == set(expected()), done.stdout
