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

from tests.benchmarks.measure import print_table

REPEATS = 15
_TORCH = """
import json, sys, time
start = time.perf_counter()
import torch
print(json.dumps({"s": time.perf_counter() - start, "modules": []}))
"""
_BEYOND = """
import json, sys, time
import torch
known, start = set(sys.modules), time.perf_counter()
import mono_quant
taken = time.perf_counter() - start
print(json.dumps({"s": taken, "modules": sorted(set(sys.modules) - known)}))
"""
_BESIDE = """
import json, sys, time
import torch
known, start = set(sys.modules), time.perf_counter()
import attrs, safetensors, safetensors.torch, tqdm
taken = time.perf_counter() - start
print(json.dumps({"s": taken, "modules": sorted(set(sys.modules) - known)}))
"""


def main() -> None:
    """Print the medians of fresh processes that take turns, and the modules by package."""
    with tempfile.TemporaryDirectory(prefix="mono_quant_") as folder:
        _measure(Path(folder))


def _measure(bytecode: Path) -> None:
    times: dict[str, list[float]] = {_TORCH: [], _BEYOND: [], _BESIDE: []}
    added: dict[str, list[str]] = {}
    for program in times:
        _run(program, bytecode)  # compiles
    for _ in range(REPEATS):
        for program, taken in times.items():
            seconds, added[program] = _run(program, bytecode)
            taken.append(seconds)
    torch, ours, beside = (statistics.median(times[which]) for which in (_TORCH, _BEYOND, _BESIDE))
    least = {which: min(taken) for which, taken in times.items()}
    columns = (f"import, {REPEATS} fresh processes", "median ms", "least ms", "share of torch")
    print_table(
        columns,
        [
            ("torch", f"{torch * 1e3:.0f}", f"{least[_TORCH] * 1e3:.0f}", ""),
            (
                "mono_quant, once torch is there",
                f"{ours * 1e3:.1f}",
                f"{least[_BEYOND] * 1e3:.1f}",
                f"{ours / torch:.1%}",
            ),
            (
                "of that attrs, safetensors, tqdm",
                f"{beside * 1e3:.1f}",
                f"{least[_BESIDE] * 1e3:.1f}",
                f"{beside / torch:.1%}",
            ),
        ],
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


def _run(program: str, bytecode: Path) -> tuple[float, list[str]]:
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(bytecode)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    )
    found = json.loads(done.stdout)
    return float(found["s"]), [str(name) for name in found["modules"]]


def _of(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _few(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 8 else ""
