"""The process of one package: makes its ways of a network and runs them when it is told.

It reads a line of JSON from its standard input and answers with one: `{"make": title}` with what
was made and `{"run": workload}` with the processor time of each that was. What packages print goes
to the standard error.
"""

import importlib
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tests.benchmarks.contenders import networks
from tests.benchmarks.contenders.contender import Made, Run, Task
from tests.benchmarks.measure import sqnr

FLOAT = "float"
_REASON = 200  # characters


class _Runner(NamedTuple):
    title: str
    run: Run
    most_arguments: int


def main(module: str, network: str, inputs: str) -> None:
    """Serve until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")  # of what packages call themselves
    torch.set_num_threads(1)
    package = importlib.import_module(module).PACKAGE
    ways = {**package.decoders, **package.convolutions}
    task = networks.task(
        network, torch.load(Path(inputs), weights_only=True), ours=package.title == "mono_quant"
    )
    with torch.no_grad():
        exact = {name: task.model(*args) for name, args in task.workloads.items()}
        runners = [_Runner(FLOAT, task.model, 9)]
        for line in sys.stdin:
            command = json.loads(line)
            if "make" in command:
                title = command["make"]
                try:
                    made = ways[title](task)
                    answer = {
                        "nbytes": made.nbytes,
                        "note": made.note,
                        "sqnr": _near(made, task, exact),
                    }
                    runners.append(_Runner(title, made.run, made.most_arguments))
                except Exception as error:
                    answer = {"skipped": _reason(error)}
            else:
                answer = _turn(runners, task.workloads[command["run"]])
            print(json.dumps(answer), file=answers)


def _near(made: Made, task: Task, exact: dict[str, Tensor]) -> dict[str, float]:
    found = {}
    for name, args in task.workloads.items():
        if len(args) <= made.most_arguments:
            made.run(*args)  # what only a first call does
            found[name] = sqnr([exact[name]], [made.run(*args)])
    return found


def _turn(runners: list[_Runner], args: tuple[Tensor, ...]) -> dict[str, float]:
    _pin()
    taken = {}
    for title, run, most in runners:
        if len(args) <= most:
            run(*args)  # tokens follow each other: what others left in the caches falls on nobody
            start = time.process_time()
            run(*args)
            taken[title] = time.process_time() - start
    return taken


def _pin() -> None:
    """Keep every thread of this process on one core, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        last = max(os.sched_getaffinity(0))
        for thread in Path("/proc/self/task").iterdir():
            os.sched_setaffinity(int(thread.name), {last})


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:_REASON]


if __name__ == "__main__":
    main(*sys.argv[1:])
