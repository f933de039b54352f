"""What the benchmarks share: tables, the machine, pinned threads, fresh processes, memory."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

import mono_quant

MB = 1e6
_REPOSITORY = Path(__file__).parents[2]
_SAMPLING_S = 0.001
_RESET_PEAK = "5"  # what proc(5) has clear_refs take to set VmHWM back


def machine() -> str:
    """Return one line on the machine, torch and this package."""
    threads = "1 thread where timed"
    versions = f"torch {torch.__version__}, mono_quant {mono_quant.__version__}"
    load = f"load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{_processor()}, {os.cpu_count()} cores, {load}; {versions}; {threads}"


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table; its rows as they are made."""
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns), flush=True)
    for row in rows:
        print("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |", flush=True)
    print(flush=True)


def first_sample(batches: Sequence[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Return a batch of the first sample alone."""
    return [tuple(one[:1] for one in batches[0])]


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


def median_seconds(
    actions: Sequence[Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] = time.process_time,
) -> list[float]:
    """Return the median time of each action on one thread; they take turns.

    Processor time by default, which says less of what else the machine does.
    """
    return [statistics.median(times) for times in _seconds(actions, repeats, clock)]


def least_seconds(actions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Return the least processor time of each action on one thread; they take turns.

    What an action costs where nothing else of the machine is in its way.
    """
    return [min(times) for times in _seconds(actions, repeats, time.process_time)]


def _seconds(
    actions: Sequence[Callable[[], object]], repeats: int, clock: Callable[[], float]
) -> list[list[float]]:
    taken: list[list[float]] = [[] for _ in actions]
    with one_thread():
        for _ in range(repeats):
            for action, times in zip(actions, taken, strict=True):
                start = clock()
                action()
                times.append(clock() - start)
    return taken


def sqnr(reference: Iterable[Tensor], other: Iterable[Tensor]) -> float:
    """Return ``10 log10(sum(ref^2) / sum((ref - other)^2))`` over all tensors, in float64."""
    signal = noise = 0.0
    for one, two in zip(reference, other, strict=True):
        exact = one.detach().double()
        signal += exact.square().sum().item()
        noise += (exact - two.detach().double()).square().sum().item()
    return 10 * torch.log10(torch.tensor(signal / noise, dtype=torch.float64)).item()


def fresh(module: str, *arguments: object) -> tuple[dict[str, float], float]:
    """Run a module in a process of its own and return what it measured, and its peak of memory.

    Args:
        module: its last part; its `child` prints one line of JSON.
        arguments: handed to it as texts.

    Returns:
        the numbers of that line, and the largest private (anonymous) memory seen, in bytes.
    """
    command = [sys.executable, "-m", f"tests.benchmarks.{module}", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=_REPOSITORY, stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, memory("RssAnon", process.pid))
        time.sleep(_SAMPLING_S)
    printed, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} returned {process.returncode}")
    found: dict[str, float] = json.loads(printed.splitlines()[-1])
    return found, float(peak)


def memory(what: str, process: int | str = "self") -> int:
    """Return an entry of Linux's /proc/PID/status, such as VmHWM, in bytes; 0 if gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (OSError, ValueError):
        return 0
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name == what:
            return int(value.split()[0]) * 1024
    return 0


def reset_peak() -> None:
    """Start VmHWM anew from what is resident now."""
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
