"""Nothing piles up, and threads do not disturb each other."""

import sys
from pathlib import Path

import pytest

from tests.endurance.rounds import MODELS, from_threads, growth, save_and_load

LEAK = 2_000
"""Bytes a round; what is saved and loaded in one is some hundred thousand."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_thousand_rounds_leak_neither_memory_nor_files(suffix: str, tmp_path: Path) -> None:
    held = save_and_load(tmp_path, suffix, 1000)
    assert growth(held, 1000) < LEAK
    assert held[-1].files == held[0].files
    assert held[-1].threads == held[0].threads
    assert held[-1].mapped <= held[0].mapped + 20


@pytest.mark.parametrize("name", MODELS)
def test_one_model_gives_many_threads_what_it_gives_one(name: str) -> None:
    assert from_threads(name, threads=8, calls=20) == 8 * 20
