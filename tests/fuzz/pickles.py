"""Mutants of torch's files: the archive, its records, the pickle in it, and what that rebuilds."""

import io
import json
import pickle
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Callable
from random import Random

import torch
from torch import Tensor

from tests.fuzz.tensors import seal
from tests.fuzz.values import deep, edit, odd, scramble, text_of

CANARY = "canary"
"""A file that payloads make in the current folder, if they ever run."""

PAYLOADS = (
    b"cos\nsystem\n(X\x0c\x00\x00\x00touch canarytR",
    b"cbuiltins\nexec\n(X\x15\x00\x00\x00open('canary','w')    tR",
    b"c__builtin__\neval\n(X\x15\x00\x00\x00open('canary','w')    tR",
    b"cposix\nsystem\n(X\x0c\x00\x00\x00touch canarytR",
    b"csubprocess\nPopen\n(X\x05\x00\x00\x00touchtR",
    b"ctorch.hub\nload\n(X\x01\x00\x00\x00xtR",
    b"ctorch\nload\n(X\x06\x00\x00\x00canarytR",
    b"ctorch.utils.cpp_extension\nload_inline\n(X\x01\x00\x00\x00xtR",
    b"cmono_quant.cli.inputs\nimported\n(X\x01\x00\x00\x00xtR",
    b"cbuiltins\ngetattr\n(X\x01\x00\x00\x00xX\x01\x00\x00\x00xtR",
    b"\x8c\x02os\x8c\x06system\x93(X\x0c\x00\x00\x00touch canarytR",
    b"(S'touch canary'\nios\nsystem\n",
    b"(X\x0c\x00\x00\x00touch canarycos\nsystem\no",
    b"Pcanary\n",
)
"""What would run code or reach a file, by each of the ways that a pickle has."""

BOMBS = (
    b"cbuiltins\nbytearray\n(J\x00\x00\x00\x40tR",
    b"c__builtin__\nbytearray\n(J\x00\x00\x00\x40tR",
    b"ctorch\nTensor\n(J\x00\x00\x00\x40tR",
    b"ctorch\nFloatTensor\n(J\x00\x00\x00\x40tR",
    b"ctorch.storage\nUntypedStorage\n(J\x00\x00\x00\x40tR",
    b"c_codecs\nencode\n(X\x04\x00\x00\x00abcdX\x06\x00\x00\x00utf-16tR"
    + b"".join(
        b"q\x63" + b"c_codecs\nencode\n(" + b"h\x63X\x03\x00\x00\x00hextR" for _ in range(30)
    ),
    b"]q\x62" + b"h\x62a" * 3 + b"0h\x62",
    b"(" + b"]" * 3000 + b"t",
    b"]" + b"]" * 5000 + b"a" * 5000,
)
"""What would take a gigabyte for a few bytes, or never end."""

NAMES = (b"os", b"builtins", b"torch", b"torch._utils", b"_codecs", b"collections", b"nowhere")


def mutate(content: bytes, random: Random) -> tuple[str, bytes, bool]:
    """Return what was done to a file, the file, and whether its checksums were made right again."""
    if content[:4] != b"PK\x03\x04":
        return (*_old(content, random), False)
    kind = random.choice(
        ("bytes", "directory", "record", "pickle", "pickle", "payload", "content", "content")
    )
    if kind == "bytes":
        return (*scramble(content, random), False)
    if kind == "directory":
        find = random.choice((content.index, content.rindex))
        start = find(b"PK\x01\x02")
        how, tail = scramble(content[start:], random)
        return f"directory: {how}", content[:start] + tail, False
    if kind == "content":
        return _content(content, random)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = {one.filename: archive.read(one) for one in archive.infolist()}
    main = next(name for name in records if name.endswith("/data.pkl"))
    if kind == "record":
        return (*record(records, random), False)
    if kind == "payload":
        how = random.choice(("payload", "bomb"))
        inserted = random.choice(PAYLOADS if how == "payload" else BOMBS)
        records[main] = _with(records[main], inserted, random)
        return how, zipped(records), False
    how, records[main] = _pickle(records[main], random)
    return how, zipped(records), False


