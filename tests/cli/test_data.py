"""Data from the files that people have: torch's, safetensors', numpy's, and folders of them."""

import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import cast

import numpy
import pytest
import torch
from torch import Tensor

from mono_quant import InputError, load_model
from mono_quant.cli.arrays import read_arrays
from mono_quant.cli.inputs import Folder, read_data
from tests.cli.conftest import SMALL, TIED, Monoquant
from tests.cli.networks import small
from tests.helpers import same_tensors

ARRAYS = {
    "floats": numpy.random.default_rng(0).normal(size=(3, 4, 5)).astype("float32"),
    "doubles": numpy.random.default_rng(1).normal(size=(2, 3)),
    "halves": numpy.arange(6, dtype="float16").reshape(2, 3),
    "bytes": numpy.arange(6, dtype="uint8"),
    "counts": numpy.arange(6, dtype="int64").reshape(3, 2) - 3,
    "flags": numpy.array([True, False]),
    "columns": numpy.asfortranarray(numpy.arange(24, dtype="int32").reshape(2, 3, 4)),
    "scalar": numpy.array(2.5, dtype="float32"),
    "none": numpy.zeros((0, 7), dtype="float32"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_is_read_as_numpy_reads_it(name: str, tmp_path: Path) -> None:
    numpy.save(tmp_path / "x.npy", ARRAYS[name])
    found = read_arrays(tmp_path / "x.npy")
    assert isinstance(found, Tensor)
    expected = torch.from_numpy(numpy.load(tmp_path / "x.npy").copy())
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("save", [numpy.savez, numpy.savez_compressed])
def test_an_archive_is_read_by_name(save: object, tmp_path: Path) -> None:
    assert callable(save)
    save(tmp_path / "x.npz", **ARRAYS)
    found = read_arrays(tmp_path / "x.npz")
    assert isinstance(found, dict)
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert torch.equal(found[name], torch.from_numpy(array.copy())), name


class Trap:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> tuple[object, ...]:
        return (sys.exit, (9,))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (numpy.array([Trap()], dtype=object), r"holds no numbers that torch has"),
        (numpy.array(["a"]), r"holds no numbers that torch has"),
        (numpy.array([1 + 2j]), r"holds no numbers that torch has"),
        (numpy.zeros(2, dtype=[("a", "f4")]), r"holds no numbers that torch has"),
        (numpy.zeros(2, dtype=">f4"), r"other order; save it with array.astype"),
    ],
    ids=["objects", "text", "complex", "records", "big-endian"],
)
def test_what_is_no_number_is_refused_and_not_run(
    array: "numpy.ndarray[tuple[int, ...], numpy.dtype[numpy.generic]]", words: str, tmp_path: Path
) -> None:
    numpy.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(InputError, match=words):
        read_arrays(tmp_path / "x.npy")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_a_file_that_was_cut_is_refused(suffix: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    (numpy.save if suffix == ".npy" else numpy.savez)(path, ARRAYS["floats"])
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=r"x\.np. is no whole file of numpy's"):
        read_arrays(path)


def test_a_header_that_is_no_literal_is_refused(tmp_path: Path) -> None:
    shaped = b"{'descr': '<f4', 'fortran_order': False, 'shape': %s}"
    headers = [b"__import__('os').system('true')", b"3", b"{'descr': '<f4'}", b"[" * 4000]
    headers += [shaped % shape for shape in (b"5", b"('a',)", b"(-1,)", b"(1.5,)", b"None")]
    for header in headers:
        content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
        (tmp_path / "x.npy").write_bytes(content)
        with pytest.raises(InputError, match="no whole file"):
            read_arrays(tmp_path / "x.npy")


def test_an_archive_that_claims_much_more_than_it_has_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    numpy.savez_compressed(path, x=numpy.zeros(1 << 22, numpy.float64))  # 32 MiB in 32 kB
    with pytest.raises(InputError, match=r"x\.npz: its arrays claim 33554\d+ bytes, more than the"):
        read_arrays(path)


def test_a_header_is_as_long_as_numpy_reads_and_no_longer(tmp_path: Path) -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2,)%s}"
    for spaces, reads in ((9_000, True), (9_999, False), (10_000_000, False)):
        text = header % (b" " * spaces)
        content = b"\x93NUMPY\x02\x00" + len(text).to_bytes(4, "little") + text + bytes(8)
        (tmp_path / "x.npy").write_bytes(content)
        if reads:
            assert torch.equal(torch.zeros(2), cast("Tensor", read_arrays(tmp_path / "x.npy")))
            continue
        with pytest.raises(InputError, match=r"no whole file of numpy's: its header has \d+ bytes"):
            read_arrays(tmp_path / "x.npy")


@pytest.mark.parametrize("names", [("x.npy", "x.npy"), ("x.npy", "x")])
@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_two_arrays_of_one_name_are_refused(names: tuple[str, str], tmp_path: Path) -> None:
    numpy.save(tmp_path / "x.npy", ARRAYS["floats"])
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        for name in names:
            archive.write(tmp_path / "x.npy", name)
    with pytest.raises(InputError, match="two arrays have one name"):
        read_arrays(tmp_path / "x.npz")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors"])
