"""Nested tuples, lists and mappings, as models take and return them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import cast

from torch import Tensor


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))


def each(value: object, change: Callable[[object], object]) -> object:
    """Return nested tuples, lists and mappings with each other value in them changed."""
    if isinstance(value, Mapping):
        return {key: each(item, change) for key, item in value.items()}
    if isinstance(value, tuple):
        made = getattr(value, "_make", tuple)  # a named tuple keeps its names
        return cast("object", made(each(item, change) for item in value))
    if isinstance(value, list):
        return [each(item, change) for item in value]
    return change(value)
