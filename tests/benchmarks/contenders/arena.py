"""Lets packages take turns: starts their processes, has them make their ways, runs rounds."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median
from typing import IO, Any

import attrs
import torch

from tests.benchmarks.contenders import networks
from tests.benchmarks.contenders.contender import Package, Ways
from tests.benchmarks.contenders.worker import FLOAT
from tests.benchmarks.environments import EnvironmentUnavailable, python_with
from tests.benchmarks.measure import MB, print_table
from tests.models import AssetUnavailable

_REPOSITORY = Path(__file__).parents[3]
_PATIENCE_S = 900
_NO_AMX = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_FP16"}
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Gone(RuntimeError):
    """A process ended, or was ended since it did not answer; the message says which."""

    is_illegal = False
    """Whether the processor did not know an instruction."""


@attrs.define(eq=False)
class Worker:
    """A package's process and what is known of its ways.

    Attributes:
        module: that holds the package.
        package: whose process it is.
        ways: of the package, for this network.
        start: what starts the process.
        found: what was made of each way: its bytes and SQNR, or why it is skipped.
        seconds: what each took, by workload, title and round.
    """

    module: str
    package: Package
    ways: Ways
    start: Sequence[str]
    found: dict[str, dict[str, Any]] = attrs.field(factory=dict)
    seconds: dict[str, dict[str, list[float]]] = attrs.field(factory=dict)
    _limits: Mapping[str, str] = attrs.field(factory=dict, init=False)
    _process: subprocess.Popen[bytes] | None = attrs.field(default=None, init=False)
    _said: IO[bytes] = attrs.field(factory=tempfile.TemporaryFile, init=False)

    def make(self, title: str) -> None:
        """Have a way made; where that ends the process, start another without it.

        Some virtual machines announce AMX and end who uses it: a way is tried again without.
        """
        try:
            self.found[title] = self._ask({"make": title})
        except Gone as reason:
            self.found[title] = {"skipped": str(reason)}
            again = reason.is_illegal and not self._limits
            self._limits = _NO_AMX if again else self._limits
            for other in [name for name in self.found if "skipped" not in self.found[name]]:
                self._ask({"make": other})
            if again:
                self.make(title)

    def round(self, workload: str) -> None:
        """Have each way run once, unless the process is gone."""
        try:
            taken = self._ask({"run": workload})
        except Gone as reason:
            self.found = {title: {"skipped": str(reason)} for title in self.ways}
            return
        for title, seconds in taken.items():
            self.seconds.setdefault(workload, {}).setdefault(title, []).append(seconds)

    def rows(self, workloads: Sequence[str]) -> Iterator[tuple[str, ...]]:
        """Yield a line for the float model in this process, and one for each way."""
        base = self.seconds.get(workloads[0], {}).get(FLOAT)
        if base:
            cells = [f"{1e3 * median(self.seconds[name][FLOAT]):.1f} ms" for name in workloads]
            limits = "".join(f", {name}={value}" for name, value in self._limits.items())
            yield (self.package.title, f"fp32, eager{limits}", *cells, "")
        for title, found in self.found.items():
            if "skipped" in found:
                blank = [""] * len(workloads)
                yield (self.package.title, f"{title}: skipped: {found['skipped']}", *blank, "")
                continue
            note = f" ({found['note']})" if found["note"] else ""
            cells = [self._cell(name, title) for name in workloads]
            size = f"{found['nbytes'] / MB:.0f}"
            yield (self.package.title, f"{title}{note}", *cells, size)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _cell(self, workload: str, title: str) -> str:
        of_round = self.seconds.get(workload, {})
        if title not in of_round:
            return "not run"
        pairs = zip(of_round[FLOAT], of_round[title], strict=True)
        ratio = median(base / taken for base, taken in pairs)
        return f"{ratio:.2f}×, {self.found[title]['sqnr'][workload]:.1f} dB"

    def _ask(self, command: Mapping[str, str]) -> dict[str, Any]:
        if self._process is None:
            self._process = subprocess.Popen(
                self.start,
                cwd=_REPOSITORY,
                env={**os.environ, **_ONE_THREAD, **self._limits},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                bufsize=0,
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):  # what ended it is said below
            process.stdin.write(json.dumps(command).encode() + b"\n")
        answered, _, _ = select.select([process.stdout], [], [], _PATIENCE_S)
        line = process.stdout.readline() if answered else b""
        if not line:
            code = process.wait() if answered else None
            self.close()
            gone = Gone(f"no answer in {_PATIENCE_S} s" if code is None else self._ended(code))
            gone.is_illegal = code == -signal.SIGILL
            raise gone
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ended(self, code: int) -> str:
        if code < 0:
            return f"its process was ended by {signal.Signals(-code).name}"
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return f"its process ended with {code}: {lines[-1] if lines else ''}"


def compare(
    network: str,
    packages: Mapping[str, Package],
    rounds: Mapping[str, int],
    kind: str,
    patterns: Sequence[str],
) -> None:
    """Print how a network does in each package.

    Args:
        network: its name, see `networks`.
        packages: by the module that holds each.
        rounds: how often each workload is run, by the end of its name.
        kind: "decoders" or "convolutions".
        patterns: of what runs, "network, package: way"; the rest is left out.
    """
    packages = _matching(network, packages, kind, patterns)
    if not packages:
        return
    try:
        inputs = networks.inputs(network)
    except AssetUnavailable as reason:
        print(f"{network}: skipped: {reason}\n", flush=True)
        return
    workloads = list(inputs[0])
    with _workers(network, inputs, packages, kind) as workers:
        for worker in workers:
            for title in worker.ways:
                if title not in worker.found:
                    begun = time.perf_counter()
                    worker.make(title)
                    took = f"{time.perf_counter() - begun:.0f} s"
                    print(f"{network}, {worker.package.title}: {title}: {took}", file=sys.stderr)
        for workload in workloads:
            (times,) = [count for end, count in rounds.items() if workload.endswith(end)]
            for _ in range(times):
                for worker in workers:
                    worker.round(workload)
        rows = [row for worker in workers for row in worker.rows(workloads)]
    print(f"### {network}\n")
    print_table(("package", "setting", *workloads, "weights, MB"), rows)


def _matching(
    network: str, packages: Mapping[str, Package], kind: str, patterns: Sequence[str]
) -> Mapping[str, Package]:
    """Return the packages with those of their ways alone that a pattern names."""
    found = {}
    for module, package in packages.items():
        ways: Ways = getattr(package, kind)
        named = {title: f"{network}, {package.title}: {title}" for title in ways}
        chosen = {
            title: way
            for title, way in ways.items()
            if any(fnmatchcase(named[title], pattern) for pattern in patterns)
        }
        if chosen:
            found[module] = Package(package.title, package.requirements, **{kind: chosen})
    return found


@contextmanager
def _workers(
    network: str, inputs: networks.Inputs, packages: Mapping[str, Package], kind: str
) -> Iterator[list[Worker]]:
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="mono_quant_"))
        path = Path(folder) / "inputs.pt"
        torch.save(inputs, path)
        workers = []
        for module, package in packages.items():
            ways: Ways = getattr(package, kind)
            worker = Worker(module, package, ways, ())
            workers.append(worker)
            if not ways:
                continue
            try:
                python = python_with(package.requirements)
            except EnvironmentUnavailable as reason:
                worker.found = {title: {"skipped": str(reason)} for title in ways}
                continue
            program = "tests.benchmarks.contenders.worker"
            worker.start = [str(python), "-m", program, module, network, str(path)]
            stack.callback(worker.close)
        yield workers
