"""``monoquant check``: the laws of extensions from the command line."""

from pathlib import Path

import pytest

from tests.cli.conftest import Monoquant

EXTENSIONS = """
from typing import ClassVar
import attrs
import torch
from torch import nn
from mono_quant import Affine, LinearQuantizer
from mono_quant.testing import LayerCase

@attrs.frozen
class Good(Affine):
    kind: ClassVar[str] = "good"

@attrs.frozen
class Stingy(Affine):
    kind: ClassVar[str] = "stingy"

    def nbytes(self, shape):
        return 1

FOUR = Stingy(4)
LINEAR = LayerCase(LinearQuantizer(), lambda: nn.Linear(64, 8), (torch.ones(2, 64),))
quantizer = LinearQuantizer()
"""


@pytest.fixture
def extensions(folder: Path) -> str:
    (folder / "my_extensions.py").write_text(EXTENSIONS)
    return "my_extensions"


def test_a_class_that_keeps_the_laws_is_no_error(extensions: str, monoquant: Monoquant) -> None:
    done = monoquant("check", f"{extensions}:Good")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("Good(bits=8, ")
    assert "bytes_are_those_foretold" in done.out


@pytest.mark.parametrize("name", ["Stingy", "FOUR"])
def test_a_broken_law_is_named_and_has_the_exit_code_of_a_failure(
    name: str, extensions: str, monoquant: Monoquant
) -> None:
    done = monoquant("check", f"{extensions}:{name}")
    assert done.code == 1
    assert "bytes_are_those_foretold                   broken          nbytes says 1" in done.out
    assert done.err.startswith("monoquant: error: Stingy(bits=")
    assert done.err.endswith("breaks bytes_are_those_foretold\n")


def test_a_case_says_what_a_layer_quantizer_is_checked_on(
    extensions: str, monoquant: Monoquant
) -> None:
    done = monoquant("check", f"{extensions}:LINEAR", "--json")
    assert done.code == 0
    assert done.json["holds"] is True
    assert str(done.json["subject"]).startswith("LinearQuantizer(own_forward=False) on Linear(")


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("my_extensions:quantizer", "is checked on a layer: give LayerCase("),
        ("my_extensions:nothing", "my_extensions has no 'nothing'"),
        ("my_extensions", "'my_extensions' is not package.module:name"),
        ("no_such_module:X", "cannot import 'no_such_module'"),
        ("pathlib:Path", "there is no law about a "),
    ],
)
def test_what_cannot_be_checked_is_told_in_one_line(
    target: str, complaint: str, extensions: str, monoquant: Monoquant
) -> None:
    done = monoquant("check", target)
    assert done.code == 2
    assert complaint in done.complaint
