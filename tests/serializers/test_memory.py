"""A loaded model owns its memory: the file may be changed, cut or deleted."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mono_quant import Quantizer, load_model, quantize
from tests.helpers import same_bits
from tests.serializers.files import SUFFIXES, small, write

each_suffix = pytest.mark.parametrize("suffix", SUFFIXES)


def mapped(path: Path) -> list[str]:
    """Return the mappings of a file in this process."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if str(path) in line]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@each_suffix
def test_no_file_stays_mapped(suffix: str, tmp_path: Path) -> None:
    path = Quantizer().bits(4).apply(small()).save(tmp_path / f"model{suffix}")
    loaded = load_model(path, small())
    everything = load_model(path)
    assert not mapped(path)
    assert loaded is not None
    assert everything


def overwrite(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(b"\xff" * size)


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(10)


@each_suffix
@pytest.mark.parametrize("harm", [overwrite, truncate, Path.unlink])
def test_what_happens_to_the_file_changes_nothing(
    harm: Callable[[Path], None], suffix: str, tmp_path: Path
) -> None:
    result = Quantizer().bits(4).apply(small())
    path = result.save(tmp_path / f"model{suffix}")
    loaded, found = load_model(path, small()), load_model(path)
    harm(path)
    x = torch.randn(3, 64)
    assert same_bits(loaded(x), result.model(x))
    bias = found["0.bias"]
    assert isinstance(bias, Tensor)
    assert same_bits(bias, result.model[0].get_parameter("bias"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_saving_and_writing_to_the_model_are_apart(suffix: str, tmp_path: Path) -> None:
    result = Quantizer().apply(small())
    path = result.save(tmp_path / f"model{suffix}")
    before = path.read_bytes()
    with torch.no_grad():
        for tensor in (*result.model.parameters(), *result.model.buffers()):
            tensor.zero_()
    assert path.read_bytes() == before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_quantized_from_a_file_do_not_keep_it_mapped(suffix: str, tmp_path: Path) -> None:
    """Else what stayed float would change with the file, or kill the process with it."""

    path = tmp_path / f"float{suffix}"
    state = small().state_dict()
    if suffix == ".pt":
        torch.save(state, path)
    else:
        write(path, {}, {name: tensor.contiguous() for name, tensor in state.items()})
    result = quantize(path)
    assert result.report.quantized
    assert not mapped(path)
