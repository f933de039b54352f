"""What a user says of all kernels at once: for the process, a while, or from outside."""

import os
from functools import cache
from types import TracebackType
from typing import ClassVar, Self

from mono_quant.errors import ConfigurationError
from mono_quant.kernels.store import STORE


class Switch:
    """One of some words, in force everywhere in the process.

    From the call on, or as a context manager until its end. The environment is asked where nothing
    was said, once, when the word is first needed.
    """

    variable: ClassVar[str]
    """Environment variable that holds the word."""

    noun: ClassVar[str]
    """What the words are, for errors."""

    current: ClassVar[str | None] = None
    """The word in force, or None."""

    @classmethod
    def known(cls) -> tuple[str, ...]:
        """Return the words."""
        return ()

    @classmethod
    def named(cls) -> str | None:
        """Return the word in force, from the environment where nothing was said.

        Raises:
            ConfigurationError: the environment holds a word that there is not.
        """
        return cls.current or cls._said_outside()

    @classmethod
    def reread(cls) -> None:
        """Ask the environment anew."""
        cls._said_outside.cache_clear()
        STORE.age += 1

    def __init__(self, name: str | None) -> None:
        self._before = type(self).current
        self._say(self._checked(name))

    def __enter__(self) -> Self:
        """Do nothing: the word is in force already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let what was said before be in force."""
        self._say(self._before)

    @classmethod
    def _say(cls, name: str | None) -> None:
        cls.current = name
        STORE.age += 1  # choices that were made for another word do not hold

    @classmethod
    @cache
    def _said_outside(cls) -> str | None:
        return cls._checked(os.environ.get(cls.variable) or None)

    @classmethod
    def _checked(cls, name: str | None) -> str | None:
        if name is not None and name not in cls.known():
            known = ", ".join(sorted(set(cls.known())))
            raise ConfigurationError(f"there is no {cls.noun} {name!r}, only {known}")
        return name


class memory(Switch):
    """Let kernels keep one order of the codes of a weight ("single", the default) or two.

    With "double" the canonical codes may stay beside those in a kernel's order, where batches of
    different sizes are served best by different ones and a measurement showed so;
    `mono_quant.kernel_bytes` counts what that takes.

        kernels.memory("double")  # for good
        with kernels.memory("double"):
            model(x)

    Args:
        name: "single" or "double"; None for what the environment variable ``MONO_QUANT_MEMORY``
            says, or "single".

    Raises:
        ConfigurationError: it is none of these.
    """

    variable = "MONO_QUANT_MEMORY"
    noun = "amount of memory"
    current: ClassVar[str | None] = None

    @classmethod
    def known(cls) -> tuple[str, ...]:
        """Return both words."""
        return ("single", "double")

    @classmethod
    def is_double(cls) -> bool:
        """Return whether two orders may be kept."""
        return cls.named() == "double"
