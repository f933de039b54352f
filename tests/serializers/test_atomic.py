"""A file is the old one or the whole new one."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from mono_quant import GPTQ, CheckpointError, Quantizer, load_model, save_model
from tests.serializers.files import SUFFIXES, assert_same, small

each_suffix = pytest.mark.parametrize("suffix", SUFFIXES)
Fail = Callable[[type[BaseException]], None]


@pytest.fixture
def failing_writers(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Return a function that makes both formats write a part of their file and then raise."""

    def fail(error: type[BaseException]) -> None:
        def writing_safetensors(tensors: object, path: Path, metadata: object) -> None:
            path.write_bytes(b"half")
            raise error("no space left on device")

        def writing_pickles(content: object, place: object) -> None:
            if isinstance(place, Path):
                place.write_bytes(b"half")
            raise error("no space left on device")

        monkeypatch.setattr(
            "mono_quant.serializers.safetensors.serialize_file", writing_safetensors
        )
        monkeypatch.setattr(torch, "save", writing_pickles)

    return fail


@each_suffix
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, MemoryError])
def test_a_failing_writer_leaves_the_old_file_and_nothing_beside_it(
    suffix: str, error: type[BaseException], tmp_path: Path, failing_writers: Fail
) -> None:
    path = tmp_path / f"model{suffix}"
    old = Quantizer().apply(small())
    old.save(path)
    before = path.read_bytes()
    failing_writers(error)
    with pytest.raises(error):
        Quantizer().bits(4).apply(small()).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    assert_same(load_model(path, small()), old.model)


@each_suffix
def test_a_failing_writer_leaves_nothing_where_nothing_was(
    suffix: str, tmp_path: Path, failing_writers: Fail
) -> None:
    failing_writers(OSError)
    with pytest.raises(OSError, match="no space"):
        Quantizer().apply(small()).save(tmp_path / f"model{suffix}")
    assert not list(tmp_path.iterdir())


@contextmanager
def small_files_only() -> Iterator[None]:
    """Let no file of this process grow past a few kB: what a full disk does, by the kernel.

    The log that the tests are written to is such a file too: nothing is printed in here.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@each_suffix
def test_a_disk_that_is_full_is_an_os_error_and_leaves_the_old_file(
    suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"model{suffix}"
    Quantizer().apply(small()).save(path)
    before = path.read_bytes()
    large = Quantizer().apply(nn.Linear(512, 512))
    with small_files_only(), pytest.raises(OSError, match="model"):
        large.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_statistics_and_the_page_that_were_there(tmp_path: Path) -> None:
    model, x = nn.Linear(128, 64), torch.ones(4, 128)
    quantizer = Quantizer().bits(4).only("*").rounding(GPTQ())
    known = quantizer.fit(x).plan(model).calibrate(progress=False)
    deep = nn.Sequential(*(nn.Linear(16, 16) for _ in range(50)))
    report = Quantizer().apply(deep).report
    path, page = tmp_path / "known.safetensors", tmp_path / "report.html"
    path.write_bytes(b"as it was")
    page.write_bytes(b"as it was")
    with small_files_only():
        with pytest.raises(OSError, match="known"):
            known.save(path)
        with pytest.raises(OSError, match=r"report\.html"):
            report.to_html(page)
    assert path.read_bytes() == page.read_bytes() == b"as it was"
    assert sorted(tmp_path.iterdir()) == [path, page]
    report.to_html(page)
    assert page.stat().st_size > 20_000


@each_suffix
def test_a_missing_directory_is_an_os_error_and_loses_nothing(suffix: str, tmp_path: Path) -> None:
    result = Quantizer().apply(small())
    with pytest.raises(FileNotFoundError, match="missing"):
        result.save(tmp_path / "missing" / f"model{suffix}")
    with pytest.raises(FileNotFoundError, match="missing"):
        save_model(result.model, tmp_path / "missing" / f"model{suffix}")
    assert not list(tmp_path.iterdir())
    path = result.save(tmp_path / f"model{suffix}")
    assert_same(load_model(path, small()), result.model)


@each_suffix
def test_a_directory_is_no_file(suffix: str, tmp_path: Path) -> None:
    folder = tmp_path / f"model{suffix}"
    folder.mkdir()
    (folder / "inside").write_text("kept")
    with pytest.raises(OSError, match="model"):
        Quantizer().apply(small()).save(folder)
    assert (folder / "inside").read_text() == "kept"
    assert list(tmp_path.iterdir()) == [folder]
    with pytest.raises(OSError, match="model"):
        load_model(folder, small())


@each_suffix
def test_a_file_that_is_not_there_is_an_os_error_that_names_it(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"model{suffix}"):
        load_model(tmp_path / f"model{suffix}", small())


@pytest.mark.parametrize(
    "name", ["model", "model.bin", "model.onnx", "model.safetensors.bak", ".pt"]
)
def test_an_unknown_suffix_is_refused_both_ways_naming_the_known_ones(
    name: str, tmp_path: Path
) -> None:
    result = Quantizer().apply(small())
    known = r"none of the suffixes \.safetensors, \.pt, \.pth"
    with pytest.raises(CheckpointError, match=known):
        result.save(tmp_path / name)
    assert not list(tmp_path.iterdir())
    (tmp_path / name).write_bytes(b"something")
    with pytest.raises(CheckpointError, match=known):
        load_model(tmp_path / name, small())


@each_suffix
def test_a_new_file_has_the_permissions_of_any_new_file(suffix: str, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    path = Quantizer().apply(small()).save(tmp_path / f"model{suffix}")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_killed_process_leaves_the_old_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    result = Quantizer().apply(small())
    result.save(path)
    before = path.read_bytes()
    code = (
        "import os, sys\n"
        "import torch\n"
        "from torch import nn\n"
        "from pathlib import Path\n"
        "from mono_quant import Quantizer\n"
        "os.fsync = lambda _: os._exit(9)\n"
        "Quantizer().apply(nn.Linear(64, 64)).save(sys.argv[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, os.fspath(path)], check=False)
    assert done.returncode == 9
    assert path.read_bytes() == before
    assert_same(load_model(path, small()), result.model)
