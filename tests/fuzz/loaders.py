"""What reads each kind of file, and what it has to make of one that nobody changed."""

import functools
import io
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from html.parser import HTMLParser
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from mono_quant import CalibrationStatistics, QTensor, load_model, quantize, read_state_dict
from mono_quant.calibration import CalibrationData
from mono_quant.cli import main
from mono_quant.cli.arrays import read_arrays
from mono_quant.cli.inputs import read_data
from mono_quant.files import validate_file
from mono_quant.numerics.nested import tensors_in
from mono_quant.serializers import write_state_dict
from tests.fuzz.samples import BLOCK, DATA, Sample
from tests.helpers import TiedModel, same_bits

Right = Callable[[object], bool]
Action = tuple[Callable[[], object], Right | None]
"""What runs a loader, and whether what came is what the valid file holds; None: all may come."""

FoundT = TypeVar("FoundT")
OUTPUT = "out"
_SETTINGS, _BATCH = Path("settings.json"), Path("batch.safetensors")
_FOLDER = Path("folder")
_FACTORY = "tests.fuzz.samples:seeded"


def lay_out(sample: Sample) -> None:
    """Put files in the current folder that loaders are given beside the mutant."""
    write_state_dict(_BATCH, {"x": DATA})
    if sample.quantizer is not None:
        _SETTINGS.write_text(json.dumps(sample.quantizer.to_config()))


def actions_on(path: Path, original: Path, sample: Sample) -> Mapping[str, Action]:
    """Return every loader of a file by its name.

    Args:
        path: of the mutant, in the current folder.
        original: of the valid file.
        sample: what that holds.
    """
    return _BY_ROLE[sample.role](path, original, sample)


def _checkpoints(path: Path, original: Path) -> dict[str, Action]:
    words = (str(path), "--json")
    return {
        "info": (lambda: command("info", str(path)), None),
        "info --json": (lambda: command("info", *words), None),
        "info --html": (lambda: _page(path), None),
        "compare": (lambda: command("compare", str(original), *words), None),
        "compare, as the reference": (lambda: command("compare", *words[:1], str(original)), None),
        "dequantize": (lambda: command("dequantize", str(path), "-o", _output(path)), None),
    }


