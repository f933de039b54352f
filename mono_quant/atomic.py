"""Files that are either the old one or the whole new one."""

import importlib
import os
import platform
import re
import secrets
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_FCNTL = importlib.import_module("fcntl") if os.name == "posix" else None  # Windows has none
_MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to; sync it and rename it to `path` on success.

    It lies in a folder of its own beside `path`, for whatever else its writer puts there. On
    failure the folder is removed and whatever stood at `path` still stands. A process that is
    killed leaves its folder; the next one that writes to `path` on the same machine removes it. It
    is known by a lock, which the system takes from a process when that ends, however it ends.

    Raises:
        OSError: the file cannot be written.
    """
    remove_abandoned(path)
    folder, lock = _locked_folder(path)
    beside = folder / path.name
    try:
        beside.touch()  # what cannot be written fails here, as an OSError, whoever writes then
        mode = beside.stat().st_mode
        yield beside
        beside.chmod(mode)  # a writer may have put a private file in its place
        _sync(beside, os.O_RDWR)
        beside.replace(path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error  # of a full disk
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)
    if os.name == "posix":
        _sync(path.parent, os.O_RDONLY)


def _locked_folder(path: Path) -> tuple[Path, int | None]:
    """Return a new folder beside a path, and the lock on it; no lock where there is no such thing.

    Whoever looks for abandoned folders may take this one before it is locked. Then it is gone.
    """
    while True:
        folder = path.with_name(f".{path.name}.{_MACHINE}-{secrets.token_hex(4)}.tmp")
        try:
            folder.mkdir()
        except OSError as error:
            raise type(error)(error.errno, error.strerror, str(path)) from error
        if _FCNTL is None:
            return folder, None
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        with suppress(OSError):  # a file system without locks
            _FCNTL.flock(lock, _FCNTL.LOCK_EX)
        with suppress(FileNotFoundError):
            if folder.stat().st_ino == os.fstat(lock).st_ino:
                return folder, lock
        os.close(lock)


def remove_abandoned(path: Path) -> None:
    """Remove the folders that killed processes of this machine left beside a path.

    Also those of writers that had put their file in its place already.
    """
    if _FCNTL is None:
        return
    left = re.compile(rf"\.{re.escape(path.name)}\.{_MACHINE}-[0-9a-f]{{8}}\.tmp")
    folders: list[Path] = []
    with suppress(OSError):  # a parent that is not there is an error of the writing
        folders = [one for one in path.parent.iterdir() if left.fullmatch(one.name)]
    for folder in folders:
        with suppress(OSError):  # locked, it belongs to the living; a link or file, to others
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                _FCNTL.flock(lock, _FCNTL.LOCK_EX | _FCNTL.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
