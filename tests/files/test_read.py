"""Today's code reads what every released version wrote, and computes what that did."""

import json
from pathlib import Path
from typing import TypedDict

import pytest
import torch
from torch import Tensor

from mono_quant import Quantizer, __version__, dequantize_model, load_model, sqnr_db
from mono_quant.configurable import Config
from mono_quant.files import describe_file
from mono_quant.serializers.wire import FORMAT_VERSION
from tests.files.write import FOLDER, KEPT, ROWS, STATISTICS, WRITTEN, linear


class Written(TypedDict):
    """What is written beside statistics."""

    settings: Config
    model: dict[str, list[float]]
    output: list[list[float]]


FILES = sorted(path for path in FOLDER.glob("*/*") if path.suffix in (".safetensors", ".pt"))
each_file = pytest.mark.parametrize(
    "path", FILES, ids=[f"{path.parent.name}/{path.name}" for path in FILES]
)


def expected(path: Path) -> Tensor:
    """Return what the layers of a file returned when it was written, decoded to floats."""
    return torch.tensor(json.loads(path.with_suffix(".json").read_text()))


@each_file
def test_a_file_of_a_released_version_is_read_and_computes_the_same(path: Path) -> None:
    written = WRITTEN[path.stem]
    with torch.device("meta"):
        skeleton = written.make().eval()
    model = load_model(path, skeleton)
    with torch.no_grad():
        torch.testing.assert_close(
            dequantize_model(model)(written.batch), expected(path), rtol=1e-5, atol=1e-6
        )
        assert sqnr_db(expected(path), model(written.batch)) > 25


@each_file
def test_a_file_of_a_released_version_describes_itself(path: Path) -> None:
    info = describe_file(path)
    assert info.format_version <= FORMAT_VERSION
    assert info.producer["mono_quant"] == path.parent.name
    assert {weight.name for weight in info.weights} <= set(load_model(path))


KEPT_FILES = sorted(FOLDER.glob(f"*/{KEPT}/*.safetensors"))


@pytest.mark.parametrize("path", KEPT_FILES, ids=lambda path: f"{path.parts[-3]}/{path.stem}")
def test_statistics_and_settings_of_a_released_version_serve_as_they_did(path: Path) -> None:
    written: Written = json.loads(path.with_suffix(".json").read_text())
    quantizer = Quantizer.from_config(written["settings"])
    model = linear().eval()
    model.load_state_dict({key: torch.tensor(one) for key, one in written["model"].items()})
    result = quantizer.statistics(path).apply(model, progress=False)
    with torch.no_grad():
        torch.testing.assert_close(
            result.dequantize()(ROWS), torch.tensor(written["output"]), rtol=1e-5, atol=1e-6
        )
    static = [row.name for row in result.report.quantized if "static" in row.fate]
    assert bool(static) == (path.stem != "rows")


def test_this_version_has_written_its_own() -> None:
    """A release without its files is a promise that nobody can check later."""
    kept = [path.stem for path in KEPT_FILES if path.parts[-3] == __version__]
    assert sorted(kept) == sorted(STATISTICS)
    stems = [path.stem for path in FILES if path.parent.name == __version__]
    assert sorted(stems) == sorted(WRITTEN)
    assert {path.suffix for path in FILES} == {".safetensors", ".pt"}