class _Doing(HTMLParser):
    """Finds what runs in a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts, self.handlers = 0, 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.handlers += sum(name.startswith("on") for name, _ in attrs)


def _page(path: Path) -> str:
    """Return what comes of a page of a file, which runs no script but its own."""
    done, page = command("info", str(path), "--html", f"{OUTPUT}.html"), Path(f"{OUTPUT}.html")
    if page.exists():
        found = _Doing(page.read_text("utf-8"))
        if (found.scripts, found.handlers) != (1, 0):
            return f"!{found.scripts} scripts and {found.handlers} handlers"
    return done


def _plain(path: Path, original: Path, _: Sample) -> dict[str, Action]:
    return _checkpoints(path, original) | {
        "read_state_dict": (lambda: _out_of(path, read_state_dict(path)), None),
        "read_data": (lambda: _out_of(path, read_data(path)), None),
        "quantize": (lambda: quantize(path, 4), None),
        "monoquant quantize": (
            lambda: command("quantize", str(path), "-o", _output(path), "--quiet"),
            None,
        ),
    }


def _out_of(path: Path, found: object) -> object:
    """Return what was read, of which every value has to be in the file: these have no checksums."""
    content = path.read_bytes()
    for tensor in tensors_in(found):
        values = bytes(tensor.detach().untyped_storage())
        swapped = content.find(b"byteorderbig") >= 0  # then torch turns them round
        if not swapped and values not in content:
            return "!values that are not in the file"
    return found


def _quantized(path: Path, original: Path, sample: Sample) -> dict[str, Action]:
    make = sample.make
    batch = torch.arange(16) if make is TiedModel else DATA
    expected, held = _held(sample)
    example = CalibrationData.example(batch)
    return _checkpoints(path, original) | {
        "load": (lambda: load_model(path), lambda found: same(found, expected)),
        "load into a model": (
            lambda: load_model(path, make()).state_dict(),
            lambda found: same(found, held),
        ),
        "validate": (lambda: command("validate", str(path), "--json"), None),
        "validate with a model": (lambda: validate_file(path, make(), example), None),
    }


@functools.cache
def _held(sample: Sample) -> tuple[Mapping[str, object], Mapping[str, object]]:
    """Return what a valid file holds, as tensors and as the state dict of its model."""
    path = Path(f"original{sample.suffix}")
    return load_model(path), load_model(path, sample.make()).state_dict()


def _statistics(path: Path, original: Path, sample: Sample) -> dict[str, Action]:
    def written(found: object) -> bool:
        assert isinstance(found, CalibrationStatistics)
        return found.save(_output(path)).read_bytes() == sample.content

    expected = _by_statistics(sample, original)
    return {
        "CalibrationStatistics.load": (lambda: CalibrationStatistics.load(path), written),
        "statistics": (
            lambda: _served(sample, path),
            lambda found: same(found, expected),
        ),
        "monoquant quantize --statistics": (
            lambda: command(
                *("quantize", "--factory", _FACTORY, "--config", str(_SETTINGS)),
                *("--statistics", str(path), "-o", _output(path), "--quiet"),
            ),
            None,
        ),
        "info": (lambda: command("info", str(path)), None),
    }


def _served(sample: Sample, path: Path) -> Mapping[str, object]:
    """Return what a model becomes by statistics."""
    assert sample.quantizer is not None
    quantizer = sample.quantizer.statistics(path)
    return quantizer.apply(sample.make(), progress=False).model.state_dict()


@functools.cache
def _by_statistics(sample: Sample, original: Path) -> Mapping[str, object]:
    return _served(sample, original)


def _blocks(path: Path, original: Path, sample: Sample) -> dict[str, Action]:
    expected = _undisturbed(sample)
    return {
        "resume": (lambda: _resumed(sample, path), lambda found: same(found, expected)),
        "monoquant quantize --resume": (
            lambda: _in_folder(
                path,
                lambda: command(
                    *("quantize", "--factory", _FACTORY, "--config", str(_SETTINGS)),
                    *("--calibration", str(_BATCH), "--resume", str(_FOLDER)),
                    *("-o", _output(path), "--quiet"),
                ),
                BLOCK,
            ),
            None,
        ),
    }


def _resumed(sample: Sample, path: Path) -> object:
    """Return what a run comes to that finds a file of its first block."""
    assert sample.quantizer is not None
    plan = sample.quantizer.fit(DATA).plan(sample.make())
    result = _in_folder(path, lambda: plan.run(resume=_FOLDER, progress=False), BLOCK)
    return result.model.state_dict()


@functools.cache
def _undisturbed(sample: Sample) -> Mapping[str, object]:
    assert sample.quantizer is not None
    return sample.quantizer.fit(DATA).apply(sample.make(), progress=False).model.state_dict()


def _in_folder(path: Path, run: Callable[[], FoundT], name: str) -> FoundT:
    """Return what comes of a run while a file is in a folder of its own."""
    _FOLDER.mkdir()
    try:
        (_FOLDER / name).write_bytes(path.read_bytes())
        return run()
    finally:
        shutil.rmtree(_FOLDER)


def _arrays(path: Path, original: Path, _: Sample) -> dict[str, Action]:
    def batches() -> list[Tensor]:
        data = CalibrationData.bind(read_data(_FOLDER), 8)
        return [tensor for batch in data.batches() for tensor in tensors_in(batch)]

    return {
        "read_arrays": (lambda: read_arrays(path), None),
        "read_data": (lambda: read_data(path), None),
        "read_data of a folder": (lambda: _in_folder(path, batches, path.name), None),
        "monoquant calibrate": (
            lambda: command(
                *("calibrate", "--factory", _FACTORY, "--calibration", str(path)),
                *("-o", f"{OUTPUT}.safetensors", "--quiet"),
            ),
            None,
        ),
    }


def _settings(path: Path, original: Path, _: Sample) -> dict[str, Action]:
    given = ("--factory", _FACTORY, "--calibration", str(_BATCH), "--config", str(path))
    return {
        "--config, dumped": (lambda: command("quantize", *given, "--dump-config"), None),
        "--config, planned": (lambda: command("plan", *given), None),
    }


_BY_ROLE: Mapping[str, Callable[[Path, Path, Sample], Mapping[str, Action]]] = {
    "quantized": _quantized,
    "plain": _plain,
    "statistics": _statistics,
    "block": _blocks,
    "array": _arrays,
    "settings": _settings,
}


def same(found: object, expected: Mapping[str, object]) -> bool:
    """Return whether what was loaded is equal to the bit to what the valid file holds."""
    if not isinstance(found, Mapping) or set(found) != set(expected):
        return False
    return all(_same(found[key], value) for key, value in expected.items())


def _same(one: object, other: object) -> bool:
    if isinstance(one, QTensor) and isinstance(other, QTensor):
        extra, more = one.qparams.extra, other.qparams.extra
        return (
            same_bits(one.codes, other.codes)
            and _same(one.qparams.scale, other.qparams.scale)
            and _same(one.qparams.zero_point, other.qparams.zero_point)
            and set(extra) == set(more)
            and all(_same(extra[key], more[key]) for key in extra)
        )
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.is_neg() or one.is_conj():
            return False
        return same_bits(one.detach().clone(memory_format=torch.contiguous_format), other.detach())
    return one is other


def command(*words: str) -> str:
    """Return the exit code of a command, in words; what must not be begins with an exclamation."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(words)
    said = out.getvalue() + err.getvalue()
    if code in (0, 1, 2):
        strange = {one for one in said if not one.isprintable()} - {"\n"}
        return f"!characters that are obeyed: {strange!r}" if strange else f"exit {code}"
    return f"!exit {code}: {err.getvalue().strip():.150}"


def _output(path: Path) -> str:
    return f"{OUTPUT}{path.suffix}"
