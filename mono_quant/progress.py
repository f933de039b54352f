"""Progress with the time that is left: of what takes long, and where the output is a terminal."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from tqdm import tqdm

AFTER = 2.0
"""Seconds before a bar is shown: what takes no longer needs none."""


_LABEL: ContextVar[str | None] = ContextVar("label", default=None)


class Bar(Protocol):
    """What counts."""

    def update(self, n: float | None = 1) -> bool | None:
        """Count `n` more."""


class _Unwatched(tqdm):
    """A bar without tqdm's watching thread, and with a lock of this process alone.

    That thread stays in the process, even of a bar that is not shown, and a fork at a moment at
    which it holds a lock leaves a child that waits for ever. tqdm's own lock is shared by all that
    were forked off one process: where one of them is killed with it, the others wait for ever.
    """

    monitor_interval = 0


def _new_lock() -> None:
    _Unwatched.set_lock(threading.RLock())


_new_lock()
if hasattr(os, "register_at_fork"):  # another thread may have held it
    os.register_at_fork(after_in_child=_new_lock)


def progress_bar(label: str | None, unit: str, total: int | None = None) -> "tqdm[object]":
    """Return a bar on the standard error, which is gone when it is closed.

    Args:
        label: what is going on; None for no bar.
        unit: what is counted.
        total: how many there will be, if that is known.
    """
    hidden = None if label else True  # None: where the output is no terminal
    return _Unwatched(total=total, desc=label, unit=unit, delay=AFTER, leave=False, disable=hidden)


@contextmanager
def telling(label: str | None) -> Iterator[None]:
    """Have what goes through a file meanwhile show a bar of that label; None for none.

    So a format of somebody's own needs no parameter for it.
    """
    token = _LABEL.set(label)
    try:
        yield
    finally:
        _LABEL.reset(token)


def told_bar(unit: str, total: int) -> "tqdm[object]":
    """Return a bar with the label that `telling` was given, and none outside of it."""
    return progress_bar(_LABEL.get(), unit, total)
