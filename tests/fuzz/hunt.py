"""Mutants tried in processes of their own: one that crashes or hangs costs a process, no more."""

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import attrs

from tests.fuzz.mutants import Mutant, mutant
from tests.fuzz.samples import samples
from tests.fuzz.trial import prepare, trial

SECONDS = 60.0
"""How long all loaders together may take for one mutant, on a machine that is busy."""

LOST = -1_000_000
"""A number at which a process ends."""


@attrs.frozen
class Tried:
    """What came of one mutant.

    Attributes:
        number: of the mutant.
        outcomes: by loader; see `trial`.
    """

    number: int
    outcomes: dict[str, str]

    @property
    def bad(self) -> dict[str, str]:
        """What must not be."""
        return {name: one for name, one in self.outcomes.items() if one.startswith("!")}


def hunt(numbers: Sequence[int]) -> Iterator[Tried]:
    """Yield what came of each mutant, in order."""
    left = list(numbers)
    while left:
        done = yield from _child(left)
        left = left[done:]


def _child(numbers: Sequence[int]) -> Generator[Tried, None, int]:
    """Try mutants in one process until it is lost; return how many were tried."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz", "--child"]
    # so that memory that nobody wrote to holds no zeros
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_PERTURB_": "165"}
    with (
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[2],
        ) as process,
        selectors.DefaultSelector() as selector,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        selector.register(process.stdout, selectors.EVENT_READ)
        for done, number in enumerate(numbers):
            try:
                process.stdin.write(f"{number}\n")
                process.stdin.flush()
                line = process.stdout.readline() if selector.select(SECONDS) else None
            except BrokenPipeError:
                line = ""
            if line:
                yield Tried(number, json.loads(line))
                continue
            if line is None:
                process.kill()
                yield Tried(number, {"process": f"!hang: longer than {SECONDS:.0f} s"})
            else:
                process.stdin.close()
                yield Tried(number, {"process": f"!crash: ended with {process.wait()}"})
            return done + 1
        process.stdin.close()
        process.wait()
    return len(numbers)


def child() -> None:
    """Try the mutants whose numbers come in, and write what came of each as a line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints
    with tempfile.TemporaryDirectory() as folder:
        watch = prepare(Path(folder))
        for one in samples():  # loads what libraries load at their first use
            trial(Mutant(0, one, "", one.content, False), watch)
        for line in iter(sys.stdin.readline, ""):
            if int(line) == LOST:  # so that a test sees that the loss of a process is seen
                os.kill(os.getpid(), signal.SIGKILL)
            answers.write(json.dumps(trial(mutant(int(line)), watch)) + "\n")
            answers.flush()
        os.chdir("/")
