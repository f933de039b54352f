"""A run that was stopped goes on behind its last finished block, and ends in the same bytes."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import attrs
import pytest
import torch
from torch import Tensor, nn

from mono_quant import (
    GPTQ,
    CorruptCheckpointError,
    InputError,
    LearnedRounding,
    Quantizer,
    Rounding,
)
from mono_quant.atomic import _MACHINE
from mono_quant.base import Checkpoint
from mono_quant.configurable import Json
from mono_quant.rounding.gptq import GPTQ as Gptq
from mono_quant.serializers import SafetensorsSerializer
from tests.helpers import noise, same_tensors

DATA = [noise(8, 64, seed=place) for place in range(3)]
LEARNED = LearnedRounding(steps=4)


class Stopped(Exception):
    pass


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(4)]
    return nn.Sequential(*layers, nn.Linear(64, 16)).eval()


def quantizer(rounding: Rounding, *, static: bool = False) -> Quantizer:
    bits = 8 if static else 4
    return Quantizer().bits(bits).only("*").rounding(rounding).fit(DATA)


def stopping(monkeypatch: pytest.MonkeyPatch, after: int) -> list[Tensor]:
    """Have the rounding of a weight fail after so many; return the weights that were rounded."""
    rounded: list[Tensor] = []
    honest = Gptq.round

    def round_or_stop(self: Gptq, weight: Tensor, *rest: object) -> object:
        if len(rounded) == after:
            raise Stopped
        rounded.append(weight)
        return honest(self, weight, *rest)  # type: ignore[arg-type]  # handed on as it came

    monkeypatch.setattr(Gptq, "round", round_or_stop)
    return rounded


def stop(asked: Quantizer, after: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop a run after so many weights were rounded."""
    with monkeypatch.context() as patch:
        stopping(patch, after)
        with pytest.raises(Stopped):
            asked.apply(net(), resume=folder)


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("rounding", [GPTQ(), LEARNED], ids=["gptq", "learned"])
def test_it_goes_on_and_ends_in_the_same(
    rounding: Rounding, static: bool, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = quantizer(rounding, static=static)
    expected = asked.apply(net())
    stop(asked, after, tmp_path, monkeypatch)
    assert len(list(tmp_path.iterdir())) == after
    with monkeypatch.context() as patch:
        rounded = stopping(patch, 1000)
        found = asked.apply(net(), resume=tmp_path)
    assert len(rounded) == 5 - after
    assert same_tensors(found.model, expected.model)
    assert found.report.to_json() == expected.report.to_json()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_beside_a_whole_block_is_removed_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was killed between putting a block in its place and removing the folder it came from."""
    stop(quantizer(GPTQ()), 1, tmp_path, monkeypatch)
    (path,) = tmp_path.iterdir()
    (tmp_path / f".{path.name}.{_MACHINE}-deadbeef.tmp").mkdir()
    quantizer(GPTQ()).apply(net(), resume=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("other", ["quantizer", "model", "data", "version"])
def test_what_another_run_left_is_refused(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop(quantizer(GPTQ()), 2, tmp_path, monkeypatch)
    asked, model = quantizer(GPTQ(damping=0.02) if other == "quantizer" else GPTQ()), net()
    if other == "model":
        nn.init.zeros_(model.get_parameter("4.bias"))
    if other == "version":
        monkeypatch.setattr("mono_quant.plan.journal.__version__", "99")
    if other == "data":
        asked = asked.fit(DATA[:2])
    with pytest.raises(InputError, match="of another run: of another quantizer, model or data"):
        asked.apply(model, resume=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_that_was_changed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop(quantizer(GPTQ()), 1, tmp_path, monkeypatch)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpointError):
        quantizer(GPTQ()).apply(net(), resume=tmp_path)


Edit = Callable[[Checkpoint], Checkpoint]


def in_half(checkpoint: Checkpoint) -> Checkpoint:
    weights = {
        key: attrs.evolve(one, weight=replace(one.weight, dtype=torch.float16))
        for key, one in checkpoint.records.items()
    }
    return attrs.evolve(checkpoint, records=weights)


def renamed(checkpoint: Checkpoint) -> Checkpoint:
    (record,) = checkpoint.records.values()
    other = attrs.evolve(record, module="3.0")
    return attrs.evolve(checkpoint, records={other.key: other})


def with_shape(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Edit:
    return lambda found: attrs.evolve(found, tensors={name: torch.zeros(shape, dtype=dtype)})


def with_changes(changes: Json) -> Edit:
    return lambda found: attrs.evolve(found, config={**found.config, "changes": changes})


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda found: attrs.evolve(found, records={}), "it holds no weight; remove it"),
        (renamed, r"it holds 3\.0\.weight; remove it"),
        (in_half, r"0\.0\.weight is of another shape or dtype; remove it"),
        (with_shape("0.0.bias", (63,)), r"it has no parameter such as 0\.0\.bias; remove it"),
        (with_shape("0.0.bias", (64,), torch.float64), r"no parameter such as 0\.0\.bias"),
        (with_shape("4.bias", (16,)), r"it has no parameter such as 4\.bias; remove it"),
        (with_changes(None), "has no list of changes"),
        (with_changes([["0", "text"]]), r"has the change \['0', 'text'\]"),
        (with_changes(["abc"]), "has the change 'abc'"),
    ],
    ids=["empty", "weight", "dtype", "shape", "precision", "block", "none", "short", "text"],
)
def test_a_block_that_does_not_fit_is_refused_however_right_its_checksums(
    edit: Edit, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop(quantizer(GPTQ()), 1, tmp_path, monkeypatch)
    (path,) = tmp_path.iterdir()
    serializer = SafetensorsSerializer()
    serializer.save(edit(serializer.load(path)), path)
    with pytest.raises(CorruptCheckpointError, match=words):
        quantizer(GPTQ()).apply(net(), resume=tmp_path)


@pytest.mark.parametrize("asked", [Quantizer().bits(4), Quantizer().bits(4).fit(DATA)], ids=repr)
def test_what_is_not_done_block_by_block_cannot_be_resumed(
    asked: Quantizer, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="only what is calibrated block after block"):
        asked.apply(net(), resume=tmp_path)
    result = asked.fit(DATA).plan(net()).run(sequential=True, resume=tmp_path)
    assert result.validate()


PROGRAM = """
import sys
from tests.plan.test_resume import GPTQ, net, quantizer
from mono_quant import LearnedRounding
rounding = LearnedRounding(steps=60)
quantizer(rounding).apply(net(), resume=sys.argv[1]).save(sys.argv[2])
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_in_the_same_bytes(tmp_path: Path) -> None:
    whole, folder, file = tmp_path / "whole.pt", tmp_path / "blocks", tmp_path / "resumed.pt"
    run = [sys.executable, "-c", PROGRAM]
    subprocess.run([*run, str(tmp_path / "none"), str(whole)], check=True)
    kills = 0
    while (code := until_next_block([*run, str(folder), str(file)], folder)) != 0:
        assert code == -signal.SIGKILL
        kills += 1
    assert kills >= 2
    assert file.read_bytes() == whole.read_bytes()
    assert not list(folder.iterdir())


def until_next_block(command: list[str], folder: Path) -> int:
    """Run a program and kill it when one more file is there; return how it ended."""
    with subprocess.Popen(command) as process:
        before = len(list(folder.glob("*.safetensors")))
        while process.poll() is None:
            if len(list(folder.glob("*.safetensors"))) > before:
                process.kill()
            time.sleep(0.005)
        return process.returncode
