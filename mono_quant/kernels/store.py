"""What was found out about this machine, kept in a file of the user's cache."""

import contextlib
import json
import os
import platform
from functools import cache
from pathlib import Path

import torch

from mono_quant.atomic import replacing
from mono_quant.version import __version__

_CPUINFO = Path("/proc/cpuinfo")


class Store:
    """Texts by name, for this machine and these versions; kept in a file as well as may be.

    A file that cannot be read counts as empty, and one that cannot be written is left: then the
    findings last as long as the process.
    """

    def __init__(self) -> None:
        """Read nothing yet."""
        self._known: dict[str, str] | None = None
        self.age = 0
        """Grows whenever choices that were made are to be made anew, as when all is forgotten."""

    def get(self, name: str) -> str | None:
        """Return what was found, or None."""
        if self._known is None:
            self._known = _read().get(machine(), {})
        return self._known.get(name)

    def set(self, name: str, value: str) -> None:
        """Remember a finding, in the file too."""
        self.get(name)
        if self._known is not None:
            self._known[name] = value
        everything = _read()
        everything.setdefault(machine(), {})[name] = value
        with contextlib.suppress(OSError, RuntimeError):  # no such folder, no space, no home
            path().parent.mkdir(parents=True, exist_ok=True)
            with replacing(path()) as beside:  # several processes may do so at once
                beside.write_text(json.dumps(everything, indent=1, sort_keys=True), "utf-8")

    def forget(self) -> None:
        """Forget what is in memory; the file stays."""
        self._known = None
        self.age += 1


STORE = Store()


def path() -> Path:
    """Return the file: in ``XDG_CACHE_HOME``, or ``~/.cache``.

    Raises:
        RuntimeError: the user has no home.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    folder = Path(base) if base else Path.home() / ".cache"
    return folder / "mono_quant" / "kernels.json"


@cache
def machine() -> str:
    """Return what a finding depends on: processor, instructions, torch, and this package."""
    parts = (
        _processor(),
        torch.backends.cpu.get_cpu_capability(),
        *(f"{name}={os.environ[name]}" for name in _SWITCHES if name in os.environ),
        f"torch {torch.__version__}",
        f"mono_quant {__version__}",
    )
    return ", ".join(parts)


_SWITCHES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")


def _processor() -> str:
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model")]
    return " ".join(named[:2]) or platform.machine()  # number and name of the first core


def _read() -> dict[str, dict[str, str]]:
    try:
        found = json.loads(path().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {
        key: {name: value for name, value in part.items() if isinstance(value, str)}
        for key, part in found.items()
        if isinstance(part, dict)
    }