def _old(content: bytes, random: Random) -> tuple[str, bytes]:
    """Return a file of torch's first format, five pickles and the tensors' bytes, with a change."""
    if random.random() < 0.5:
        return scramble(content, random)
    stream, ends = io.BytesIO(content), [0]
    for _ in range(5):
        list(pickletools.genops(stream))
        ends.append(stream.tell())
    start, end = ends[3:5]  # the objects; before them a number, a version and the machine
    if random.random() < 0.5:
        inserted = random.choice((*PAYLOADS, *BOMBS))
        how, made = "payload", _with(content[start:end], inserted, random)
    else:
        how, made = _pickle(content[start:end], random)
    return how, content[:start] + made + content[end:]


def zipped(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", compression) as archive:
        for name, content in records.items():
            entry = zipfile.ZipInfo(name)  # of a fixed date
            entry.compress_type = compression
            archive.writestr(entry, content)
    return made.getvalue()


def _with(pickled: bytes, inserted: bytes, random: Random) -> bytes:
    """Return a pickle with something more in it: in front, at the end, or as a value."""
    places = [at for op, _, at in pickletools.genops(pickled) if op.name in _VALUES and at]
    where = random.choice(("first", "last", "value"))
    if where == "first":
        return pickled[:2] + inserted + b"0" + pickled[2:]
    if where == "last":
        return pickled[:-1] + b"0" + inserted + b"."
    place = random.choice(places)
    return pickled[:place] + inserted + b"0" + pickled[place:]


_VALUES = ("BININT1", "BININT", "BINUNICODE", "NEWFALSE", "EMPTY_TUPLE", "EMPTY_DICT")


def _pickle(pickled: bytes, random: Random) -> tuple[str, bytes]:
    """Return a pickle with an operation changed, left out, or there twice."""
    try:
        found = list(pickletools.genops(pickled))
    except ValueError:
        return scramble(pickled, random)
    place = random.randrange(len(found) - 1)
    start = found[place][2]
    end = found[place + 1][2]
    assert start is not None
    assert end is not None
    how = random.choice(("number", "number", "global", "drop", "repeat", "swap"))
    if how == "number":
        numbers = [at for op, _, at in found if op.name in ("BININT1", "BININT2", "BININT")]
        at = random.choice([one for one in numbers if one is not None])
        widths = {ord("K"): 1, ord("M"): 2, ord("J"): 4}
        value = odd(random)
        number = value if isinstance(value, int) else random.randrange(1 << 20)
        made = b"J" + struct.pack("<i", max(min(number, (1 << 31) - 1), -(1 << 31)))
        if random.random() < 0.3:
            made = pickle.dumps(number, protocol=2)[2:-1]
        return "pickle: number", pickled[:at] + made + pickled[at + 1 + widths[pickled[at]] :]
    if how == "global":
        names = [(text, at) for op, text, at in found if op.name == "GLOBAL"]
        text, named = random.choice(names)
        assert named is not None
        module, name = str(text).split(" ")
        other = random.choice([str(one) for one, _ in names]).split(" ")
        made = random.choice(
            (
                b"c" + random.choice(NAMES) + b"\n" + name.encode() + b"\n",
                b"c" + other[0].encode() + b"\n" + other[1].encode() + b"\n",
                b"c" + module.encode() + b"\n" + random.choice(_REBUILD) + b"\n",
            )
        )
        return "pickle: global", pickled[:named] + made + pickled[named + 2 + len(str(text)) :]
    part = pickled[start:end]
    if how == "drop":
        return "pickle: drop", pickled[:start] + pickled[end:]
    if how == "repeat":
        return "pickle: repeat", pickled[:end] + part * random.randrange(1, 4) + pickled[end:]
    there = random.choice(found)[2] or 2
    return "pickle: move", pickled[:there] + part + pickled[there:]


_REBUILD = (
    b"_rebuild_tensor",
    b"_rebuild_qtensor",
    b"_rebuild_sparse_tensor",
    b"_rebuild_meta_tensor_no_storage",
    b"_rebuild_nested_tensor",
    b"_rebuild_wrapper_subclass",
    b"_rebuild_device_tensor_from_numpy",
    b"_rebuild_device_tensor_from_cpu_tensor",
    b"_rebuild_parameter",
    b"_rebuild_parameter_with_state",
)


def record(records: dict[str, bytes], random: Random) -> tuple[str, bytes]:
    """Change a record of the archive."""
    name = random.choice(list(records))
    how = random.choice(
        ("remove", "bytes", "rename", "traverse", "compress", "bomb", "empty", "add", "order")
    )
    if how == "remove":
        del records[name]
    elif how == "bytes":
        records[name] = scramble(records[name], random)[1]
    elif how == "rename":
        records[name.replace("data", "date").upper()] = records.pop(name)
    elif how == "traverse":
        records["../../" + name] = records.pop(name)
    elif how == "compress":
        return "record: compress", zipped(records, zipfile.ZIP_DEFLATED)
    elif how == "bomb":
        records[name] = bytes(120_000_000)
        return "record: bomb", zipped(records, zipfile.ZIP_DEFLATED)
    elif how == "empty":
        records[name] = b""
    elif how == "add":
        records[name + "x"] = records[name]
    else:
        records = dict(reversed(records.items()))
    return f"record: {how}", zipped(records)


def _content(content: bytes, random: Random) -> tuple[str, bytes, bool]:
    """Change what the file holds, and write it again with torch."""
    held: dict[str, object] = torch.load(io.BytesIO(content), weights_only=True)
    inner = held.get("tensors")
    tensors: dict[str, object] = inner if isinstance(inner, dict) else held
    ours = tensors is not held
    kind = random.choice(("tensor", "value", "header", "nest"))
    forged = False
    if kind == "tensor":
        name = random.choice([key for key, one in tensors.items() if isinstance(one, Tensor)])
        how = random.choice(list(ODD_TENSORS))
        tensors[name] = ODD_TENSORS[how](tensors[name])  # type: ignore[arg-type]  # a tensor
        kind = f"tensor: {how}"
    elif kind == "value":
        tensors[random.choice(list(tensors))] = odd(random)
    elif kind == "nest":
        nested: object = held
        for _ in range(random.choice((1, 50, 400))):
            nested = {random.choice(("model", "state_dict")): nested}
        held = {"model": nested}
        if random.random() < 0.3:
            held["model"] = held
    elif ours:
        header = json.loads(str(held["header"]))
        edit(header, random)
        text = text_of(header).decode("utf-8", "replace")
        held |= seal({}, deep(random) if random.random() < 0.05 else text)
        forged = True
    else:
        held[str(odd(random))] = odd(random)
    made = io.BytesIO()
    try:
        torch.save(held, made)
    except (RecursionError, UnicodeEncodeError):  # of what cannot be written, nothing can be read
        return f"{kind}: as it was", content, False
    return kind, made.getvalue(), forged


def _by_torch() -> Tensor:
    """Return a tensor of a kind that torch says it will give up, without its word about that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)


ODD_TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "negated": lambda x: torch._neg_view(x) if x.dtype.is_floating_point else -x,
    "conjugated": lambda x: x.to(torch.complex64).conj(),
    "enormous": lambda x: x.flatten()[:1].expand(1 << 40),
    "large": lambda x: x.flatten()[:1].expand(1 << 28),
    "meta": lambda x: x.to("meta"),
    "enormous meta": lambda x: torch.empty(1 << 50, device="meta"),
    "sparse": lambda x: x.to_sparse() if x.dim() else x,
    "quantized": lambda x: _by_torch(),
    "complex": lambda x: x.to(torch.complex128),
    "bits": lambda x: x.to(torch.float8_e5m2) if x.dtype.is_floating_point else x,
    "strided": lambda x: x.flatten().repeat_interleave(2)[::2],
    "flipped": lambda x: x.flatten().flip(0),
    "parameter": lambda x: torch.nn.Parameter(x, requires_grad=x.dtype.is_floating_point),
    "empty": lambda x: x.new_empty(0),
    "scalar": lambda x: x.new_zeros(()),
}
