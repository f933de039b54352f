"""What a file of torch's format may hold: looked at before torch reads it, and after.

``torch.load(weights_only=True)`` runs no code that a file names. It does call a few functions that
take memory of the file's choice (``bytearray(10**12)``), unpacks compressed records, and follows
whatever refers to itself. So names are read off the pickle first, and sizes counted.
"""

import pickle
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, BinaryIO

import torch
from torch import Tensor, nn

from mono_quant.errors import CorruptCheckpointError
from mono_quant.numerics.metrics import tensor_bytes

_PLAIN = frozenset(
    {
        "collections.OrderedDict",
        "collections.Counter",
        "builtins.set",
        "__builtin__.set",
        "builtins.complex",
        "__builtin__.complex",
        "torch.Size",
        "torch.Tensor",
        "torch.device",
        "torch.nn.parameter.Parameter",
        "torch.serialization._get_layout",
        "torch.storage.TypedStorage",
        "torch.storage.UntypedStorage",
        "torch._tensor._rebuild_from_type_v2",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
    }
)
"""What makes tensors in plain memory, and plain values. All of it is on torch's own list too."""

_COSTLY = ("torch._utils.", "builtins.bytearray", "__builtin__.bytearray", "_codecs.encode")
_OLD_PICKLES = 5  # a number, a version, the machine, the objects, the keys of their memory
_DEPTH = 100
_END, _END64 = 22, 98  # bytes of what ends an archive, without and with sizes of 64 bits


def is_archive(path: Path) -> bool:
    """Return whether a file is a zip archive, as torch has written since 2020."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


_FOLDER = 0x10  # the bit of a zip record's external attributes (DOS) that says so


def check_file(path: Path) -> None:
    """Refuse a file that would run code, or take more memory than its own size, when it is read.

    Raises:
        CorruptCheckpointError: it holds something that is no tensor in plain memory and no plain
            value, or is compressed.
        pickle.UnpicklingError: it names code; the message has ``GLOBAL``, and the name. Or it is
            none of torch's files.
        ValueError, zipfile.BadZipFile: it is cut off.
    """
    with path.open("rb") as file:
        if not is_archive(path):
            _check_old(path, file)
            return
        _check_end(path, file)
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            if any(one.compress_type != zipfile.ZIP_STORED for one in records):
                raise CorruptCheckpointError(
                    f"{path} is compressed, which torch.save does not do: unpacked, it might take "
                    "any amount of memory; load it and save it again"
                )
            if any(one.external_attr & _FOLDER and not one.is_dir() for one in records):
                raise CorruptCheckpointError(
                    f"{path} has records that are marked as folders, of which torch reads whatever "
                    "lay in memory; save it again"
                )
            if sum(one.file_size for one in records) > path.stat().st_size:
                raise CorruptCheckpointError(f"{path} has records that are larger than the file")
            for one in records:
                if one.filename.lower().endswith("data.pkl"):  # torch does not mind the case
                    with archive.open(one) as stream:
                        _check_names(path, stream)


def _check_old(path: Path, file: BinaryIO) -> None:
    try:
        for _ in range(_OLD_PICKLES):
            _check_names(path, file)
    except ValueError as error:
        file.seek(0)
        if isinstance(error, CorruptCheckpointError) or file.read(1) in (b"\x80", b""):
            raise  # it begins as a pickle does
        raise pickle.UnpicklingError(str(error)) from error


def _check_names(path: Path, stream: IO[bytes]) -> None:
    """Refuse names in one pickle that are not known to be harmless; leave the stream behind it."""
    for operation, argument, _ in pickletools.genops(stream):
        if operation.name != "GLOBAL":
            continue  # other ways to name something are refused by torch's own reader
        name = str(argument).replace(" ", ".")
        if name in _PLAIN or _is_plain_of_torch(name):
            continue
        if name.startswith(_COSTLY):
            raise CorruptCheckpointError(
                f"{path} holds what {name} makes, which is neither a tensor in plain memory nor a "
                "plain value: save tensors that are dense, on the CPU and not quantized"
            )
        raise pickle.UnpicklingError(f"Unsupported GLOBAL {name}")


def _is_plain_of_torch(name: str) -> bool:
    """Return whether a name is that of a dtype or of a kind of memory."""
    module, _, own = name.rpartition(".")
    return module == "torch" and (
        own.endswith("Storage") or isinstance(getattr(torch, own, None), torch.dtype)
    )


def _check_end(path: Path, file: BinaryIO) -> None:
    """Refuse an archive whose end two readers might understand in two ways.

    Then torch reads the records that are checked here, and no others.
    """
    size = path.stat().st_size
    file.seek(max(0, size - _END64))
    end = file.read()
    number = int.from_bytes
    whole = end[-_END:].startswith(b"PK\x05\x06") and end[-2:] == b"\0\0"
    if end[-42:-38] == b"PK\x06\x07":
        place = size - _END64
        whole &= end.startswith(b"PK\x06\x06") and number(end[64:72], "little") == place
        whole &= number(end[40:48], "little") + number(end[48:56], "little") == place
    else:
        place = size - _END
        whole &= number(end[-10:-6], "little") + number(end[-6:-2], "little") == place
    if not whole:
        raise CorruptCheckpointError(f"{path} is not a whole file: it does not end as archives do")


def check_content(path: Path, content: object) -> None:
    """Refuse content that would take more memory than its file, or that never ends.

    Raises:
        CorruptCheckpointError: naming what is wrong.
    """
    size = path.stat().st_size
    memories: dict[int, int] = {}
    spread = 0
    for tensor in _tensors(path, content, size):
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        if not plain or tensor.device.type != "cpu" or tensor.is_neg() or tensor.is_conj():
            raise CorruptCheckpointError(
                f"{path} holds a tensor that is not stored as plain memory: {_kind(tensor)}"
            )
        memory = tensor.untyped_storage()
        memories[memory.data_ptr()] = memory.nbytes()
        if tensor_bytes(tensor) > memory.nbytes():
            spread += tensor_bytes(tensor)
    if sum(memories.values()) > size or spread > size:
        raise CorruptCheckpointError(
            f"{path} holds tensors that are larger than the file: it says values again and again, "
            "or has none; save them with contiguous()"
        )


def _tensors(path: Path, content: object, size: int) -> Iterator[Tensor]:
    waiting, seen = [(content, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if depth > _DEPTH or seen > size:
            raise CorruptCheckpointError(f"{path} is nested too deeply, or holds itself")
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, torch.UntypedStorage | torch.TypedStorage):
            raise CorruptCheckpointError(f"{path} holds memory that is no tensor")
        elif isinstance(value, Mapping):
            waiting += [(one, depth + 1) for pair in value.items() for one in pair]
        elif isinstance(value, tuple | list | set | frozenset):
            waiting += [(one, depth + 1) for one in value]


def _kind(tensor: Tensor) -> str:
    turned = ", negated or conjugated" if tensor.is_neg() or tensor.is_conj() else ""
    return f"{type(tensor).__name__}, {tensor.layout}, on {tensor.device.type}{turned}"
