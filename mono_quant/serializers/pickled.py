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
from typing import IO, BinaryIO, cast

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

_REBUILD_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"  # which calls its first argument
_NEVER = ("torch.Tensor",)
"""Beside kinds of memory, what is only ever named: called, it makes memory of any size."""

_COSTLY = ("torch._utils.", "builtins.bytearray", "__builtin__.bytearray", "_codecs.encode")
_OLD_PICKLES = 5  # a number, a version, the machine, the objects, the keys of their memory
_DEPTH = 100
_FOLDER = 0x10  # an attribute of MS-DOS
_END, _END64 = 22, 98  # bytes of what ends an archive, without and with sizes of 64 bits


def is_archive(path: Path) -> bool:
    """Return whether a file is a zip archive, as torch has written since 2020."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


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
            if any(one.external_attr & _FOLDER for one in records):
                raise CorruptCheckpointError(
                    f"{path} has a record that calls itself a folder: torch would read nothing of "
                    "it, and take what happens to be in memory for its values"
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
    """Refuse names in one pickle that are not known to be harmless; leave the stream behind it.

    Raises:
        IndexError: it takes what is not there.
    """
    machine, size = _Machine(), path.stat().st_size
    bounded = cast("IO[bytes]", _Bounded(stream, size))  # as far as it is asked
    for operation, argument, _ in pickletools.genops(bounded):
        called = machine.step(operation.name, argument)
        if called is not None and not _is_harmless(*called):
            raise CorruptCheckpointError(
                f"{path} calls {called[0] or 'what it made'}, which makes memory of any size: save "
                "tensors with torch.save"
            )
        if operation.name != "GLOBAL":
            continue  # other ways to name something are refused by torch's own reader
        name = _dotted(argument)
        if name in _PLAIN or _is_plain_of_torch(name):
            continue
        if name.startswith(_COSTLY):
            raise CorruptCheckpointError(
                f"{path} holds what {name} makes, which is neither a tensor in plain memory nor a "
                "plain value: save tensors that are dense, on the CPU and not quantized"
            )
        raise pickle.UnpicklingError(f"Unsupported GLOBAL {name}")
    if sum(machine.claims.values()) > size:
        raise CorruptCheckpointError(f"{path} claims tensors that are larger than the file")


class _Bounded:
    """A stream of which no more is asked at once than a file holds; asked, it makes room first."""

    def __init__(self, stream: IO[bytes], most: int) -> None:
        self.tell, self.readline = stream.tell, stream.readline
        self._stream, self._most = stream, most

    def read(self, size: int) -> bytes:
        """Return so many bytes, or what is left."""
        return self._stream.read(min(size, self._most))


class _Machine:
    """What lies on a pickle's stack, as far as it tells what is called and what memory is claimed.

    Names are `str`, texts `bytes`, numbers `int`, tuples of these `tuple`, all else None. It knows
    the operations that torch's reader does; at any other one that reader stops.
    """

    def __init__(self) -> None:
        self.claims: dict[object, int] = {}
        """How many values each memory is said to have, by its key."""
        self._stack: list[object] = []
        self._below: list[list[object]] = []
        self._memo: dict[object, object] = {}

    def step(self, operation: str, argument: object) -> tuple[object, object] | None:
        """Do an operation; return what it calls, and with what, if it calls something."""
        stack = self._stack
        match operation:
            case "GLOBAL":
                stack.append(_dotted(argument))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(None)
                return function, arguments
            case "MARK":
                self._below.append(stack)
                self._stack = []
            case "TUPLE":
                self._stack = self._below.pop()
                self._stack.append(tuple(stack))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(operation[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo.get(argument))
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "BUILD" | "APPEND":
                stack.pop()
            case "SETITEM":
                del stack[-2:]
            case "APPENDS" | "SETITEMS":
                self._stack = self._below.pop()
            case "BINPERSID":
                self._claim(stack.pop())
                stack.append(None)
            case "BINUNICODE" | "SHORT_BINSTRING":
                stack.append(str(argument).encode("utf-8", "surrogatepass"))
            case "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "PROTO" | "STOP":
                pass
            case _:
                stack.append(None)
        return None

    def _claim(self, said: object) -> None:
        """Note the memory that torch would make: "storage", its type, key, device and length."""
        match said:
            case (b"storage", _, key, _, int(count), *_):
                self.claims[key] = max(count, self.claims.get(key, 0))
            case (b"storage", *_):
                raise ValueError("it names memory of no length")


def _is_harmless(function: object, arguments: object) -> bool:
    """Return whether a call takes no memory but what is in the file."""
    if function == _REBUILD_FROM_TYPE:
        inner = arguments[0] if isinstance(arguments, tuple) and arguments else None
        return isinstance(inner, str) and inner.startswith("torch._utils._rebuild")
    return isinstance(function, str) and function not in _NEVER and not function.endswith("Storage")


def _dotted(argument: object) -> str:
    return str(argument).replace(" ", ".")


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
