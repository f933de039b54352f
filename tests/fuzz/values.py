"""Random changes of JSON values and of bytes."""

import copy
import json
from random import Random
from typing import Any

Node = Any  # a list or a dictionary of JSON, which is changed in place whichever it is

ODD: tuple[object, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    255,
    256,
    1 << 31,
    -(1 << 31),
    1 << 40,
    (1 << 62) - 1,
    1 << 63,
    1 << 64,
    10**30,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "a" * 5000,
    "../../outside",
    "/tmp/outside",
    "\x00",
    "\x1b[2J\x1b]0;title\x07",
    "\ud800",
    "</script><script>alert(1)</script>",
    "' onload='alert(1)",
    "é\u202e",
    "os.system",
    "builtins.eval",
    "affine",
    "float32",
    "complex64",
    "codes",
    "0.weight",
    [],
    {},
    [[[[[[[[]]]]]]]],
    {"kind": "affine"},
    {"kind": "linear"},
)


def nodes(value: object) -> list[Node]:
    """Return every dictionary and list in a value, itself first."""
    found: list[Node] = []
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            found.append(one)
            waiting += one.values()
        elif isinstance(one, list):
            found.append(one)
            waiting += one
    return found


def odd(random: Random) -> object:
    """Return a value that is seldom meant; numbers near powers of two among them."""
    if random.random() < 0.3:
        return random.choice((1, -1)) * ((1 << random.randrange(66)) + random.randrange(-2, 3))
    return copy.deepcopy(random.choice(ODD))


def edit(value: object, random: Random) -> None:
    """Change one place of a JSON value, in place."""
    places = [node for node in nodes(value) if node]
    if not places:
        return
    node = random.choice(places)
    key = random.choice(list(node) if isinstance(node, dict) else range(len(node)))
    how = random.choice(("replace", "replace", "nudge", "remove", "double", "swap", "rename"))
    old = node[key]
    if how == "remove":
        del node[key]
    elif how == "nudge" and isinstance(old, int):
        node[key] = old + random.choice((-8, -1, 1, 8))
    elif how == "double":
        if isinstance(node, list):
            node.append(copy.deepcopy(old))
        else:
            node[f"{key}2"] = copy.deepcopy(old)
    elif how == "swap":
        other = random.choice(places)
        at = random.choice(list(other) if isinstance(other, dict) else range(len(other)))
        theirs = copy.deepcopy(other[at])
        other[at] = copy.deepcopy(old)
        node[key] = theirs
    elif how == "rename" and isinstance(node, dict):
        node[str(odd(random))] = node.pop(str(key))
    else:
        node[key] = odd(random)


def deep(random: Random) -> str:
    """Return JSON that is nested beyond what a parser that calls itself can follow."""
    depth = random.choice((200, 2000, 100_000))
    return random.choice(("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth))


def text_of(value: object) -> bytes:
    """Return JSON as bytes; half a surrogate is written as it is, which is no UTF-8."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def scramble(content: bytes, random: Random) -> tuple[str, bytes]:
    """Return what was done to some bytes, and them."""
    if not content:
        return "bytes: none", content
    changed, size = bytearray(content), len(content)
    start = random.randrange(size)
    end = min(size, start + random.choice((1, 2, 8, 64, 1024)))
    how = random.choice(
        ("flip", "flip", "set", "cut", "cut", "drop", "repeat", "zero", "move", "add")
    )
    if how == "flip":
        for _ in range(random.randrange(1, 9)):
            changed[random.randrange(size)] ^= 1 << random.randrange(8)
    elif how == "set":
        changed[start:end] = random.randbytes(end - start)
    elif how == "cut":
        del changed[start:]
    elif how == "drop":
        del changed[start:end]
    elif how == "repeat":
        changed[start:start] = changed[start:end] * random.randrange(1, 4)
    elif how == "zero":
        changed[start:end] = bytes(end - start)
    elif how == "move":
        part = changed[start:end]
        del changed[start:end]
        at = random.randrange(len(changed) + 1)
        changed[at:at] = part
    else:
        changed += random.randbytes(random.choice((1, 8, 4096)))
    return f"bytes: {how}", bytes(changed)
