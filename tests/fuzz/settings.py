"""Mutants of configuration files: JSON, and the TOML of the same settings."""

import json
from random import Random

from tests.fuzz.values import Node, deep, edit, nodes, odd, scramble, text_of


def mutate(content: bytes, random: Random) -> tuple[str, bytes]:
    """Return what was done to a file, and the file."""
    if content.lstrip()[:1] != b"{":
        return _toml(content, random)
    kind = random.choice(("bytes", "value", "value", "value", "value", "graft", "deep", "twice"))
    settings: Node = json.loads(content)
    if kind == "bytes":
        return scramble(content, random)
    if kind == "value":
        for _ in range(random.randrange(1, 4)):
            edit(settings, random)
    elif kind == "graft":  # a strategy where another one belongs, and one in itself
        places = nodes(settings)
        strategies = [one for one in places if isinstance(one, dict) and "kind" in one]
        place = random.choice([one for one in places if one])
        key = random.choice(list(place) if isinstance(place, dict) else range(len(place)))
        value = json.loads(json.dumps(random.choice(strategies)))
        for _ in range(random.choice((0, 0, 1, 50))):
            inner = json.loads(json.dumps(random.choice(strategies)))
            inner[random.choice(list(inner))] = value
            value = inner
        place[key] = value
    elif kind == "deep":
        return kind, content.rstrip()[:-1] + b', "more": ' + deep(random).encode() + b"}"
    else:
        name = random.choice(list(settings))
        return kind, content.rstrip()[:-1] + b", " + text_of({name: odd(random)})[1:]
    return kind, text_of(settings)


def _toml(content: bytes, random: Random) -> tuple[str, bytes]:
    kind = random.choice(("bytes", "bytes", "line", "line", "deep", "value"))
    if kind == "bytes":
        return scramble(content, random)
    lines = content.split(b"\n")
    place = random.randrange(len(lines))
    if kind == "line":
        how = random.choice(("drop", "repeat", "swap"))
        other = random.randrange(len(lines))
        if how == "drop":
            del lines[place]
        elif how == "repeat":
            lines.insert(other, lines[place])
        else:
            lines[place], lines[other] = lines[other], lines[place]
    elif kind == "value":
        name, equals, _ = lines[place].partition(b" = ")
        value = random.choice(
            (
                text_of(odd(random)),
                b"1979-05-27T07:32:00Z",
                b"[" * 5000,
                b"{a." * 2000,
                b"'''x'''",
                b"nan",
                b"0x" + b"f" * 5000,
                b"9" * 5000,
            )
        )
        lines[place] = name + equals + value
    else:
        lines.append(
            random.choice(
                (
                    b"x = " + b"[" * 2000,
                    b"a" + b".a" * 20_000 + b" = 1",
                    b"[a" + b".a" * 20_000 + b"]",
                )
            )
        )
    return f"toml: {kind}", b"\n".join(lines)
