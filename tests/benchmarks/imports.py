"""What `import mono_quant` costs beyond `import torch`, and the modules that it adds.

With bytecode that is compiled already, as an installed package has it.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks.measure import print_table

REPEATS = 15
_PROGRAM = """
import gc, json, sys, time
{before}
collected, began = [], []
def note(phase, info):
    if info["generation"] == 2:
        (began if phase == "start" else collected).append(time.perf_counter())
gc.callbacks.append(note)
known, start, busy = set(sys.modules), time.perf_counter(), time.process_time()
import {imported}
taken, busy = time.perf_counter() - start, time.process_time() - busy
full = sum(collected) - sum(began)
print(json.dumps([taken, busy, full, sorted(set(sys.modules) - known)]))
"""
_TORCH = _PROGRAM.format(before="", imported="torch")
_BEYOND = _PROGRAM.format(before="import torch", imported="mono_quant")
_BESIDE = _PROGRAM.format(
    before="import torch", imported="attrs, safetensors, safetensors.torch, tqdm"
)
_NAMES = {
    _TORCH: "torch",
    _BEYOND: "mono_quant, once torch is there",
    _BESIDE: "of that attrs, safetensors, tqdm",
}


class _Taken(NamedTuple):
    """Seconds of one import: by the clock, of the processor, and of full collections therein."""

    whole: float
    busy: float
    collecting: float


def main() -> None:
    """Print the medians of fresh processes that take turns, and the modules by package."""
    with tempfile.TemporaryDirectory(prefix="mono_quant_") as folder:
        _measure(Path(folder))


def _measure(bytecode: Path) -> None:
    times: dict[str, list[_Taken]] = {program: [] for program in _NAMES}
    added: dict[str, list[str]] = {}
    for program in times:
        _run(program, bytecode)  # compiles
    for _ in range(REPEATS):
        for program, taken in times.items():
            one, added[program] = _run(program, bytecode)
            taken.append(one)
    torch = min(one.busy for one in times[_TORCH])
    rows = []
    for program, name in _NAMES.items():
        taken = times[program]
        busy = min(one.busy for one in taken)
        found = [
            statistics.median(one.whole for one in taken),
            min(one.whole for one in taken),
            busy,
            statistics.median(one.collecting for one in taken),
        ]
        rows.append((name, *(f"{1e3 * one:.0f}" for one in found), f"{busy / torch:.1%}"))
    columns = ("median ms", "least ms", "least CPU ms", "full collections ms", "share of torch")
    print_table((f"import, {REPEATS} fresh processes", *columns), rows)
    print(
        "CPU time is what a machine with nothing else to do would take; the share is of that.\n"
        "A full collection walks all that torch holds. Torch leaves the collector on the brink of "
        "one;\nmono_quant puts off what would fall into its own import."
    )
    modules = added[_BEYOND]
    counted = Counter(name.partition(".")[0] for name in modules)
    print_table(
        ("package", "modules added", "which, if few"),
        [
            (package, str(count), _few([name for name in modules if _of(name, package)]))
            for package, count in counted.most_common()
        ],
    )


def _run(program: str, bytecode: Path) -> tuple[_Taken, list[str]]:
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(bytecode)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    )
    whole, busy, collecting, modules = json.loads(done.stdout)
    return _Taken(whole, busy, collecting), [str(name) for name in modules]


def _of(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _few(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 8 else ""
