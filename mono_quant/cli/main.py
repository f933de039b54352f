"""From a command line to an exit code."""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from typing import cast

from mono_quant.cli.commands import Outcome
from mono_quant.cli.parser import parse
from mono_quant.cli.words import OPTIONS, in_options
from mono_quant.demo import DemoUnavailable
from mono_quant.errors import MonoQuantError
from mono_quant.text import printable

USAGE = 2
INPUT_OUTPUT = 3
DEFECT = 70
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: done. 1: the result failed (validation, or what was required of it). 2: usage or bad input.
    3: a file or folder could not be read or written. 70: a defect of this program. 130:
    interrupted.

    Args:
        argv: the words after the program's name; by default those of this process.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        given = parse(words)
        return _finish(given)
    except SystemExit as stop:  # --help and --version have printed what they had to
        return int(stop.code or 0)
    except BrokenPipeError:  # the reader went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INPUT_OUTPUT
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except Exception as error:
        if "--debug" in words:
            raise
        return _explain(error)


def _finish(given: Namespace) -> int:
    run = cast("Callable[[Namespace], Outcome]", given.run)  # what the parser puts there
    if given.json:
        with redirect_stdout(sys.stderr):  # whatever a factory or a model prints
            outcome = run(given)
        print(json.dumps(outcome.data, indent=2, allow_nan=False))
    else:
        outcome = run(given)
        if outcome.text:
            print(printable(outcome.text))
    sys.stdout.flush()
    if outcome.problem is not None:
        _complain(outcome.problem, outcome.code)
    return outcome.code


def _explain(error: Exception) -> int:
    if isinstance(error, MonoQuantError):
        return _complain(in_options(error.told(OPTIONS)), USAGE)
    if isinstance(error, DemoUnavailable):
        return _complain(str(error), USAGE)
    if isinstance(error, OSError):
        named = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return _complain(named, INPUT_OUTPUT)
    return _complain(
        f"{type(error).__name__}: {error} (a defect of monoquant: --debug shows where)", DEFECT
    )


def _complain(text: str, code: int) -> int:
    print(f"monoquant: error: {printable(' '.join(text.split()))}", file=sys.stderr)
    return code
