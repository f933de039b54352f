"""Processes that are there at once, to be killed: forked off one that has loaded everything."""

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

JOBS: dict[str, Callable[..., object]] = {}
"""What a child may be asked to do, by name; see `job`."""


def job(function: Callable[..., object]) -> Callable[..., object]:
    """Let children do something, whose arguments are texts."""
    JOBS[function.__name__] = function
    return function


class Child:
    """A process that does one job."""

    def __init__(self, nursery: "Nursery", pid: int) -> None:
        """Name a process that a nursery forked."""
        self._nursery, self.pid = nursery, pid

    def kill(self) -> int:
        """End it by SIGKILL, as a machine that runs out of memory does; return how it ended."""
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def wait(self) -> int:
        """Wait for its end, and return its exit code, or the signal that ended it as -number."""
        return self._nursery.ask("wait", str(self.pid))


class Nursery:
    """A process that has imported everything, and forks."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        """Use a process that runs `main`."""
        self._process = process

    def start(self, name: str, *arguments: object) -> Child:
        """Start a job in a process of its own."""
        return Child(self, self.ask("fork", name, *map(str, arguments)))

    def ask(self, *words: str) -> int:
        """Return the answer to one line."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\t".join(words) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@contextmanager
def nursery() -> Iterator[Nursery]:
    """Yield a nursery whose jobs are those of `tests.endurance.kills`."""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.endurance.kills"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    ) as process:
        yield Nursery(process)
        assert process.stdin is not None
        process.stdin.close()


def main() -> None:
    """Fork at each line that asks for it, until there are no more."""
    for line in iter(sys.stdin.readline, ""):
        verb, *words = line.rstrip("\n").split("\t")
        if verb == "wait":
            code = os.waitstatus_to_exitcode(os.waitpid(int(words[0]), 0)[1])
        else:
            code = os.fork()
            if code == 0:
                os._exit(_do(*words))
        sys.stdout.write(f"{code}\n")
        sys.stdout.flush()


def _do(name: str, *arguments: str) -> int:
    try:
        JOBS[name](*arguments)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
