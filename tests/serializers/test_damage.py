"""Files that are cut, changed or foreign give an error that names them, and run no code."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import TensorSpec, serialize_file
from torch import nn

from mono_quant import (
    CheckpointError,
    CorruptCheckpointError,
    FormatVersionError,
    MonoQuantError,
    Quantizer,
    load_model,
    read_state_dict,
)
from tests.serializers.files import SUFFIXES, assert_same, read, small, write

each_suffix = pytest.mark.parametrize("suffix", SUFFIXES)
POSITIONS = 30


@pytest.fixture
def saved(suffix: str, tmp_path: Path) -> Path:
    """Return a file of a small model."""
    return Quantizer().bits(4).only("*").apply(small()).save(tmp_path / f"model{suffix}")


def assert_refused(path: Path, kind: type[CheckpointError] = CheckpointError) -> None:
    """Assert that nothing of a file is loaded, and that the error names it."""
    skeleton = small()
    with pytest.raises(kind, match=path.name):
        load_model(path, skeleton)
    assert type(skeleton[0]) is nn.Linear
    with pytest.raises(kind, match=path.name):
        load_model(path)


CUTS: dict[str, Callable[[int], int]] = {
    "nothing is left": lambda size: 0,
    "one byte": lambda size: 1,
    "within the first number": lambda size: 5,
    "after the first number": lambda size: 8,
    "within the header": lambda size: 100,
    "a quarter": lambda size: size // 4,
    "half": lambda size: size // 2,
    "within the tensors": lambda size: size - 300,
    "all but 20 bytes": lambda size: size - 20,
    "all but the last byte": lambda size: size - 1,
}


@each_suffix
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_a_truncated_file_is_refused(cut: Callable[[int], int], saved: Path) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: cut(len(content))])
    assert_refused(saved, CorruptCheckpointError)


@each_suffix
def test_a_file_with_a_tail_is_refused_or_the_same(saved: Path) -> None:
    expected = load_model(saved, small())
    with saved.open("ab") as file:
        file.write(b"more")
    try:
        found = load_model(saved, small())
    except CorruptCheckpointError:
        return
    assert_same(found, expected)


@pytest.mark.parametrize("suffix", [".safetensors"])
@pytest.mark.parametrize("place", range(POSITIONS))
def test_a_flipped_bit_of_a_safetensors_file_is_refused(place: int, saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[place * (len(content) - 1) // (POSITIONS - 1)] ^= 1 << place % 8
    saved.write_bytes(content)
    assert_refused(saved)


@pytest.mark.parametrize("suffix", [".pt"])
@pytest.mark.parametrize("place", range(POSITIONS))
def test_a_flipped_bit_of_a_pt_file_is_refused_or_was_of_no_use(place: int, saved: Path) -> None:
    """Torch's format pads its tensors with bytes that nobody reads."""
    expected = load_model(saved, small())
    content = bytearray(saved.read_bytes())
    content[place * (len(content) - 1) // (POSITIONS - 1)] ^= 1 << place % 8
    saved.write_bytes(content)
    try:
        found = load_model(saved, small())
    except CheckpointError:
        assert_refused(saved)
    else:
        assert_same(found, expected)


@each_suffix
@pytest.mark.parametrize("name", ["0.weight.codes", "0.weight.scale", "1.running_mean", "2.bias"])
def test_a_changed_tensor_is_named(name: str, saved: Path) -> None:
    texts, tensors = read(saved)
    tensors[name].flatten()[0] += 1
    write(saved, texts, tensors)
    with pytest.raises(CorruptCheckpointError, match=rf"{name}.* was changed"):
        load_model(saved, small())


@each_suffix
def test_a_changed_header_is_refused(saved: Path) -> None:
    texts, tensors = read(saved)
    texts["header"] = texts["header"].replace('"bits": 4', '"bits": 3')
    write(saved, texts, tensors)
    with pytest.raises(CorruptCheckpointError, match=rf"{saved.name}.*its header was changed"):
        load_model(saved)


@each_suffix
@pytest.mark.parametrize("lost", ["0.weight.codes", "2.weight.zero_point", "1.num_batches_tracked"])
def test_a_lost_tensor_is_refused(lost: str, saved: Path) -> None:
    texts, tensors = read(saved)
    del tensors[lost]
    write(saved, texts, tensors)
    assert_refused(saved, CorruptCheckpointError)


@each_suffix
@pytest.mark.parametrize("lost", ["format", "format_version", "header", "header_checksum"])
def test_a_lost_text_is_refused(lost: str, saved: Path) -> None:
    texts, tensors = read(saved)
    del texts[lost]
    write(saved, texts, tensors)
    assert_refused(saved, CorruptCheckpointError)


@each_suffix
@pytest.mark.parametrize("version", ["2", "10", "99999999999999999999"])
def test_a_newer_version_is_refused_with_what_to_do(version: str, saved: Path) -> None:
    texts, tensors = read(saved)
    texts["format_version"] = version
    write(saved, texts, tensors)
    assert_refused(saved, FormatVersionError)
    with pytest.raises(FormatVersionError, match=rf"format version {version}.*upgrade mono_quant"):
        load_model(saved)


@each_suffix
@pytest.mark.parametrize("version", ["", "-1", "1.5", "one", "0x1", "²"])
def test_a_version_that_is_no_number_is_refused(version: str, saved: Path) -> None:
    texts, tensors = read(saved)
    texts["format_version"] = version
    write(saved, texts, tensors)
    assert_refused(saved, CorruptCheckpointError)


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "nothing")


