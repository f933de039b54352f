"""Mutants by their numbers."""

from random import Random

import attrs

from tests.fuzz import pickles, tensors
from tests.fuzz.samples import Sample, samples


@attrs.frozen
class Mutant:
    """A changed file.

    Attributes:
        number: which one; it makes the same mutant each time.
        sample: the file before.
        how: what was done to it.
        content: the bytes after.
        forged: whether the header's checksum was made right again, so that another file than the
            sample may well be in it.
    """

    number: int
    sample: Sample
    how: str
    content: bytes
    forged: bool


def mutant(number: int) -> Mutant:
    """Return a mutant by its number: every sample in turn."""
    random = Random(number)
    chosen = samples()[number % len(samples())]
    change = tensors.mutate if chosen.suffix == ".safetensors" else pickles.mutate
    how, content, forged = change(chosen.content, random)
    return Mutant(number, chosen, how, content, forged)
