"""Strategies that can be written down: a kind, some JSON scalars, and the way back.

A strategy is a frozen value whose fields are its parameters. Its `kind` is a short name that stands
in files and configurations in place of the class; a class is found by its kind, never by a path or
class name read from a file.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Self, TypeGuard, TypeVar, cast

import attrs
import torch

from mono_quant.errors import ConfigurationError, UnknownKindError

Scalar = str | int | float | bool | None
Json = Scalar | Sequence["Json"] | Mapping[str, "Json"]
Config = Mapping[str, Json]

_KINDS: dict[str, type["Configurable"]] = {}


class Configurable:
    """A frozen strategy that is its parameters and can be written to JSON scalars.

    Subclasses are `attrs.frozen` classes and set `kind`. Fields may be strings, numbers, booleans,
    None, `torch.dtype`, tuples of those, or other configurables. A field that holds a dtype or a
    tuple needs a converter (`as_dtype`, `tuple`), because a configuration carries its name or list.
    """

    __slots__ = ()
    kind: ClassVar[str]

    def to_config(self) -> Config:
        """Return the kind and every field as JSON scalars."""
        fields = _fields(type(self))
        values = {argument: encode(getattr(self, name)) for argument, name in fields.items()}
        return {"kind": self.kind, **values}

    @classmethod
    def from_config(cls, config: Config, kinds: "Kinds | None" = None) -> Self:
        """Return the strategy that wrote `config`, which must be a `cls`.

        Args:
            config: what `to_config` returned.
            kinds: classes of your own by their kind, beside the registered ones.

        Raises:
            UnknownKindError: no class of that kind is known.
            ConfigurationError: the fields do not fit the class, or it is not a `cls`.
        """
        found = find_kind(config.get("kind"), kinds)
        if not issubclass(found, cls):
            raise ConfigurationError(
                f"expected a {cls.__name__}, but kind {found.kind!r} is a {found.__name__}"
            )
        arguments = {
            key: found.from_nested(value, kinds) for key, value in config.items() if key != "kind"
        }
        known = set(_fields(found))
        if unknown := set(arguments) - known:
            raise ConfigurationError(
                f"{found.__name__} has no field {', '.join(sorted(unknown))}; it has "
                f"{', '.join(sorted(known)) or 'none'}"
            )
        try:
            return found(**arguments)
        except TypeError as error:
            raise ConfigurationError(f"{found.__name__} cannot be made: {error}") from error

    @staticmethod
    def from_nested(value: Json, kinds: "Kinds | None") -> object:
        """Return a field's value: the strategy it describes, or itself."""
        return Configurable.from_config(value, kinds) if isinstance(value, Mapping) else value


Kinds = Mapping[str, type[Configurable]]
ConfigurableT = TypeVar("ConfigurableT", bound=Configurable)


def register(cls: type[ConfigurableT]) -> type[ConfigurableT]:
    """Make `cls` loadable by its kind. A class decorator; using a class never needs it.

    Raises:
        ConfigurationError: another class already has that kind.
    """
    known = _KINDS.setdefault(cls.kind, cls)
    names = [(one.__module__, one.__qualname__) for one in (known, cls)]
    if names[0] != names[1]:  # a module that is run again defines its classes anew
        raise ConfigurationError(f"kind {cls.kind!r} already belongs to {known.__name__}")
    _KINDS[cls.kind] = cls
    return cls


def find_kind(kind: object, kinds: Kinds | None = None) -> type[Configurable]:
    """Return the class of `kind`, from `kinds` first, then from the registered ones."""
    known = {**_KINDS, **(kinds or {})}
    if not isinstance(kind, str) or kind not in known:
        raise UnknownKindError(
            f"no class of kind {kind!r} is known; import the module that defines it and decorate "
            f"the class with @mono_quant.register, or pass kinds={{{kind!r}: TheClass}}"
        )
    return known[kind]


def registered() -> Mapping[str, type[Configurable]]:
    """Return every registered class by its kind."""
    return dict(_KINDS)


def kinds_of(*strategies: Configurable) -> Kinds:
    """Return the classes of strategies, and of those that they hold, by their kind."""
    found: dict[str, type[Configurable]] = {}
    for strategy in strategies:
        found[strategy.kind] = type(strategy)
        held = (getattr(strategy, name) for name in _fields(type(strategy)).values())
        found.update(kinds_of(*(value for value in held if isinstance(value, Configurable))))
    return found


def as_dtype(value: torch.dtype | str) -> torch.dtype:
    """Return the dtype named by `value`, which may be one already ("float16")."""
    if isinstance(value, torch.dtype):
        return value
    found: object = getattr(torch, value, None)
    if not isinstance(found, torch.dtype):
        raise ConfigurationError(f"{value!r} is not the name of a torch dtype")
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of `dtype` without its module: float16."""
    return str(dtype).removeprefix("torch.")


def _fields(cls: type[Configurable]) -> Mapping[str, str]:
    """Return the name of each attribute by the name of the argument that sets it."""
    fields = attrs.fields(cast("type[attrs.AttrsInstance]", cls))  # every concrete one is
    return {str(field.alias): str(field.name) for field in fields}


def encode(value: object) -> Json:
    """Return a field's value as JSON data."""
    if isinstance(value, Configurable):
        return value.to_config()
    if isinstance(value, tuple):
        return [_encode_scalar(item) for item in value]
    return _encode_scalar(value)


def _encode_scalar(value: object) -> Scalar:
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise ConfigurationError(f"{value!r} cannot be written to a configuration")


def is_count(value: object, least: int) -> TypeGuard[int]:
    """Return whether a parameter is a whole number from `least` on; a boolean is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
