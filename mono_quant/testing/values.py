"""Laws of everything that can be written down: strategies are values."""

import copy
import json
import pickle
from typing import cast

import attrs

from mono_quant.configurable import Configurable, kinds_of
from mono_quant.errors import MonoQuantError
from mono_quant.testing.law import Broken, Laws, expect, refused


def it_has_a_kind_that_is_no_path(subject: Configurable) -> None:
    """A kind is a name: letters, digits, underscores, and dots for whose it is."""
    kind = getattr(type(subject), "kind", None)
    expect(isinstance(kind, str), "it has no `kind: ClassVar[str]`")
    parts = str(kind).split(".")
    expect(all(part.isidentifier() for part in parts), f"its kind is {kind!r}")


def it_comes_back_from_json(subject: Configurable) -> None:
    """What `to_config` returns survives JSON and makes an equal strategy again."""
    try:
        config = json.loads(json.dumps(subject.to_config(), allow_nan=False))
        back = Configurable.from_config(config, kinds_of(subject))
    except MonoQuantError as error:
        raise Broken(str(error)) from error
    expect(type(back) is type(subject), f"a {type(back).__name__} came back")
    expect(back == subject, f"{back!r} came back")


def every_field_is_written_down(subject: Configurable) -> None:
    """`to_config` has the kind and every argument of the class, and nothing else."""
    said = {str(field.alias) for field in _fields(subject)}
    written = set(subject.to_config()) - {"kind"}
    expect(said == written, f"it has {sorted(said)}, and {sorted(written)} is written")


def every_field_tells_it_apart(subject: Configurable) -> None:
    """No field is left out when two strategies are compared."""
    for field in _fields(subject):
        other = copy.copy(subject)
        object.__setattr__(other, field.name, _Unlike())
        expect(other != subject, f"a strategy with another {field.alias} is said to be equal")


def it_is_a_value(subject: Configurable) -> None:
    """It hashes, equals its copies, and survives a pickle."""
    try:
        expect(hash(subject) == hash(copy.deepcopy(subject)), "a copy has another hash")
    except TypeError as error:
        raise Broken(f"it cannot be hashed: {error}") from error
    expect(copy.deepcopy(subject) == subject, "a copy is not equal")
    expect(pickle.loads(pickle.dumps(subject)) == subject, "what a pickle holds is not equal")


def it_cannot_be_changed(subject: Configurable) -> None:
    """Setting a field is an error, so that builders can share it."""
    names = [field.name for field in _fields(subject)]
    for name in [*names, "a_field_of_its_own"]:
        other = copy.copy(subject)
        with refused(AttributeError, f"setting {name}"):
            setattr(other, name, None)


class _Unlike:
    """Equal to nothing else; hashes, as a value of a field must."""


def _fields(subject: Configurable) -> tuple["attrs.Attribute[object]", ...]:
    expect(attrs.has(type(subject)), "it is no attrs class: put @attrs.frozen above it")
    known = cast("type[attrs.AttrsInstance]", type(subject))  # as the line above has seen
    return tuple(attrs.fields(known))


LAWS = Laws(
    Configurable,
    (
        it_has_a_kind_that_is_no_path,
        it_comes_back_from_json,
        every_field_is_written_down,
        every_field_tells_it_apart,
        it_is_a_value,
        it_cannot_be_changed,
    ),
)
