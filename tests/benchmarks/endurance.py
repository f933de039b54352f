"""Kills that files survive, rounds of saving and loading, and threads on one model."""

import tempfile
from pathlib import Path

from tests.benchmarks.measure import print_table
from tests.endurance.kills import (
    Survived,
    kill_while_calibrating,
    kill_while_quantizing_in_place,
    kill_while_saving,
    save_at_once,
)
from tests.endurance.nursery import nursery
from tests.endurance.rounds import MODELS, from_threads, growth, save_and_load

KILLS = 50
ROUNDS = 1000
THREADS, CALLS = 16, 100


def main() -> None:
    """Print what was survived; anything that was lost ends the program with an error."""
    _kills()
    _rounds()
    _threads()


def _folder() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory()


def _kills() -> None:
    found: list[tuple[str, Survived]] = []
    with nursery() as children:
        for suffix in (".safetensors", ".pt"):
            with _folder() as name:
                survived = kill_while_saving(children, Path(name), suffix, KILLS)
                found.append((f"saving {suffix} over a file", survived))
        with _folder() as name:
            survived = kill_while_quantizing_in_place(children, Path(name), KILLS)
            found.append(("quantizing in place, and saving", survived))
        with _folder() as name:
            survived = kill_while_calibrating(children, Path(name), KILLS // 10)
            found.append(("calibrating block by block, to be resumed", survived))
        with _folder() as name:
            reads = save_at_once(children, Path(name), ROUNDS)
    print_table(
        ("killed by SIGKILL while", "kills", "file as before", "new and whole", "left to clean"),
        [(what, *map(str, (one.kills, one.old, one.new, one.left))) for what, one in found],
    )
    print(
        "\nAfter each kill the file was read and compared to the bit, and the next save removed"
        "\nwhat was left. Of calibrations, the last column but one counts runs that ended in the"
        "\nbytes of an undisturbed one. Two processes saved to one path "
        f"{2 * ROUNDS} times; it was read\n{reads} times meanwhile, whole each time.\n"
    )


def _rounds() -> None:
    rows = []
    for suffix in (".safetensors", ".pt"):
        with _folder() as name:
            held = save_and_load(Path(name), suffix, ROUNDS)
        memory = " ".join(f"{one.memory / 1e6:.1f}" for one in held)
        change = f"{held[-1].files - held[0].files:+d}", f"{held[-1].mapped - held[0].mapped:+d}"
        rows.append((suffix, str(ROUNDS), memory, f"{growth(held, ROUNDS):.0f} B", *change))
    columns = ("format", "rounds", "MB resident, by fifths", "a round", "open files", "mappings")
    print_table(columns, rows)


def _threads() -> None:
    rows = [
        (name, str(THREADS), str(THREADS * CALLS), str(from_threads(name, THREADS, CALLS)))
        for name in MODELS
    ]
    print()
    print_table(("model", "threads at once", "calls", "equal to one thread's, to the bit"), rows)
