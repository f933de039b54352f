"""Laws: what every class of a kind must do, each a function with a name that says it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Generic, TypeVar, cast

import attrs
import torch
from torch import Tensor

from mono_quant.numerics.nested import tensors_in

SubjectT = TypeVar("SubjectT")


class Broken(AssertionError):
    """A law does not hold; the message says on what, and how."""


class DoesNotApply(Exception):
    """A law says nothing of this subject; the message says why."""


@attrs.frozen(eq=False)
class Check:
    """One law about one subject.

    Attributes:
        subject: what is checked.
        name: of the law, as an identifier.
        says: the law as a sentence.
    """

    subject: object
    name: str
    says: str
    _run: Callable[[], None]

    def __call__(self) -> None:
        """Return if the law holds.

        Raises:
            Broken: it does not.
            DoesNotApply: it says nothing of the subject.
        """
        self._run()

    def __str__(self) -> str:
        """Return subject and law."""
        return f"{self.subject!r}: {self.name}"


@attrs.frozen(eq=False)
class Laws(Generic[SubjectT]):
    """What must hold of all subjects of one base class.

    Attributes:
        base: the class.
        laws: functions of a subject, named and described by what they say.
    """

    base: type
    laws: Sequence[Callable[[SubjectT], None]]

    def about(self, subject: object) -> Iterator[Check]:
        """Yield each law for a subject; none for one of another class."""
        if isinstance(subject, self.base):
            known = cast("SubjectT", subject)  # as the line above has seen
            for law in self.laws:
                says = (law.__doc__ or "").partition("\n")[0]
                yield Check(subject, law.__name__, says, partial(law, known))


def expect(holds: bool, otherwise: str) -> None:
    """Raise `Broken`, saying `otherwise`, unless something holds."""
    if not holds:
        raise Broken(otherwise)


@contextmanager
def refused(by: type[Exception], what: str) -> Iterator[list[Exception]]:
    """Raise `Broken` unless what is done inside is refused by an error of a class.

    Args:
        by: the class.
        what: what is to be refused, for the message.

    Yields:
        a list that holds the error afterwards.
    """
    seen: list[Exception] = []
    try:
        yield seen
    except by as error:
        seen.append(error)
    except Exception as error:
        raise Broken(
            f"{what} raises {type(error).__name__} ({error}) instead of {by.__name__}"
        ) from error
    if not seen:
        raise Broken(f"{what} is not refused: {by.__name__} was expected")


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal to the bit, NaN and minus zero included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    left, right = (x.detach().cpu().contiguous().flatten() for x in (one, other))
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


class Untouched:
    """Remembers tensors, to say later whether one was written to."""

    def __init__(self, **held: object) -> None:
        """Remember all tensors in some values, by what they are."""
        self._held = {
            what: [(x, x.detach().clone()) for x in tensors_in(value)]
            for what, value in held.items()
        }

    def expect(self) -> None:
        """Raise `Broken` if one was written to."""
        for what, pairs in self._held.items():
            for x, before in pairs:
                expect(same_bits(x, before), f"{what.replace('_', ' ')} was written to")
