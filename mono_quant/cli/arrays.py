"""Arrays of numpy's files as tensors, without numpy and without running what a file holds.

Source: "numpy.lib.format", https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html:
a magic string, a version, the length of a header, the header (a literal of Python: dtype, order in
memory, shape), and the bytes of the array. An ``.npz`` is a zip archive of such files.
"""

import ast
import errno
import io
import struct
import sys
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from mono_quant.configurable import is_count
from mono_quant.errors import InputError

_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,  # encrypted, packed in an unknown way, or nested too deeply
    SyntaxError,
    TypeError,
    ValueError,
)
"""What a file that is none, or a damaged one, makes of the modules that read it."""

_MOST, _PACKED = 1 << 24, 32
"""Bytes that a packed file may claim, and how many more for each of its own."""

_LONGEST = 10_000
"""Bytes of a header, as numpy has it: to be read, a literal takes some hundred times as much."""

_MAGIC = b"\x93NUMPY"
_HEADER_LENGTHS = {1: "<H", 2: "<I", 3: "<I"}
"""How the length of a header is written, by the major version."""

_DTYPES = {
    "b1": torch.bool,
    "i1": torch.int8,
    "u1": torch.uint8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
}
_OTHER_ORDER = ">" if sys.byteorder == "little" else "<"


def read_arrays(path: Path) -> Tensor | dict[str, Tensor]:
    """Return the array of an ``.npy`` file, or those of an ``.npz`` file by name.

    Raises:
        InputError: it is damaged, or holds something else than numbers.
        OSError: it is no file, or cannot be read.
    """
    if not path.is_file():  # a pipe may never end
        raise FileNotFoundError(f"{path} is not a file")
    try:
        if path.suffix == ".npy":
            with path.open("rb") as file:
                return _array(file)
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            if sum(part.compress_size for part in parts) > path.stat().st_size:
                raise ValueError("its arrays are larger than the file")  # and room would be made
            size = sum(part.file_size for part in parts)
            most = _MOST + _PACKED * path.stat().st_size
            if size > most:
                raise InputError(
                    f"its arrays claim {size} bytes, more than the {most} that are read of a file "
                    "of its size; save it with np.savez, which packs nothing"
                )
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            if len(set(names)) < len(names):
                raise ValueError("two arrays have one name")
            return {
                name: _array(io.BytesIO(archive.read(part)))
                for name, part in zip(names, archive.namelist(), strict=True)
            }
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (*_DAMAGE, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise  # an archive may name a place before its beginning, which is EINVAL
        raise InputError(f"{path} is no whole file of numpy's: {error}") from error


def _array(file: BinaryIO) -> Tensor:
    if file.read(len(_MAGIC)) != _MAGIC:
        raise ValueError("it does not begin as one")
    major, _ = file.read(2)
    form = _HEADER_LENGTHS[major]
    (length,) = struct.unpack(form, file.read(struct.calcsize(form)))
    if length > _LONGEST:
        raise ValueError(f"its header has {length} bytes")
    header: object = ast.literal_eval(file.read(length).decode())
    if not isinstance(header, dict):
        raise ValueError("its header is no dictionary")
    described, shape = header["descr"], header["shape"]
    kind = described[1:] if isinstance(described, str) else None
    if kind not in _DTYPES:
        raise InputError(
            f"an array of {described!r} holds no numbers that torch has; save it as another dtype, "
            "with array.astype(...)"
        )
    if described[0] == _OTHER_ORDER:
        raise InputError(
            f"an array of {described!r} has its bytes in the other order; save it with "
            "array.astype(array.dtype.newbyteorder('='))"
        )
    if not isinstance(shape, tuple) or not all(is_count(size, 0) for size in shape):
        raise ValueError(f"{shape!r} is no shape")
    return _tensor(file.read(), _DTYPES[kind], shape, bool(header["fortran_order"]))


def _tensor(content: bytes, dtype: torch.dtype, shape: tuple[int, ...], columns: bool) -> Tensor:
    count = torch.Size(shape).numel()
    if len(content) != count * dtype.itemsize:
        raise ValueError(f"it has {len(content)} bytes for {count} values of {dtype}")
    flat = (
        torch.frombuffer(bytearray(content), dtype=dtype) if count else torch.empty(0, dtype=dtype)
    )
    if not columns:
        return flat.reshape(shape)
    return flat.reshape(shape[::-1]).permute(*reversed(range(len(shape)))).contiguous()
