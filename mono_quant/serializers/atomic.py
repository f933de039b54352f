"""Files that are either the old one or the whole new one."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; sync it and rename it to `path` on success.

    On failure it is removed and whatever stood at `path` still stands.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        beside.touch()  # what cannot be written fails here, as an OSError, whoever writes then
        mode = beside.stat().st_mode
        yield beside
        beside.chmod(mode)  # a writer may have put a private file in its place
        _sync(beside, os.O_RDWR)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    if os.name == "posix":
        _sync(path.parent, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
