"""Many rounds of saving and loading, and many threads on one model."""

import gc
import os
import statistics
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import torch
from torch import Tensor, nn

from mono_quant import Quantizer, load_model
from tests.helpers import noise, same_bits


@attrs.frozen
class Held:
    """What a process holds.

    Attributes:
        memory: its resident bytes.
        files: its open files.
        mapped: how many pieces of memory it has mapped.
        threads: its threads.
    """

    memory: int
    files: int
    mapped: int
    threads: int

    @classmethod
    def now(cls) -> "Held":
        """Return what this process holds, all garbage collected."""
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            pages * os.sysconf("SC_PAGESIZE"),
            len(list(Path("/proc/self/fd").iterdir())),
            len(Path("/proc/self/maps").read_text().splitlines()),
            threading.active_count(),
        )


def network() -> nn.Sequential:
    """Return a model whose file is some 100 kB, so that a leak of one of a thousand shows."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64)).eval()


def save_and_load(folder: Path, suffix: str, rounds: int) -> list[Held]:
    """Return what is held after each fifth of many rounds of saving and loading."""
    path, result = folder / f"model{suffix}", Quantizer().apply(network())
    found: list[Held] = []
    for number in range(rounds):
        loaded = load_model(result.save(path), network())
        assert same_bits(loaded.get_buffer(_CODES), result.model.get_buffer(_CODES))
        del loaded
        if (number + 1) % (rounds // 5) == 0:
            found.append(Held.now())
    assert list(folder.iterdir()) == [path]
    return found


_CODES = "0.quantized_weights.weight.codes"


def growth(found: list[Held], rounds: int) -> float:
    """Return the bytes of memory that a round adds, of the last four fifths: their median slope."""
    held = [one.memory for one in found]
    slopes = [
        (held[later] - held[first]) / ((later - first) * rounds / len(held))
        for first in range(1, len(held))
        for later in range(first + 1, len(held))
    ]
    return statistics.median(slopes)


MODELS: dict[str, tuple[Quantizer, Callable[[], nn.Module], Tensor]] = {
    "8-bit, dynamic inputs": (Quantizer(), network, noise(8, 256)),
    "8-bit, float inputs": (Quantizer().activations(None), network, noise(8, 256)),
    "4-bit": (Quantizer().bits(4), network, noise(8, 256)),
    "16-bit": (Quantizer().bits(16), network, noise(8, 256)),
    "convolution": (
        Quantizer(),
        lambda: nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU()).eval(),
        noise(2, 8, 12, 12),
    ),
    "LSTM": (Quantizer(), lambda: nn.LSTM(32, 32).eval(), noise(6, 2, 32)),
}


def from_threads(name: str, threads: int, calls: int) -> int:
    """Call one model from many threads at once; return how many calls gave what one thread gives.

    The first call of each layer, which packs its weight, is made by all of them at once.
    """
    quantizer, make, batch = MODELS[name]
    torch.manual_seed(0)
    source = make()
    alone, together = (quantizer.only("*").apply(source).model for _ in range(2))
    batches = [batch * (number + 1) for number in range(threads)]
    expected = [_run(alone, one) for one in batches]
    barrier = threading.Barrier(threads)

    def call(number: int) -> int:
        barrier.wait()
        return sum(
            same_bits(_run(together, batches[number]), expected[number]) for _ in range(calls)
        )

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(call, range(threads)))


def _run(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor | tuple[Tensor, object] = model(batch)
    return output[0] if isinstance(output, tuple) else output
