"""What every loader makes of one file: run in a process that may be lost."""

import functools
import importlib
import io
import os
import resource
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from mono_quant import MonoQuantError
from mono_quant.cli.parser import parsers
from tests.fuzz.loaders import OUTPUT, Right, actions_on, lay_out
from tests.fuzz.mutants import Mutant
from tests.fuzz.pickles import CANARY

MEMORY = 64 << 20
"""Bytes that reading a mutant may take beyond `PER_BYTE` times its own size."""
PER_BYTE = 32  # 2-bit codes become 32-bit floats, and a second copy of them is compared
ADDRESSES = 4 << 30
"""Bytes of addresses beyond those at the start: what a process cannot get more of."""

PREFIX = "model"
WATCHED = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.chmod",
    "os.symlink",
    "os.link",
    "os.truncate",
    "subprocess.Popen",
    "socket.connect",
    "socket.getaddrinfo",
    "shutil.",
    "pty.spawn",
    "ftplib.",
    "urllib.",
    "webbrowser.open",
)
_OWN = ("os.remove", "os.rename", "os.chmod", "os.mkdir", "os.rmdir", "shutil.rmtree")
"""What a writer does with its temporary files, in the folder that it writes to."""


class Watch:
    """Notes what a loader does outside of itself; an audit hook, which cannot be taken off."""

    def __init__(self, folder: Path) -> None:
        """Watch everything but writes to files in a folder."""
        self.seen: list[str] = []
        self.on = False
        self._inside = os.path.realpath(folder)
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not writes or isinstance(path, int) or self._is_inside(path):
                return
        elif not event.startswith(WATCHED):
            return
        elif event in _OWN and all(map(self._is_inside, arguments[:1])):
            return  # a temporary file, put in its place or removed
        self.seen.append(f"{event} {arguments!r:.100}")

    def _is_inside(self, path: object) -> bool:
        return os.path.realpath(str(path)).startswith(self._inside)


def prepare(folder: Path) -> Watch:
    """Limit this process, go to a folder, and return what watches from then on.

    One parser serves all commands: making it takes longer than reading most mutants.
    """
    program = importlib.import_module("mono_quant.cli.parser")
    setattr(program, "parsers", functools.cache(parsers))  # noqa: B010  # typed as final
    os.chdir(folder)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESSES, resource.RLIM_INFINITY))
    return Watch(folder)


def trial(mutant: Mutant, watch: Watch) -> dict[str, str]:
    """Return what came of each loader, by its name; what must not be begins with an exclamation.

    Every loader is given the mutant as a file in the current folder.
    """
    sample = mutant.sample
    path, original = Path(f"{PREFIX}{sample.suffix}"), Path(f"original{sample.suffix}")
    path.write_bytes(mutant.content)
    original.write_bytes(sample.content)
    lay_out(sample)
    others = {one.name for one in Path().iterdir()}
    found: dict[str, str] = {}
    for name, (run, right) in actions_on(path, original, sample).items():
        _forget_peak()
        before = _memory("VmRSS")
        watch.on = True
        try:
            found[name] = _outcome(run, None if mutant.forged else right)
        finally:
            watch.on = False
        grown = _memory("VmHWM") - before
        if grown > MEMORY + PER_BYTE * len(mutant.content):
            found[name] = f"!memory: {grown >> 20} MiB ({found[name]})"
        for output in Path().glob(f"{OUTPUT}.*"):
            output.unlink()
        there = sorted(one.name for one in Path().iterdir() if one.name not in others)
        if CANARY in there:
            found[name] = f"!code ran ({found[name]})"
            Path(CANARY).unlink()
        elif there:
            found[name] = f"!files left: {', '.join(there)[:100]} ({found[name]})"
            for one in there:
                Path(one).unlink()
        if watch.seen:
            found[name] = f"!touched {watch.seen[0]} ({found[name]})"
            watch.seen.clear()
    return found


def _outcome(run: Callable[[], object], right: Right | None) -> str:
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            found = run()
    except MonoQuantError as error:
        return type(error).__name__
    except BaseException as error:
        return f"!{type(error).__name__}: {error!s:.150}"
    if isinstance(found, str):
        return found
    if right is None:
        return "loaded"
    return "equal" if right(found) else "!silently changed"


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _memory(field: str) -> int:
    """Return a figure of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return int(rest.split()[0]) << 10
    raise KeyError(field)