def test_a_pipe_is_no_data_and_is_not_waited_for(suffix: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / f"x{suffix}")
    with pytest.raises(FileNotFoundError, match=r"x\.\w+ is not a file"):
        read_data(tmp_path / f"x{suffix}")


@pytest.mark.parametrize("damage", ["stream", "encrypted", "method", "place", "size"])
def test_an_archive_that_cannot_be_unpacked_is_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    numpy.savez_compressed(path, x=numpy.arange(1000.0))
    content = bytearray(path.read_bytes())
    local, central = content.index(b"PK\x03\x04"), content.index(b"PK\x01\x02")
    if damage == "stream":
        content[local + 60 : local + 80] = bytes(20)
    elif damage == "encrypted":
        content[local + 6] |= 1
        content[central + 8] |= 1
    elif damage == "size":
        content[central + 20 : central + 24] = (1 << 30).to_bytes(4, "little")
    elif damage == "place":  # of the list of what is in it, before its beginning
        content[-6:-2] = (2 * len(content)).to_bytes(4, "little")
    else:
        content[local + 8] = content[central + 10] = 97
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.npz is no whole file of numpy's"):
        read_arrays(path)


WITHOUT = """
import sys
sys.modules["numpy"] = None
from pathlib import Path
from mono_quant.cli.inputs import read_data
print(tuple(read_data(Path("x.npz")).shape))
"""


def test_numpy_is_not_needed_for_its_files(tmp_path: Path) -> None:
    numpy.savez(tmp_path / "x.npz", ARRAYS["floats"])
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "(3, 4, 5)\n"


def quantized(monoquant: Monoquant, data: str, output: str) -> None:
    done = monoquant(
        "quantize", "model.pt", "--factory", SMALL, "--calibration", data, "-o", output
    )
    assert done.code == 0, done.err


def test_every_kind_of_file_gives_the_same_model(folder: Path, monoquant: Monoquant) -> None:
    batches = torch.load("batches.pt")
    numpy.savez("batch.npz", batches[0].numpy())
    numpy.save("batch.npy", batches[0].numpy())
    torch.save(batches[0], "batch.pt")
    (folder / "one").mkdir()
    shutil.copy("batch.pt", "one/a.pt")
    models = []
    for data in ("batch.npz", "batch.npy", "batch.pt", "batch.safetensors", "one"):
        quantized(monoquant, data, "small.pt")
        models.append(load_model("small.pt", small()))
    assert all(same_tensors(model, models[0]) for model in models)


def test_a_folder_is_its_files_in_the_order_of_their_names(
    folder: Path, monoquant: Monoquant
) -> None:
    (folder / "data").mkdir()
    batches = torch.load("batches.pt")
    for place, batch in enumerate(batches):
        numpy.save(f"data/{place}.npy", batch.numpy())
    (folder / "data" / ".hidden").touch()
    quantized(monoquant, "data", "one.pt")
    quantized(monoquant, "batches.pt", "other.pt")
    one, other = (load_model(name, small()) for name in ("one.pt", "other.pt"))
    assert same_tensors(one, other)
    found = Folder.of(folder / "data")
    assert len(found) == len(batches)
    rest = found[1:]
    assert len(rest) == len(batches) - 1
    first = rest[0]
    assert isinstance(first, Tensor)
    assert torch.equal(first, batches[1])


def test_several_arrays_are_keyword_arguments(folder: Path, monoquant: Monoquant) -> None:
    numpy.savez("tied.npz", ids=numpy.arange(24).reshape(3, 8), mask=numpy.ones((3, 8), "float32"))
    done = monoquant(
        "quantize", "tied.safetensors", "--factory", TIED, "--calibration", "tied.npz", "-o", "t.pt"
    )
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("name", "code", "complaint"),
    [
        ("empty", 2, "empty is empty: expected a batch in each file, .pt, .pth, .safetensors"),
        ("foreign", 2, "foreign holds notes.txt, which is no batch: expected .pt"),
        ("nowhere", 3, "nowhere is not a file"),
        ("pickled.npy", 2, "holds no numbers that torch has; save it as another dtype"),
    ],
)
def test_data_that_is_none_is_refused_in_one_line(
    name: str, code: int, complaint: str, folder: Path, monoquant: Monoquant
) -> None:
    (folder / "empty").mkdir()
    (folder / "foreign").mkdir()
    (folder / "foreign" / "notes.txt").touch()
    numpy.save("pickled.npy", numpy.array([{}], dtype=object), allow_pickle=True)
    done = monoquant(
        "quantize", "model.pt", "--factory", SMALL, "--calibration", name, "-o", "small.pt"
    )
    assert done.code == code
    assert complaint in done.complaint
    assert not (folder / "small.pt").exists()


def test_a_pickle_is_never_run_as_data(folder: Path) -> None:
    Path("trap.pt").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(Exception, match=r"trap\.pt"):
        read_data(Path("trap.pt"))
