"""Whether operators can be trusted on this machine, tried once in a process of their own."""

import signal
import subprocess
import sys
import zlib
from functools import cache

from mono_quant.kernels.store import STORE

_TIMEOUT_S = 120.0
_WORKS = "works"


@cache
def refusal(name: str, program: str) -> str | None:
    """Return why an operator cannot be used by this torch on this machine, or None.

    It is tried in a process of its own, which takes seconds: some virtual machines announce
    instructions (AMX) and kill the process that uses them. What the trial showed is remembered for
    this machine; that it could not be held, for this process.

    Args:
        name: of the operator, in words.
        program: Python that ends well only if the operator computes what it should.
    """
    key = f"{name}, trial {zlib.crc32(program.encode()):08x}"  # another trial shows other things
    found = STORE.get(key)
    if found is None:
        try:
            found = _attempt(program)
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            return f"{name} could not be tried: {type(error).__name__}"
        STORE.set(key, found)
    return None if found == _WORKS else f"{name} failed on trial: {found}"


def _attempt(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_TIMEOUT_S,
        check=False,
    )
    if done.returncode == 0:
        return _WORKS
    if done.returncode < 0:
        return f"the process died of {_signal(-done.returncode)}"
    said = done.stderr.strip().splitlines()  # the last line is the error's
    return said[-1][:_LONGEST] if said else f"the process ended with {done.returncode}"


_LONGEST = 200


def _signal(number: int) -> str:
    known = {one.value: one.name for one in signal.Signals}
    return known.get(number, f"signal {number}")
