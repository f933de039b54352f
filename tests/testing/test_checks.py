"""Running the laws: what is said of them, and what is asked for where something is missing."""

import subprocess
import sys
from pathlib import Path

import attrs
import pytest
import torch
from torch import nn

from mono_quant import Affine, Container, InputError, LinearQuantizer, MinMax, SafetensorsSerializer
from mono_quant.testing import (
    Broken,
    Check,
    LayerCase,
    check,
    check_stack,
    checks_for,
    parametrize_with_checks,
)
from mono_quant.testing.law import Laws, Untouched, expect, refused
from tests.testing.broken import Narrow, Stingy


def test_a_verdict_has_a_line_for_each_law_and_counts_them() -> None:
    found = check(Stingy(4))
    assert not found
    assert [one.law for one in found.broken] == ["bytes_are_those_foretold"]
    text = str(found).splitlines()
    assert text[0].startswith("Stingy(bits=4")
    assert text[0].endswith(": 23 hold, 3 do not apply, 1 broken")
    assert len(text) == 1 + len(found.outcomes)
    (line,) = (line for line in text if "broken  " in line)
    assert line.split() == [
        *"bytes_are_those_foretold broken nbytes says 48 for (2, 3, 8), and it takes".split(),
        *"36 bytes".split(),
    ]


def test_a_verdict_is_data() -> None:
    found = check(MinMax()).to_dict()
    assert found["subject"] == "MinMax()"
    assert found["holds"] is True
    laws = found["laws"]
    assert isinstance(laws, list)
    assert all(set(one) == {"law", "says", "status", "seen"} for one in laws)


def test_a_class_stands_for_the_instance_without_arguments() -> None:
    assert check(MinMax).subject == "MinMax()"
    assert check(SafetensorsSerializer).subject == "SafetensorsSerializer()"


@attrs.frozen
class Demanding(MinMax):
    kind = "tests.demanding"
    share: float = attrs.field()


def test_a_class_that_needs_arguments_is_asked_for_as_an_instance() -> None:
    with pytest.raises(InputError, match=r"Demanding cannot be made without arguments.*instance"):
        check(Demanding)


def test_a_layer_quantizer_is_asked_for_with_a_layer() -> None:
    with pytest.raises(InputError, match=r"give LayerCase\(LinearQuantizer\(own_forward=False\)"):
        check(LinearQuantizer())


def test_a_container_is_asked_for_with_a_module() -> None:
    with pytest.raises(InputError, match=r"give ContainerCase\("):
        check(Nothing())


class Nothing(Container):
    kind = "tests.nothing"

    def matches(self, module: nn.Module) -> bool:
        return False


@pytest.mark.parametrize("subject", [3, nn.Linear(2, 2)], ids=["3", "layer"])
def test_what_there_is_no_law_for_is_refused(subject: object) -> None:
    with pytest.raises(InputError, match="no law"):
        check(subject)


def test_a_stack_is_checked_by_itself() -> None:
    x = torch.linspace(-1, 1, 24).reshape(1, 3, 8)
    check_stack(Affine(4), x)
    with pytest.raises(Broken, match=r"^no_other|^values_come_back_near: a value is off"):
        check_stack(Narrow(4), x)


@parametrize_with_checks([MinMax()])
def test_every_law_is_a_case_with_its_name(check: Check, request: pytest.FixtureRequest) -> None:
    assert request.node.callspec.id == f"MinMax()-{check.name}"
    assert check.says.endswith(".")


SUITE = """
from mono_quant import Affine
from mono_quant.testing import parametrize_with_checks

@parametrize_with_checks([Affine(4)])
def test_laws(check):
    check()
"""


def test_a_law_that_does_not_apply_is_skipped_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "test_theirs.py").write_text(SUITE, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "24 passed, 3 skipped" in done.stdout
    assert "does not apply: it does not say decodes_rows" in done.stdout


def test_laws_have_unlike_names_that_say_something() -> None:
    case = LayerCase(LinearQuantizer(), lambda: nn.Linear(4, 4), (torch.ones(1, 4),))
    for subject in (Affine(), MinMax(), SafetensorsSerializer(), case):
        names = [one.name for one in checks_for(subject)]
        assert len(set(names)) == len(names)
        assert all(one.says.strip() for one in checks_for(subject))


def test_a_refusal_of_the_wrong_kind_is_none() -> None:
    wrong = pytest.raises(Broken, match=r"raises KeyError .* instead of InputError")
    with wrong, refused(InputError, "a thing"):
        raise KeyError("x")
    none = pytest.raises(Broken, match="a thing is not refused: InputError was expected")
    with none, refused(InputError, "a thing"):
        pass


def test_what_was_written_to_is_noticed() -> None:
    x = torch.tensor([0.0, torch.nan])
    given = Untouched(the_input=[x])
    given.expect()
    x[0] = -0.0
    with pytest.raises(Broken, match="the input was written to"):
        given.expect()


def test_laws_are_about_one_class() -> None:
    def it_holds(subject: Affine) -> None:
        """It does."""
        expect(subject.bits == 8, "bits")

    laws = Laws(Affine, (it_holds,))
    assert [one.name for one in laws.about(Affine())] == ["it_holds"]
    assert not list(laws.about(MinMax()))


WITHOUT = """
import sys
sys.modules["pytest"] = sys.modules["hypothesis"] = None
import mono_quant
from mono_quant import MinMax
from mono_quant.testing import check, parametrize_with_checks
assert check(MinMax())
try:
    parametrize_with_checks([MinMax()])
except mono_quant.ConfigurationError as error:
    print(error)
try:
    import mono_quant.testing.strategies
except ImportError as error:
    print(error)
"""


def test_what_is_optional_says_how_it_comes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    of_pytest, of_hypothesis = done.stdout.splitlines()
    assert "pip install pytest, or call check(...)" in of_pytest
    assert "pip install hypothesis" in of_hypothesis
