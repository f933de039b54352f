"""Weights of 4, 3 and 2 bits by this package and by others: damage, size, CPU time and memory.

MiniLM's 36 Linears, calibrated on the first 64 background articles, cut at 256 tokens, and measured
on 50 other documents and 200 lines of reviews; the Linears of SmolLM2's blocks, calibrated on 64
windows of 128 tokens of the second half of the news, with KL, agreement and SQNR over the first
1024 tokens of the news and perplexity over the first 2048.

Each row is a process of its own, on one thread, in an environment that the package has to itself.
It is given the same float weights and texts, and returns what it made of the weights, in float32,
which is judged here by one function for all. CPU seconds and the peak of memory, beyond what was
resident before, are those of quantizing alone, calibration with it, imports not. Scales and zero
points are rounded to float16, and counted as such, where a package keeps float32 by default but for
NF4's. Where data is used, the same texts are given in the form that the package takes.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from mono_quant.serializers import read_safetensors
from tests.benchmarks.environments import EnvironmentUnavailable, python_with
from tests.benchmarks.measure import MB, print_table
from tests.benchmarks.weight_only import (
    auto_round,
    bitsandbytes,
    hqq,
    llm_compressor,
    networks,
    ours,
    quanto,
    torchao,
)
from tests.benchmarks.weight_only.package import Grid, Package, Quantized
from tests.models import AssetUnavailable

PACKAGES: Mapping[str, Package] = {
    one.__name__: one.PACKAGE
    for one in (ours, hqq, torchao, quanto, bitsandbytes, llm_compressor, auto_round)
}
_REPOSITORY = Path(__file__).parents[2]
_PATIENCE_S = 3600
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Failed(RuntimeError):
    """A row came to nothing; the message says why."""


def main(patterns: Sequence[str] = ("*",)) -> None:
    """Print a table for each network.

    Args:
        patterns: of what runs, "network, package: way, grid".
    """
    print(__doc__)
    for name, network in networks.NETWORKS.items():
        rows = list(_rows(name, patterns))
        if not rows:
            continue
        with tempfile.TemporaryDirectory(prefix="mono_quant_") as folder:
            inputs = Path(folder) / "inputs.pt"
            try:
                networks.write_inputs(name, inputs)
            except AssetUnavailable as reason:
                print(f"{name}: skipped: {reason}\n", flush=True)
                continue
            print(f"### {name}\n")
            columns = ("grid", "package", "way", "bits/weight", *network.columns)
            cells = (_cells(name, *row, inputs) for row in rows)
            print_table((*columns, "CPU s", "peak MB"), cells)


def _rows(network: str, patterns: Sequence[str]) -> Iterator[tuple[Grid, str, str]]:
    """Yield the grid, the module and the way of each row that a pattern names."""
    for grid in networks.NETWORKS[network].grids:
        for module, package in PACKAGES.items():
            for way, offer in package.offers.items():
                named = f"{network}, {package.title}: {way}, {grid}"
                chosen = any(fnmatchcase(named, pattern) for pattern in patterns)
                if chosen and grid in offer.grids and network in offer.networks:
                    yield grid, module, way


def _cells(network: str, grid: Grid, module: str, way: str, inputs: Path) -> tuple[str, ...]:
    title, blank = PACKAGES[module].title, len(networks.NETWORKS[network].columns) + 2
    output = inputs.with_name("quantized.safetensors")
    try:
        found = _measured(module, way, json.dumps(grid), network, str(inputs), str(output))
    except (EnvironmentUnavailable, Failed) as reason:
        return (str(grid), title, f"{way}: skipped: {reason}", *[""] * (blank + 1))
    quantized = Quantized(read_safetensors(output), found["bits"])
    return (
        str(grid),
        title,
        way,
        f"{found['bits']:.3f}",
        *networks.figures(network, quantized),
        f"{found['seconds']:.1f}",
        f"{found['peak'] / MB:.0f}",
    )


def _measured(module: str, *arguments: str) -> dict[str, float]:
    python = python_with(PACKAGES[module].requirements)
    command = [str(python), "-m", "tests.benchmarks.weight_only.worker", module, *arguments]
    try:
        done = subprocess.run(
            command,
            cwd=_REPOSITORY,
            env={**os.environ, **_ONE_THREAD},
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        raise Failed(f"no answer in {_PATIENCE_S} s") from late
    if done.returncode < 0:
        raise Failed(f"its process was ended by {signal.Signals(-done.returncode).name}")
    if done.returncode:
        raise Failed(f"its process ended with {done.returncode}: {_last(done.stderr)}")
    found: dict[str, float | str] = json.loads(done.stdout)
    print(done.stderr, file=sys.stderr)
    if "skipped" in found:
        raise Failed(str(found["skipped"]))
    return {name: float(value) for name, value in found.items()}


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


if __name__ == "__main__":
    main()
