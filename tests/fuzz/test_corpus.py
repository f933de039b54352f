"""A few hundred mutants in the ordinary tests; `nox -s fuzz` tries 23,000."""

import sys

import pytest

from tests.fuzz.hunt import LOST, hunt
from tests.fuzz.mutants import mutant
from tests.fuzz.samples import samples

MUTANTS = 15 * 23  # of each sample as many


REFUSED = ("exit 1", "exit 2", "InputError", "CorruptCheckpointError")
FOREIGN = {
    "plain": {"info", "info --json", "info --html", "dequantize"},
    "statistics": {"info"},
}
"""What reads other files than those of a role."""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_valid_files_are_read_by_all_that_is_meant_for_them() -> None:
    """Else a loader that refuses everything would pass."""
    for tried in hunt(range(-len(samples()), 0)):
        sample = mutant(tried.number).sample
        assert not tried.bad, sample.name
        refused = {loader for loader, one in tried.outcomes.items() if one in REFUSED}
        assert refused == FOREIGN.get(sample.role, set()), sample.name


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_mutants_are_refused_by_our_own_errors_or_equal_to_the_bit() -> None:
    bad = [(one.number, one.bad) for one in hunt(range(MUTANTS)) if one.bad]
    assert not bad


def test_a_number_makes_the_same_mutant_again() -> None:
    for number in range(2 * len(samples())):
        assert mutant(number) == mutant(number)
    assert len({mutant(number).content for number in range(MUTANTS)}) > MUTANTS * 0.9


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_the_hunt_sees_a_process_that_is_lost() -> None:
    """Else a loader that takes its process with it would go unseen."""
    crash, after = hunt([LOST, 1])
    assert crash.bad == {"process": "!crash: ended with -9"}
    assert not after.bad
