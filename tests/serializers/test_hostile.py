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
from tests.helpers import same_bits
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


def nested(function: bytes, argument: bytes) -> bytes:
    """Return a pickle that has a function of torch's call another one."""
    return (
        b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n("
        + function
        + b"ctorch\nTensor\n("
        + argument
        + b"t}tR."
    )


MEMORY = b"ctorch.storage\nUntypedStorage\n"
MAKES_MEMORY = {
    "a tensor": call("torch.Tensor", NUMBER),
    "memory": call("torch.storage.UntypedStorage", NUMBER),
    "memory of floats": call("torch.FloatStorage", NUMBER),
    "a new object": call("torch.storage.UntypedStorage", NUMBER).replace(b"tR.", b"t\x81."),
    "from the memo": b"\x80\x02(" + MEMORY + b"q\x01th\x01(" + NUMBER + b"tR.",
    "by another function": nested(MEMORY, NUMBER),
    "by another function of the memo": b"\x80\x02" + nested(MEMORY + b"q\x01", NUMBER)[2:],
    "what was made": b"\x80\x02ccollections\nOrderedDict\n)R)R.",
}


@pytest.mark.parametrize("pickled", MAKES_MEMORY.values(), ids=MAKES_MEMORY)
@pytest.mark.parametrize("reader", [load_model, read_state_dict, read_data])
def test_what_makes_memory_is_named_and_never_called(
    reader: Callable[[Path], object],
    pickled: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object, **__: object) -> object:
        raise AssertionError("torch was asked to read it")

    path = tmp_path / "memory.pt"
    archive(path, pickled)
    monkeypatch.setattr(torch, "load", never)
    with pytest.raises(CorruptCheckpointError, match=r"memory\.pt (calls|is not a file)"):
        reader(path)


@pytest.mark.parametrize("new", [True, False])
def test_memory_that_is_claimed_and_not_there_is_never_made(
    new: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> object:
        raise AssertionError("torch was asked to read it")

    path = tmp_path / "claiming.pt"
    torch.save({"weight": torch.ones(1000)}, path, _use_new_zipfile_serialization=new)
    content = path.read_bytes()
    assert content.count(b"cpuq") == 1
    place = content.index(b"M\xe8\x03", content.index(b"cpuq"))  # 1000 of two bytes
    claimed = content[:place] + NUMBER + content[place + 3 :]
    if new:
        with zipfile.ZipFile(path) as whole:
            records = {one: whole.read(one) for one in whole.namelist()}
        with zipfile.ZipFile(path, "w") as made:
            for name, record in records.items():
                at = record.find(b"M\xe8\x03", record.find(b"cpuq"))
                is_main = name.endswith("data.pkl")
                made.writestr(name, record[:at] + NUMBER + record[at + 3 :] if is_main else record)
    else:
        path.write_bytes(claimed)
    monkeypatch.setattr(torch, "load", never)
    with pytest.raises(CorruptCheckpointError, match="claims tensors that are larger than"):
        read_state_dict(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_memory_that_its_record_does_not_have_is_never_made(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older versions of torch read on behind the record."""

    def never(*_: object, **__: object) -> object:
        raise AssertionError("torch was asked to read it")

    path = tmp_path / "short.pt"
    torch.save({"weight": torch.ones(1000).to(dtype), "more": torch.ones(9000)}, path)
    with zipfile.ZipFile(path) as whole:
        records = {one: whole.read(one) for one in whole.namelist()}
    with zipfile.ZipFile(path, "w") as made:
        for name, record in records.items():
            made.writestr(name, record[:-1] if name.endswith("data/0") else record)
    monkeypatch.setattr(torch, "load", never)
    with pytest.raises(CorruptCheckpointError, match=r"claims \d+ bytes of its record \w+/data/0"):
        read_state_dict(path)


@pytest.mark.parametrize("part", ["offset", "shape", "stride"])
@pytest.mark.parametrize("new", [True, False])
def test_a_tensor_that_reaches_beyond_its_memory_is_never_made(
    new: bool, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch enlarges the memory of its first format, whatever that takes."""

    def never(*_: object, **__: object) -> object:
        raise AssertionError("torch was asked to read it")

    path = tmp_path / "reaching.pt"
    torch.save({"weight": torch.ones(1000)}, path, _use_new_zipfile_serialization=new)
    with monkeypatch.context() as patch:
        changed = {"offset": (7, (1000,), (1,)), "shape": (0, (1001,), (1,))}
        offset, shape, strides = changed.get(part, (0, (1000,), (2,)))
        view = torch.ones(1000)
        patch.setattr(torch.Tensor, "storage_offset", lambda _: offset)
        patch.setattr(torch.Tensor, "size", lambda _: torch.Size(shape))
        patch.setattr(torch.Tensor, "stride", lambda _: strides)
        torch.save({"weight": view}, path, _use_new_zipfile_serialization=new)
    monkeypatch.setattr(torch, "load", never)
    with pytest.raises(CorruptCheckpointError, match="holds a tensor that reaches beyond"):
        read_state_dict(path)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(12.0)[3:7],
        torch.ones(1).expand(3),
        torch.ones(()),
        torch.ones(0, 7),
        torch.arange(12.0)[12:],
        torch.ones(3, 4, dtype=torch.bfloat16)[1:],
    ],
    ids=["turned", "part", "spread", "scalar", "empty", "end", "bfloat16"],
)
@pytest.mark.parametrize("new", [True, False])
def test_a_tensor_within_its_memory_is_read(new: bool, tensor: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "within.pt"
    torch.save({"weight": tensor}, path, _use_new_zipfile_serialization=new)
    assert same_bits(read_state_dict(path)["weight"].contiguous(), tensor.contiguous())


@pytest.mark.parametrize("new", [True, False])
def test_memory_that_many_tensors_share_is_claimed_once(new: bool, tmp_path: Path) -> None:
    path, whole = tmp_path / "shared.pt", torch.arange(1000.0)
    state = {str(place): whole[place:] for place in range(50)}
    torch.save(state, path, _use_new_zipfile_serialization=new)
    assert all(torch.equal(one, state[key]) for key, one in read_state_dict(path).items())


def test_tensors_with_attributes_and_parameters_are_read(tmp_path: Path) -> None:
    """They are made by a function that is handed another one."""
    path, tagged = tmp_path / "tagged.pt", torch.arange(3.0)
    setattr(tagged, "tag", "a")  # noqa: B010  # tensors have no such attribute in their type
    torch.save({"tagged": tagged, "parameter": torch.nn.Parameter(torch.ones(2))}, path)
    assert b"_rebuild_from_type_v2" in path.read_bytes()
    found = read_state_dict(path)
    assert torch.equal(found["tagged"], tagged)
    assert torch.equal(found["parameter"], torch.ones(2))


def test_a_record_that_calls_itself_a_folder_is_refused(tmp_path: Path) -> None:
    """Torch would read nothing of it, and hand out memory that nobody wrote to."""
    path = tmp_path / "folder.pt"
    torch.save({"weight": torch.ones(1000)}, path)
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"/data/0"))
    content[entry + 38] |= 0x10
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match="a record that calls itself a folder"):
        read_state_dict(path)


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
