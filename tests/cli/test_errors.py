"""What a user does wrong, what the command line says to it, and with which exit code."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from mono_quant import InputError, Quantizer
from mono_quant.cli import commands, main
from mono_quant.cli.words import OPTIONS
from mono_quant.errors import Mend
from tests.cli.conftest import SMALL, Monoquant
from tests.cli.networks import small

NETWORKS = "tests.cli.networks"
NO_CODE = "add --trust-pickle"


class Attack:
    """What runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, ("attacked",))


def words_of(line: str) -> list[str]:
    return line.split()


@pytest.mark.parametrize(
    ("line", "code", "complaint"),
    [
        ("", 2, "the following arguments are required: COMMAND"),
        ("shrink", 2, "invalid choice: 'shrink'"),
        ("quantize", 2, "say where to write: --output FILE"),
        ("quantize -o s.pt", 2, "name a model: --model FILE or --factory"),
        ("quantize model.pt", 2, "say where to write: --output FILE"),
        ("quantize model.pt -o s.bin", 2, "'s.bin' has none of the suffixes"),
        ("quantize model.pt -o model.pt", 2, "model.pt is the input itself"),
        ("quantize model.pt --model model.pt -o s.pt", 2, "two models"),
        ("quantize model.pt -o s.pt --skip nose", 2, "'nose' matches no layer"),
        ("quantize model.pt -o s.pt --calibration batches.pt", 2, "add --factory"),
        (f"quantize --factory {SMALL} -o s.pt --forward a:b", 2, "with --calibration; add that"),
        ("quantize small.pt -o s.pt", 2, "small.pt is quantized already"),
        ("quantize small.safetensors -o s.pt", 2, "small.safetensors is quantized already"),
        ("quantize whole.pt -o s.pt", 2, NO_CODE),
        ("quantize inside.pt -o s.pt", 2, NO_CODE),
        ("quantize attack.pt -o s.pt", 2, NO_CODE),
        ("quantize empty.pt -o s.pt", 2, "not a whole one"),
        ("quantize garbage.pt -o s.pt", 2, "garbage.pt is not a file that torch wrote"),
        ("quantize garbage.safetensors -o s.pt", 2, "is not a whole safetensors file"),
        ("quantize no-tensor.pt -o s.pt", 2, "no-tensor.pt holds no state dict"),
        ("quantize batches.pt -o s.pt", 2, "batches.pt holds a list, not a dictionary"),
        ("quantize no-tensor.pt --trust-pickle -o s.pt", 2, "no module or state dict in it"),
        ("quantize garbage.pt --trust-pickle -o s.pt", 2, "garbage.pt cannot be unpickled"),
        (f"quantize --factory {SMALL} --calibration no-tensor.pt -o s.pt", 2, "holds no data"),
        (f"quantize --factory {SMALL} --calibration attack.pt -o s.pt", 2, "runs code of the file"),
        (f"quantize --factory {SMALL} --calibration wide.pt -o s.pt", 2, "failed on batch 0"),
        (f"quantize --factory {SMALL} --calibration nan.pt -o s.pt", 2, "batch 0 of the data"),
        (f"quantize --factory {SMALL} --calibration batches.pt --samples 0 -o s.pt", 2, "1 or m"),
        (f"quantize model.pt --factory {NETWORKS}:narrow -o s.pt", 2, "does not fit the model"),
        (f"quantize model.pt --factory {NETWORKS}:deeper -o s.pt", 2, "which the checkpoint lacks"),
        (f"quantize model.pt --factory {NETWORKS}:Tied -o s.pt", 2, "which the checkpoint lacks"),
        (f"quantize --factory {NETWORKS}:failing -o s.pt", 2, "RuntimeError: out of luck"),
        (f"quantize --factory {NETWORKS}:a_number -o s.pt", 2, "returned a int"),
        (f"quantize --factory {NETWORKS}:NOT_CALLABLE -o s.pt", 2, "is a int, not a function"),
        (f"quantize --factory {NETWORKS}:absent -o s.pt", 2, "has no 'absent'"),
        ("quantize --factory absent_module:make -o s.pt", 2, "No module named 'absent_module'"),
        ("quantize --factory no_colon -o s.pt", 2, "'no_colon' is not package.module:name"),
        ("quantize absent.pt -o s.pt", 3, "absent.pt is not a file"),
        ("quantize absent.pt --trust-pickle -o s.pt", 3, "absent.pt is not a file"),
        ("quantize . -o s.pt", 3, ". is not a file"),
        ("quantize model.pt -o absent/s.pt", 3, "there is no folder absent"),
        ("quantize model.pt -o folder.pt", 3, "folder.pt"),
        ("quantize model.pt --config absent.json -o s.pt", 3, "absent.json: No such file"),
        ("info", 2, "the following arguments are required: FILE"),
        ("info model.pt", 2, "it was not written by mono_quant"),
        ("info model.safetensors", 2, "it was not written by mono_quant"),
        ("info model.onnx", 2, "has none of the suffixes"),
        ("info absent.pt", 3, "absent.pt is not a file"),
        ("validate absent.safetensors", 3, "absent.safetensors is not a file"),
        ("validate small.pt --example batches.pt", 2, "add --factory"),
        (f"validate small.pt --factory {SMALL} --example absent.pt", 3, "absent.pt is not a file"),
        (f"validate small.pt --factory {SMALL} --example wide.pt", 2, "failed on batch 0"),
        ("compare model.pt", 2, "the following arguments are required: B"),
        ("compare model.pt absent.pt", 3, "absent.pt is not a file"),
        ("compare model.pt tied.safetensors", 2, "no tensor of one name in common"),
        ("compare model.pt small.pt --calibration batches.pt", 2, "add --factory"),
        ("compare model.pt whole.pt", 2, "holds Python objects beside tensors"),
        ("dequantize small.pt", 2, "the following arguments are required: -o/--output"),
        ("dequantize small.pt -o small.pt", 2, "small.pt is the input itself"),
        ("dequantize small.pt -o float.onnx", 2, "has none of the suffixes"),
        ("dequantize model.pt -o float.pt", 2, "model.pt is float already"),
        ("dequantize absent.pt -o float.pt", 3, "absent.pt is not a file"),
        ("dequantize small.pt -o folder.pt", 3, "folder.pt"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else None,
)  # fmt: skip
def test_mistakes_are_told_in_one_line(
    line: str, code: int, complaint: str, folder: Path, monoquant: Monoquant
) -> None:
    for name in ("small.pt", "small.safetensors"):
        Quantizer().apply(small()).save(name)
    torch.save({"weight": Attack()}, "attack.pt")
    torch.save(torch.ones(2, 65), "wide.pt")
    torch.save(torch.full((2, 64), torch.nan), "nan.pt")
    (folder / "empty.pt").touch()
    for name in ("garbage.pt", "garbage.safetensors"):
        (folder / name).write_bytes(b"neither one nor the other")
    (folder / "folder.pt").mkdir()
    before = sorted(folder.iterdir())
    done = monoquant(*words_of(line))
    assert done.code == code
    assert done.complaint.startswith("monoquant: error: ")
    assert complaint in done.complaint
    assert sorted(folder.iterdir()) == before


QUANTIZE = f"quantize --factory {SMALL} -o s.pt"
BARE = "quantize model.pt -o s.pt"


@pytest.mark.parametrize(
    ("line", "mend"),
    [
        (f"{QUANTIZE} --calibration wide.pt", Mend.FORWARD),
        (f"validate small.pt --factory {SMALL} --example wide.pt", Mend.FORWARD),
        (f"{QUANTIZE} --calibration nan.pt", Mend.BATCH),
        (f"{QUANTIZE} --calibration pair.pt", Mend.TUPLE),
        (f"{QUANTIZE} --calibration batches.pt --samples 0", Mend.SAMPLES),
        (f"{QUANTIZE} --activations static", Mend.DATA_OR_DYNAMIC),
        (
            f"quantize --factory {NETWORKS}:Chooses -o s.pt --calibration batches.pt",
            Mend.OUTPUT,
        ),
        (f"quantize --factory {NETWORKS}:not_finite -o s.pt", Mend.SKIP),
        (f"{BARE} --activations static", Mend.NO_STATIC),
        (f"{QUANTIZE} --in-place --on-damage keep", Mend.COPY),
        (f"quantize --factory {SMALL} -o s.onnx", Mend.SUFFIX),
        ("quantize small.pt -o s.pt", Mend.IS_QUANTIZED),
        ("info model.pt", Mend.IS_FLOAT),
        ("info model.safetensors", Mend.IS_FLOAT),
    ],
)
def test_what_mends_a_mistake_is_told_in_options(
    line: str, mend: Mend, folder: Path, monoquant: Monoquant
) -> None:
    Quantizer().apply(small()).save("small.pt")
    torch.save(torch.ones(2, 65), "wide.pt")
    torch.save(torch.full((2, 64), torch.nan), "nan.pt")
    torch.save((torch.ones(2, 64), torch.ones(2)), "pair.pt")
    done = monoquant(*words_of(line))
    assert done.code == 2
    assert done.complaint.endswith("; " + OPTIONS[mend].format(layer="'2'"))
    assert "fit(" not in done.complaint


def test_every_mend_is_told_in_options_and_in_calls() -> None:
    assert set(OPTIONS) == set(Mend)
    for mend, words in OPTIONS.items():
        assert not any(call in words for call in ("fit(", "skip(", "activations(", "override("))
        assert str(InputError("it is wrong", mend, layer="a.b")) == (
            f"it is wrong; {mend.value.format(layer=repr('a.b'))}"
        )


def test_errors_are_pickled_with_what_mends_them() -> None:
    error = InputError("0.weight is wrong", Mend.SKIP, layer="0")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is InputError
    assert str(again) == str(error)
    assert "skip('0')" in str(again)


def test_dynamic_inputs_of_a_bare_checkpoint_are_said_to_stay_float_at_the_top(
    folder: Path, monoquant: Monoquant
) -> None:
    done = monoquant(*words_of(f"{BARE} --dynamic --json"))
    assert done.code == 0
    report = done.json["report"]
    assert isinstance(report, dict)
    warnings = report["warnings"]
    assert isinstance(warnings, list)
    assert any("no layer can have the dynamic inputs" in str(line) for line in warnings)


def test_only_a_trusted_pickle_runs_its_code(folder: Path, monoquant: Monoquant) -> None:
    (folder / "attack.pt").write_bytes(pickle.dumps(Attack(), protocol=2))
    torch.save({"weight": Attack()}, "attack.pth")
    for name in ("attack.pt", "attack.pth"):
        for words in (["quantize", name, "-o", "s.pt"], ["info", name], ["validate", name],
                      ["compare", name, name], ["dequantize", name, "-o", "s.pt"]):  # fmt: skip
            assert monoquant(*words).code in (1, 2)
    assert not (folder / "attacked").exists()
    monoquant("quantize", "attack.pth", "--trust-pickle", "-o", "s.pt")
    assert (folder / "attacked").exists()


def test_a_failure_to_write_leaves_what_stood_there(
    folder: Path, monoquant: Monoquant, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "s.pt").write_bytes(b"precious")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "s.pt")

    monkeypatch.setattr(os, "fsync", full)
    done = monoquant("quantize", "model.pt", "-o", "s.pt")
    assert done.code == 3
    assert done.complaint == "monoquant: error: s.pt: No space left on device"
    assert (folder / "s.pt").read_bytes() == b"precious"


def test_debug_shows_the_traceback(folder: Path) -> None:
    with pytest.raises(InputError, match="out of luck"):
        main(["quantize", "--factory", f"{NETWORKS}:failing", "-o", "s.pt", "--debug"])


def test_a_defect_is_called_one(
    folder: Path, monoquant: Monoquant, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(commands, "info", broken)
    done = monoquant("info", "small.pt")
    assert done.code == 70
    assert "ZeroDivisionError: division by zero" in done.complaint
    assert "--debug" in done.complaint


def test_an_interrupt_is_no_error_of_ours(
    folder: Path, monoquant: Monoquant, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "info", interrupted)
    done = monoquant("info", "small.pt")
    assert (done.code, done.complaint) == (130, "monoquant: error: interrupted")


def test_what_a_file_says_cannot_steer_the_terminal(folder: Path, monoquant: Monoquant) -> None:
    """Names come from strangers; half a surrogate would be an error when it is printed."""
    state = {"\x1b[2J\x1b]0;mine\x07": torch.ones(3, 64), "\u202etxt": torch.ones(3)}
    torch.save({"plain": torch.ones(3)}, "plain.pt")
    torch.save({"plain": torch.ones(3), **state}, "odd.pt")
    for words in (("compare", "odd.pt", "plain.pt"), ("info", "odd\x1b[2J.pt")):
        done = monoquant(*words)
        said = done.out + done.err
        assert all(one.isprintable() for one in said.replace("\n", ""))
        assert "\\x1b[2J" in said
