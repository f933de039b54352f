"""Reads GGUF files of version 3: metadata and tensors, the quantized ones dequantized."""

import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

Value = int | float | bool | str | list["Value"]

_MAGIC = b"GGUF"
_VERSION = 3
_ALIGNMENT = 32
_STRING = 8
_ARRAY = 9
# The numeric kinds of metadata values, as `struct` spells them.
_NUMBERS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_F32 = 0
_Q4_1 = 3
_Q8_0 = 8


class _Block(NamedTuple):
    """How many values a tensor kind stores together, and in how many bytes."""

    values: int
    size: int


_BLOCKS = {_F32: _Block(1, 4), _Q4_1: _Block(32, 20), _Q8_0: _Block(32, 34)}


class _Stored(NamedTuple):
    shape: tuple[int, ...]
    kind: int
    offset: int


class GgufFile:
    """The metadata of a GGUF file, and its tensors on demand."""

    def __init__(self, path: Path) -> None:
        """Reads the header.

        Args:
            path: the file.

        Raises:
            ValueError: if it is no GGUF file of version 3.
        """
        self.metadata: dict[str, Value] = {}
        self._stored: dict[str, _Stored] = {}
        self._path = path
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC or _number(file, "<I") != _VERSION:
                raise ValueError(f"{path.name} is not a GGUF file of version {_VERSION}")
            tensors, entries = _number(file, "<Q"), _number(file, "<Q")
            for _ in range(entries):
                key = _string(file)
                self.metadata[key] = _value(file, _number(file, "<I"))
            for _ in range(tensors):
                name = _string(file)
                # Sizes are stored from the innermost dimension outwards.
                sizes = [_number(file, "<Q") for _ in range(_number(file, "<I"))]
                kind, offset = _number(file, "<I"), _number(file, "<Q")
                self._stored[name] = _Stored(tuple(reversed(sizes)), kind, offset)
            unaligned = file.tell()
        self._start = unaligned + -unaligned % self._alignment()

    def strings(self, key: str) -> list[str]:
        """Returns a metadata entry that is a list of strings."""
        found = self.metadata[key]
        if not isinstance(found, list):
            raise TypeError(f"the entry {key} is not a list")
        return [str(item) for item in found]

    def tensors(self) -> Mapping[str, Tensor]:
        """Returns all tensors in float32, by name."""
        content = torch.from_file(
            str(self._path), size=self._path.stat().st_size, dtype=torch.uint8
        )
        return {name: self._read(content, stored) for name, stored in self._stored.items()}

    def _alignment(self) -> int:
        named = self.metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(named, int):
            raise TypeError(f"the alignment is not a whole number: {named!r}")
        return named

    def _read(self, content: Tensor, stored: _Stored) -> Tensor:
        if stored.kind not in _BLOCKS:
            raise ValueError(f"tensors of GGUF kind {stored.kind} are not supported")
        block = _BLOCKS[stored.kind]
        size = prod(stored.shape) // block.values * block.size
        start = self._start + stored.offset
        blocks = content[start : start + size].view(-1, block.size)
        return _dequantize(blocks, stored.kind).reshape(stored.shape)


def _dequantize(blocks: Tensor, kind: int) -> Tensor:
    if kind == _F32:
        return blocks.clone().view(torch.float32)
    if kind == _Q4_1:
        scale, least = blocks[:, :4].clone().view(torch.float16).float().chunk(2, dim=1)
        packed = blocks[:, 4:]
        codes = torch.cat((packed & 15, packed >> 4), dim=1)
        return codes.float() * scale + least
    scale = blocks[:, :2].clone().view(torch.float16).float()
    return blocks[:, 2:].view(torch.int8).float() * scale


def _value(file: BinaryIO, kind: int) -> Value:
    if kind == _STRING:
        return _string(file)
    if kind == _ARRAY:
        item_kind, count = _number(file, "<I"), _number(file, "<Q")
        return [_value(file, item_kind) for _ in range(count)]
    (read,) = struct.unpack(_NUMBERS[kind], file.read(struct.calcsize(_NUMBERS[kind])))
    if not isinstance(read, int | float):
        raise TypeError(f"metadata kind {kind} is not a number")
    return read


def _number(file: BinaryIO, form: str) -> int:
    (read,) = struct.unpack(form, file.read(struct.calcsize(form)))
    return int(read)


def _string(file: BinaryIO) -> str:
    return file.read(_number(file, "<Q")).decode("utf-8")
