"""Bars are shown where someone looks, of what takes long, with the time that is left."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from mono_quant import Quantizer, progress
from mono_quant.calibration import CalibrationData
from mono_quant.progress import progress_bar
from tests.cli.conftest import SMALL, Monoquant
from tests.cli.conftest import folder as folder
from tests.cli.conftest import monoquant as monoquant


class Terminal(io.StringIO):
    """A stream that says that it is one."""

    def isatty(self) -> bool:
        return True


def looked_at(monkeypatch: pytest.MonkeyPatch, after: float) -> Terminal:
    """Put a terminal where progress is shown, and bars on it after some seconds.

    In the test itself: pytest puts its own stream there when it begins.
    """
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "AFTER", after)
    return stream


def test_what_is_over_soon_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = looked_at(monkeypatch, progress.AFTER)
    with progress_bar("quantizing", "layer", 3) as bar:
        for _ in range(3):
            time.sleep(0.15)  # longer than it waits between two lines
            bar.update()
    assert "quantizing" not in terminal.getvalue()


def test_what_takes_longer_shows_how_much_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = looked_at(monkeypatch, 0.1)
    with progress_bar("quantizing", "layer", 4) as bar:
        time.sleep(0.15)
        bar.update()
    assert "quantizing:  25%" in terminal.getvalue()
    assert "1/4 [00:00<00:00" in terminal.getvalue()


def test_without_a_label_or_a_terminal_nothing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = looked_at(monkeypatch, 1e-9)
    with progress_bar(None, "layer", 4) as bar:
        time.sleep(0.15)
        bar.update()
    assert terminal.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", plain := io.StringIO())
    with progress_bar("quantizing", "layer", 4) as bar:
        time.sleep(0.15)
        bar.update()
    assert plain.getvalue() == ""


class Numbers(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, place: int) -> torch.Tensor:
        return torch.ones(4)


class Stream(IterableDataset[torch.Tensor]):
    def __iter__(self):  # type: ignore[no-untyped-def]  # torch's own is untyped
        return iter([torch.ones(4)] * 40)


@pytest.mark.parametrize(
    ("data", "samples", "total"),
    [
        ([torch.ones(8, 4)] * 5, 150, 40),
        ([torch.ones(8, 4)] * 5, 20, 20),
        (Numbers(), 150, 64),  # two batches of 32, the last of which is not full
        (DataLoader(Numbers(), batch_size=10), 150, 40),
        (DataLoader(Stream(), batch_size=10), 150, 150),
    ],
    ids=["list", "fewer", "dataset", "loader", "stream"],
)
def test_the_samples_of_data_are_counted_down(
    data: object, samples: int, total: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watched(label: str | None, unit: str, total: int | None = None):  # type: ignore[no-untyped-def]  # of tqdm
        seen.append(progress_bar(label, unit, total))
        return seen[-1]

    monkeypatch.setattr("mono_quant.calibration.progress_bar", watched)
    bound = CalibrationData.bind(data, samples)
    assert list(bound.outputs(nn.Linear(4, 2), "calibrating"))
    (bar,) = seen
    assert bar.total == total


def test_layers_that_are_measured_are_counted_as_they_are_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps: list[float | None] = []

    def watched(label: str | None, unit: str, total: int | None = None):  # type: ignore[no-untyped-def]  # of tqdm
        bar = progress_bar(label, unit, total)
        assert (unit, total) == ("layer", 3)
        monkeypatch.setattr(bar, "update", steps.append)
        return bar

    monkeypatch.setattr("mono_quant.plan.faster.progress_bar", watched)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    Quantizer().only_if_faster(torch.randn(2, 64)).plan(model).measured()
    assert steps == [1, 1, 1]


def labels(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str, float]]:
    """Return what bars are shown of from now on: unit and what was counted, by label."""
    seen: dict[str, tuple[str, float]] = {}
    made = progress.progress_bar

    def watched(label: str | None, unit: str, total: int | None = None):  # type: ignore[no-untyped-def]  # of tqdm
        bar = made(label, unit, total)

        def update(n: float | None = 1) -> None:
            assert label is not None
            seen[label] = (unit, seen.get(label, (unit, 0.0))[1] + (n or 0))

        if label is not None:
            monkeypatch.setattr(bar, "update", update)
        return bar

    for where in ("progress", "speed", "calibration"):
        monkeypatch.setattr(f"mono_quant.{where}.progress_bar", watched)
    return seen


def test_files_and_measurements_are_counted_on_the_command_line(
    folder: Path, monoquant: Monoquant, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = labels(monkeypatch)
    assert monoquant("quantize", "model.pt", "-o", "s.safetensors").code == 0
    assert seen == {
        "saving s.safetensors": ("tensor", 6),
        "checking s.safetensors": ("tensor", 6),
    }
    seen.clear()
    model = ("--factory", SMALL, "--example", "batches.pt")
    assert monoquant("validate", "s.safetensors", *model).code == 0
    assert seen == {"checking s.safetensors": ("tensor", 12)}  # reloaded twice
    seen.clear()
    assert monoquant("benchmark", "s.safetensors", *model, "--seconds", 0.01).code == 0
    assert seen == {"reading s.safetensors": ("tensor", 6), "measuring": ("%", 100)}
    seen.clear()
    assert monoquant("compare", "model.pt", "s.safetensors").code == 0
    assert seen == {"comparing": ("tensor", 10)}  # of the quantized file, and of both
    seen.clear()
    assert monoquant("check", "mono_quant:MinMax").code == 0
    assert seen == {"checking": ("law", 22)}
    seen.clear()
    words = ("quantize", "model.pt", "-o", "t.safetensors", "--quiet")
    assert monoquant(*words).code == 0
    assert monoquant("dequantize", "s.safetensors", "-o", "f.pt", "--quiet").code == 0
    assert not seen


def test_a_library_says_nothing_of_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = labels(monkeypatch)
    result = Quantizer().apply(nn.Linear(64, 64), progress=False)
    assert result.validate(torch.ones(1, 64), path=result.save(tmp_path / "s.pt"))
    assert not seen


FORKED = """
import os, signal, sys
from mono_quant.progress import progress_bar

with progress_bar(None, "step") as bar:
    pass
held, told = os.pipe()
killed = os.fork()
if not killed:
    bar.get_lock().acquire()
    os.write(told, b".")
    signal.pause()
os.read(held, 1)
os.kill(killed, signal.SIGKILL)
os.waitpid(killed, 0)
sibling = os.fork()
if not sibling:
    with progress_bar(None, "step"):
        os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(sibling, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
def test_a_process_that_is_killed_with_a_bar_stops_no_other() -> None:
    with subprocess.Popen([sys.executable, "-c", FORKED], start_new_session=True) as process:
        try:
            assert process.wait(timeout=60) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):  # all of them are gone, as they should
                os.killpg(process.pid, signal.SIGKILL)
