"""Files that were made to do harm: to run code, to take memory, to never end, to deceive."""

import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mono_quant import CorruptCheckpointError, Quantizer, load_model, quantize, read_state_dict
from mono_quant.cli.inputs import read_data
from tests.serializers.files import read, small, write

LARGE = 200_000_000
"""Bytes that a hostile file asks for, which none of these tests may ever take."""


def archive(path: Path, pickled: bytes, *, compression: int = zipfile.ZIP_STORED) -> None:
    """Write a file as torch would, whose objects are what a pickle says."""
    with zipfile.ZipFile(path, "w", compression) as made:
        made.writestr("model/data.pkl", pickled)
        made.writestr("model/byteorder", "little")
        made.writestr("model/data/0", bytes(4))
        made.writestr("model/version", "3\n")


def call(name: str, argument: bytes) -> bytes:
    """Return a pickle that calls something with one argument."""
    module, _, own = name.rpartition(".")
    return f"\x80\x02c{module}\n{own}\n(".encode("latin-1") + argument + b"tR."


NUMBER = b"J" + struct.pack("<i", LARGE)
CALLS = {
    "bytearray": call("builtins.bytearray", NUMBER),
    "bytearray, as Python 2 calls it": call("__builtin__.bytearray", NUMBER),
    "encode": call("_codecs.encode", b"X\x03\x00\x00\x00abcX\x06\x00\x00\x00utf-32"),
    "a tensor of nothing": call("torch.Tensor", NUMBER),
    "memory of nothing": call("torch.storage.UntypedStorage", NUMBER),
}


@pytest.mark.parametrize("pickled", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("reader", [load_model, read_state_dict, read_data])
def test_a_few_bytes_never_become_many(
    reader: Callable[[Path], object], pickled: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "bomb.pt"
    archive(path, pickled)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptCheckpointError, match=r"bomb\.pt"):
            reader(path)
        assert tracemalloc.get_traced_memory()[1] < LARGE / 10
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("reader", [load_model, read_state_dict])
def test_a_compressed_file_is_refused_before_it_is_unpacked(
    reader: Callable[[Path], object], tmp_path: Path
) -> None:
    plain, path = tmp_path / "plain.pt", tmp_path / "small.pt"
    torch.save({"weight": torch.zeros(LARGE // 40)}, plain)
    with zipfile.ZipFile(plain) as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for name in whole.namelist():
            made.writestr(name, whole.read(name))
    assert path.stat().st_size < LARGE / 1000
    with pytest.raises(CorruptCheckpointError, match=r"small\.pt is compressed.*save it again"):
        reader(path)


@pytest.mark.parametrize("reader", [load_model, read_state_dict])
def test_a_tensor_that_claims_to_be_a_folder_is_refused(
    reader: Callable[[Path], object], tmp_path: Path
) -> None:
    """Torch would read nothing of it, and return the memory that it was to be read into."""
    plain, path = tmp_path / "plain.pt", tmp_path / "folder.pt"
    torch.save({"weight": torch.arange(9)}, plain)
    with zipfile.ZipFile(plain) as whole, zipfile.ZipFile(path, "w") as made:
        for one in whole.infolist():
            content = whole.read(one)
            if "/data/" in one.filename:
                one.external_attr |= 0x10
            made.writestr(one, content)
    assert read_state_dict(plain)["weight"].tolist() == list(range(9))
    with pytest.raises(CorruptCheckpointError, match=r"folder\.pt.*marked as folders"):
        reader(path)


def test_records_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    """A hundred names of one record would be read a hundred times."""
    path = tmp_path / "shared.pt"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("model/data.pkl", b"\x80\x02}.")
        made.writestr("model/data/0", bytes(100_000))
        (first,) = (one for one in made.infolist() if one.filename.endswith("/0"))
        for number in range(1, 100):
            again = zipfile.ZipInfo(f"model/data/{number}")
            again.header_offset, again.file_size = first.header_offset, first.file_size
            again.compress_size, again.CRC = first.compress_size, first.CRC
            made.filelist.append(again)
    with pytest.raises(CorruptCheckpointError, match="larger than the file"):
        read_state_dict(path)


def test_an_archive_that_two_readers_understand_in_two_ways_is_refused(tmp_path: Path) -> None:
    """One may follow the end's own numbers, another those of the 64-bit end elsewhere."""
    path = tmp_path / "two.pt"
    torch.save({"weight": torch.ones(3)}, path)
    content = bytearray(path.read_bytes())
    assert content[-42:-38] == b"PK\x06\x07"
    content[-34:-26] = (8).to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match="does not end as archives do"):
        read_state_dict(path)


@pytest.mark.parametrize("reader", [load_model, read_state_dict, read_data])
def test_what_holds_itself_is_refused(reader: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "endless.pt"
    endless: dict[str, object] = {}
    endless["model"] = endless
    torch.save(endless, path)
    with pytest.raises(CorruptCheckpointError, match="nested too deeply, or holds itself"):
        reader(path)


def test_what_is_said_again_and_again_is_refused(tmp_path: Path) -> None:
    """Thirty lists that each hold the one before three times are 3 ** 30 items to look at."""
    path = tmp_path / "laughs.pt"
    found: object = [1]
    for _ in range(30):
        found = [found, found, found]
    torch.save(found, path)
    with pytest.raises(CorruptCheckpointError, match="nested too deeply, or holds itself"):
        read_data(path)


def test_values_that_many_names_share_are_read(tmp_path: Path) -> None:
    """Tied tensors, parts of one, and settings that several groups share are no attack."""
    path = tmp_path / "tied.pt"
    whole, betas = torch.randn(4, 64), (0.9, 0.999)
    state = {"whole": whole, "again": whole, "part": whole[1:3], "turned": whole.t()}
    torch.save({"model": state, "groups": [{"betas": betas} for _ in range(20)]}, path)
    found = read_state_dict(path)
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize("size", [1 << 20, 1 << 50])
def test_a_value_that_says_that_it_is_many_is_refused(size: int, tmp_path: Path) -> None:
    path = tmp_path / "spread.pt"
    torch.save({"weight": torch.ones(1).expand(size)}, path)
    with pytest.raises(CorruptCheckpointError, match="larger than the file"):
        quantize(path)


ODD: dict[str, Tensor] = {
    "negated": torch._neg_view(torch.ones(4)),
    "conjugated": torch.ones(4, dtype=torch.complex64).conj(),
    "on no device": torch.empty(4, device="meta"),
    "sparse": torch.eye(4).to_sparse(),
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_a_tensor_that_is_not_its_memory_is_refused(odd: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "odd.pt"
    torch.save({"weight": odd}, path)
    with pytest.raises(CorruptCheckpointError, match="plain memory"):
        read_state_dict(path)


def test_a_sign_that_no_checksum_sees_is_refused(tmp_path: Path) -> None:
    """A flag beside the bytes turns all values round, and leaves the bytes as they were."""
    path = Quantizer().bits(4).apply(small()).save(tmp_path / "model.pt")
    texts, tensors = read(path)
    tensors["2.bias"] = torch._neg_view(tensors["2.bias"])
    write(path, texts, tensors)
    with pytest.raises(CorruptCheckpointError, match=r"model\.pt.*negated"):
        load_model(path, small())


@pytest.mark.parametrize("new", [True, False])
def test_keys_that_are_no_names_are_refused(new: bool, tmp_path: Path) -> None:
    path = tmp_path / "numbered.pt"
    torch.save({5: torch.ones(3)}, path, _use_new_zipfile_serialization=new)
    with pytest.raises(CorruptCheckpointError, match="holds no state dict"):
        read_state_dict(path)
