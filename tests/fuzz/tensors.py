"""Mutants of safetensors files: the length, the header, its metadata and the bytes behind it."""

import json
import math
import struct
import zlib
from random import Random
from typing import Any

from tests.fuzz.values import deep, edit, odd, scramble, text_of

DTYPES = ("F32", "F16", "BF16", "F64", "I64", "U8", "I8", "BOOL", "F8_E4M3", "F4", "C64", "f32", "")
NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "I64": "int64",
    "I8": "int8",
    "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn",
}
"""Of the dtypes that samples have, as checksums have them."""
LENGTHS = (0, 1, 7, 8, 1 << 31, 1 << 32, 100_000_000, 100_000_001, 1 << 63, (1 << 64) - 1)


def mutate(content: bytes, random: Random) -> tuple[str, bytes, bool]:
    """Return what was done to a file, the file, and whether its checksums were made right again."""
    kind = random.choice(("bytes", "length", "entry", "entry", "text", "ours", "forged", "forged"))
    size = int.from_bytes(content[:8], "little")
    header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]
    ours = "mono_quant" in header.get("__metadata__", {})
    if kind == "bytes":
        return (*scramble(content, random), False)
    if kind == "length":
        length = random.choice((*LENGTHS, size - 1, size + 1, len(content) - 8, len(content)))
        return "header length", length.to_bytes(8, "little") + content[8:], False
    if kind == "entry" or (kind in ("ours", "forged") and not ours):
        how = _entry(header, random)
        return f"entry: {how}", _joined(text_of(header), rest), False
    if kind == "text":
        how, text = _text(text_of(header), random)
        return f"header text: {how}", _joined(text, rest), False
    texts = json.loads(header["__metadata__"]["mono_quant"])
    if kind == "ours":
        for _ in range(random.randrange(1, 4)):
            edit(texts, random)
    elif random.random() < 0.05:
        texts = seal(texts, deep(random))
    elif random.random() < 0.4:
        how, rest = _tensor(header, texts, rest, random)
        header["__metadata__"]["mono_quant"] = json.dumps(texts)
        return f"forged tensor: {how}", _joined(text_of(header), rest), True
    else:
        inner = json.loads(texts["header"])
        for _ in range(random.randrange(1, 4)):
            edit(inner, random)
        texts = seal(texts, text_of(inner).decode("utf-8", "replace"))
    header["__metadata__"]["mono_quant"] = json.dumps(texts)
    return f"{kind} metadata", _joined(text_of(header), rest), kind == "forged"


def seal(texts: dict[str, str], header: str) -> dict[str, str]:
    """Return our texts with another header, whose checksum is right."""
    return {**texts, "header": header, "header_checksum": str(zlib.crc32(header.encode()))}


def _tensor(
    header: dict[str, dict[str, Any]], texts: dict[str, str], rest: bytes, random: Random
) -> tuple[str, bytes]:
    """Change a tensor and its checksum, in place; return what was done, and all tensors' bytes."""
    inner = json.loads(texts["header"])
    name = random.choice([one for one in header if one != "__metadata__"])
    entry = header[name]
    start, end = entry["data_offsets"]
    content, shape = rest[start:end], list(entry["shape"])
    how = random.choice(("values", "zeros", "cut", "doubled", "flat", "deep", "odd value"))
    if how == "values":
        content = scramble(content, random)[1][: len(content)].ljust(len(content), b"\0")
    elif how == "zeros":
        content = bytes(len(content))
    elif how == "odd value" and entry["dtype"] == "F32" and content:
        value = struct.pack("<f", random.choice((math.nan, math.inf, -1.0, 3e38, 1e-40)))
        at = 4 * random.randrange(len(content) // 4)
        content = content[:at] + value + content[at + 4 :]
    elif how in ("cut", "doubled") and shape and shape[0]:
        shape[0], content = {
            "cut": (shape[0] - 1, content[: len(content) // shape[0] * (shape[0] - 1)]),
            "doubled": (shape[0] * 2, content * 2),
        }[how]
    elif how == "flat":
        shape = [math.prod(shape)]
    else:
        shape = [1, *shape]
    entry["shape"], entry["data_offsets"] = shape, [start, start + len(content)]
    for other, one in header.items():
        if other != "__metadata__" and other != name and one["data_offsets"][0] >= end:
            one["data_offsets"] = [at + len(content) - (end - start) for at in one["data_offsets"]]
    described = f"{NAMES[entry['dtype']]} {shape} "
    inner["checksums"][name] = zlib.crc32(described.encode() + content)
    texts.update(seal(texts, json.dumps(inner)))
    return how, rest[:start] + content + rest[end:]


def _joined(text: bytes, rest: bytes) -> bytes:
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text + rest


def _entry(header: dict[str, dict[str, object]], random: Random) -> str:
    """Change what a header says of one tensor."""
    names = [name for name in header if name != "__metadata__"]
    name, other = random.choice(names), random.choice(names)
    entry = header[name]
    how = random.choice(
        ("dtype", "shape", "offsets", "overlap", "swap", "rename", "remove", "add", "any", "odd")
    )
    if how == "dtype":
        entry["dtype"] = random.choice(DTYPES)
    elif how == "shape":
        edit(entry["shape"], random)
    elif how == "offsets":
        edit(entry["data_offsets"], random)
    elif how == "overlap":
        entry["data_offsets"] = header[other]["data_offsets"]
    elif how == "swap":
        header[name], header[other] = header[other], header[name]
    elif how == "rename":
        header[str(odd(random))] = header.pop(name)
    elif how == "remove":
        del header[name]
    elif how == "add":
        header["more"] = dict(entry)
    elif how == "odd":
        entry[random.choice(("dtype", "shape", "data_offsets"))] = odd(random)
    else:
        edit(header, random)
    return how


def _text(text: bytes, random: Random) -> tuple[str, bytes]:
    how = random.choice(("twice", "deep", "not UTF-8", "bytes", "empty", "list"))
    if how == "twice":  # each name is there a second time, with other offsets
        doubled = text[1:-1].replace(b'"data_offsets":[', b'"data_offsets":[0,0],"was":[', 1)
        return how, b"{" + text[1:-1] + b"," + doubled + b"}"
    if how == "deep":
        return how, text[:-1] + b',"deep":' + deep(random).encode() + b"}"
    if how == "not UTF-8":
        place = random.randrange(len(text))
        return how, text[:place] + random.choice((b"\xff", b"\xc0\x80", b"\x80")) + text[place:]
    if how == "bytes":
        return scramble(text, random)[0], scramble(text, random)[1]
    return how, b"" if how == "empty" else b"[]"
