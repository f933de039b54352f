"""Nothing piles up, and threads do not disturb each other."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.endurance.rounds import MODELS, from_threads, growth, save_and_load

LEAK = 2_000
"""Bytes a round; what is saved and loaded in one is some hundred thousand."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_hundreds_of_rounds_leak_neither_memory_nor_files(suffix: str, tmp_path: Path) -> None:
    """The benchmark does a thousand."""
    held = save_and_load(tmp_path, suffix, 400)
    assert growth(held, 400) < LEAK
    assert held[-1].files == held[0].files
    assert held[-1].threads == held[0].threads
    assert held[-1].mapped <= held[0].mapped + 20


def test_nothing_that_was_quantized_leaves_a_thread_behind() -> None:
    """A fork at a moment at which it held a lock would leave a child that waits for ever."""
    program = (
        "import threading\n"
        "from tests.endurance.kills import sequential, network, result\n"
        "from mono_quant import AWQ, Quantizer\n"
        "from tests.endurance.kills import DATA\n"
        "result(0), sequential().apply(network(0))\n"
        "Quantizer().bits(4).transform(AWQ()).fit(DATA).apply(network(0))\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


@pytest.mark.parametrize("name", MODELS)
def test_one_model_gives_many_threads_what_it_gives_one(name: str) -> None:
    assert from_threads(name, threads=8, calls=20) == 8 * 20