def _float_safetensors(path: Path) -> None:
    weight = torch.randn(4)
    spec = TensorSpec(dtype="float32", shape=[4], data_ptr=weight.data_ptr(), data_len=16)
    serialize_file({"weight": spec}, path, metadata={"format": "pt"})


FOREIGN: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(1000)),
    "text": lambda path: path.write_text("a text, and a long one at that\n" * 20),
    "json": lambda path: path.write_text("{}"),
    "image": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256))),
    "noise": lambda path: path.write_bytes(bytes((37 * i * i + 11) % 256 for i in range(999))),
    "zip": _zip,
    "half a zip": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(50)),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"weight": 3}, protocol=4)),
    "protocol": lambda path: path.write_bytes(b"\x80\x04\x95"),
    "list": lambda path: torch.save([torch.ones(3)], path),
    "tensor": lambda path: torch.save(torch.ones(3), path),
    "state dict": lambda path: torch.save(small().state_dict(), path),
    "old format": lambda path: torch.save(
        small().state_dict(), path, _use_new_zipfile_serialization=False
    ),
    "float safetensors": _float_safetensors,
    "huge header": lambda path: path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}"),
}


@each_suffix
@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file_is_refused(
    make: Callable[[Path], object], suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"foreign{suffix}"
    make(path)
    assert_refused(path, CorruptCheckpointError)


def test_a_float_checkpoint_is_refused_with_what_to_do(tmp_path: Path) -> None:
    torch.save(small().state_dict(), tmp_path / "float.pt")
    _float_safetensors(tmp_path / "float.safetensors")
    for path in tmp_path.iterdir():
        with pytest.raises(CorruptCheckpointError, match=r"quantized first, with quantize\(...\)"):
            load_model(path, small())


RAN: list[str] = []


def run(text: str) -> None:
    """Leave a trace."""
    RAN.append(text)


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return (run, ("it ran",))


@pytest.mark.parametrize(
    "content",
    [
        Bomb(),
        {"tensors": Bomb()},
        {"format": "mono_quant", "format_version": "1", "header": Bomb()},
        {"tensors": {"0.weight.codes": Bomb()}, "format": "mono_quant"},
        nn.Linear(3, 3),
    ],
    ids=["alone", "as tensors", "as a header", "as a tensor", "a module"],
)
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_code_in_a_pickle_is_refused_and_not_run(
    content: object, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"bomb{suffix}"
    for new in (True, False):
        torch.save(content, path, _use_new_zipfile_serialization=new)
        RAN.clear()
        assert_refused(path, CorruptCheckpointError)
        with pytest.raises(CorruptCheckpointError, match=r"save model\.state_dict"):
            read_state_dict(path)
        assert not RAN


def test_the_bomb_is_a_real_one() -> None:
    pickle.loads(pickle.dumps(Bomb()))
    assert RAN.pop() == "it ran"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_script_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scripted.pt"
    torch.jit.script(small()).save(path)  # type: ignore[no-untyped-call]  # untyped in torch
    assert_refused(path, CorruptCheckpointError)


@each_suffix
def test_a_file_of_the_other_format_is_refused(suffix: str, tmp_path: Path) -> None:
    other = next(one for one in SUFFIXES if one != suffix)
    path = Quantizer().apply(small()).save(tmp_path / f"model{other}")
    assert_refused(path.rename(tmp_path / f"renamed{suffix}"), CorruptCheckpointError)


def test_every_error_of_a_file_is_one_of_ours() -> None:
    assert issubclass(CorruptCheckpointError, CheckpointError)
    assert issubclass(FormatVersionError, CheckpointError)
    assert issubclass(CheckpointError, MonoQuantError)
    assert issubclass(CheckpointError, ValueError)


def edited_header(path: Path, name: str, dtype: str) -> None:
    """Change the dtype of a tensor in the header of a safetensors file, and nothing else."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header[name]["dtype"] = dtype
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # as safetensors aligns what follows
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


@pytest.mark.parametrize(("name", "dtype"), [("0.weight.scale", "BF16"), ("1.running_mean", "I32")])
def test_a_changed_dtype_of_as_many_bytes_is_refused(name: str, dtype: str, tmp_path: Path) -> None:
    path = Quantizer().apply(small()).save(tmp_path / "model.safetensors")
    edited_header(path, name, dtype)
    with pytest.raises(CorruptCheckpointError, match=f"tensor '{name}' was changed"):
        load_model(path, small())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_changed_shape_of_as_many_values_is_refused(suffix: str, tmp_path: Path) -> None:
    path = Quantizer().apply(small()).save(tmp_path / f"model{suffix}")
    texts, tensors = read(path)
    tensors["1.running_mean"] = tensors["1.running_mean"].reshape(4, 4)
    write(path, texts, tensors)
    with pytest.raises(CorruptCheckpointError, match=r"'1\.running_mean' was changed"):
        load_model(path)
