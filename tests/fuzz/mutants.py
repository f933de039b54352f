"""Mutants by their numbers."""

from collections.abc import Callable, Mapping
from random import Random

import attrs

from tests.fuzz import arrays, pickles, settings, tensors
from tests.fuzz.samples import Sample, samples


@attrs.frozen
class Mutant:
    """A changed file.

    Attributes:
        number: which one; it makes the same mutant each time.
        sample: the file before.
        how: what was done to it.
        content: the bytes after.
        forged: whether the checksums were made right again, or there are none, so that another file
            than the sample may well be in it.
    """

    number: int
    sample: Sample
    how: str
    content: bytes
    forged: bool


def mutant(number: int) -> Mutant:
    """Return a mutant by its number: every sample in turn; of a negative one, the sample itself."""
    random = Random(number)
    chosen = samples()[number % len(samples())]
    if number < 0:
        return Mutant(number, chosen, "nothing", chosen.content, forged=False)
    if chosen.role in _FREE:
        how, content = _FREE[chosen.role](chosen.content, random)
        return Mutant(number, chosen, how, content, forged=True)
    change = tensors.mutate if chosen.suffix == ".safetensors" else pickles.mutate
    how, content, forged = change(chosen.content, random)
    return Mutant(number, chosen, how, content, forged)


_FREE: Mapping[str, Callable[[bytes, Random], tuple[str, bytes]]] = {
    "array": arrays.mutate,
    "settings": settings.mutate,
}
"""What changes files that have no checksums, by their role."""
