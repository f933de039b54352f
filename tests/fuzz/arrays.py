"""Mutants of numpy's files: the header of an array, its bytes, and the archive around several."""

import io
import struct
import zipfile
from random import Random

from tests.fuzz.pickles import record, zipped
from tests.fuzz.values import odd, scramble

_KINDS = (
    "<f4",
    "<f8",
    "<i8",
    "|b1",
    "|u1",
    ">f4",
    "|O",
    "<c8",
    "<U5",
    "<f2",
    "",
    "f4",
    "[('a', 4)]",
)
_BEGIN = 8  # a magic string and a version
_LITERALS = (
    "__import__('os').system('touch canary')",
    "open('canary', 'w')",
    "(" * 200 + ")" * 200,
    "(" * 20_000,
    "-" * 20_000 + "1",
    "9" * 5000,
    "{'descr': '<f4', 'fortran_order': False, 'shape': (%s)}" % ("1," * 20_000),
    "{'descr': '<f4', 'fortran_order': False, 'shape': (10 ** 100,)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1 << 62, 4, 1 << 62)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (0, 1000000000000000000)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (0, -1)}",
    "{'descr': '<f4', 'fortran_order': [], 'shape': ()}",
    "{1: 2}",
    "'x' 'y'",
    "b'\\xff'",
    "...",
)


def mutate(content: bytes, random: Random) -> tuple[str, bytes]:
    """Return what was done to a file, and the file."""
    if content[:4] != b"PK\x03\x04":
        return _array(content, random)
    kind = random.choice(("bytes", "directory", "record", "array", "array"))
    if kind == "bytes":
        return scramble(content, random)
    if kind == "directory":
        start = content.index(b"PK\x01\x02")
        how, tail = scramble(content[start:], random)
        return f"directory: {how}", content[:start] + tail
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
        records = {one.filename: archive.read(one) for one in entries}
    if kind == "record":
        return record(records, random)
    name = random.choice(list(records))
    how, records[name] = _array(records[name], random)
    return f"array: {how}", zipped(records, entries[0].compress_type)


def _array(content: bytes, random: Random) -> tuple[str, bytes]:
    kind = random.choice(("bytes", "literal", "part", "part", "length", "version"))
    (size,) = struct.unpack("<H", content[_BEGIN : _BEGIN + 2])
    header, rest = content[_BEGIN + 2 : _BEGIN + 2 + size], content[_BEGIN + 2 + size :]
    if kind == "bytes":
        return scramble(content, random)
    if kind == "literal":
        return kind, _headed(random.choice(_LITERALS).encode(), rest)
    if kind == "length":
        length = random.choice((0, 1, size - 1, size + 1, 65535))
        return kind, content[:_BEGIN] + struct.pack("<H", length) + header + rest
    if kind == "version":
        version = bytes((random.choice((0, 1, 2, 3, 4, 255)), random.choice((0, 1))))
        long = struct.pack("<I", random.choice((size, 1 << 31, (1 << 32) - 1)))
        return kind, content[:6] + version + long + header + rest
    part = random.choice(("descr", "order", "shape", "shape", "any"))
    text = header.decode()
    if part == "descr":
        start = text.index("'descr': ") + len("'descr': ")
        end = text.index(", 'fortran")
        made = random.choice((repr(random.choice(_KINDS)), repr(odd(random))))
    elif part == "order":
        start, end = text.index("order': ") + len("order': "), text.index(", 'shape")
        made = random.choice(("True", "None", repr(odd(random))))
    elif part == "shape":
        start = text.index("shape': ") + len("shape': ")
        end = text.index(", }")
        made = random.choice((repr(odd(random)), f"({odd(random)!r},)", "(2, -3, -4)", "(True, 9)"))
    else:
        return "header", _headed(scramble(header, random)[1][:60_000], rest)
    changed = (text[:start] + made + text[end:]).encode("utf-8", "replace")
    return f"header: {part}", _headed(changed, rest)


def _headed(header: bytes, rest: bytes) -> bytes:
    if len(header) > 60_000:
        return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(header)) + header + rest
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + rest
