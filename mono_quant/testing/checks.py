"""Running the laws: by hand, from the command line, or as cases of pytest."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar, cast

import attrs

from mono_quant.base import Container, Correction, LayerQuantizer, Transform
from mono_quant.configurable import Config
from mono_quant.errors import ConfigurationError, InputError
from mono_quant.progress import telling, told_bar
from mono_quant.testing import (
    containers,
    kernels,
    layers,
    observers,
    roundings,
    schemes,
    serializers,
    transforms,
    values,
)
from mono_quant.testing.containers import ContainerCase
from mono_quant.testing.law import Broken, Check, DoesNotApply
from mono_quant.testing.layers import LayerCase
from mono_quant.testing.transforms import CorrectionCase, TransformCase
from mono_quant.text import table

TestT = TypeVar("TestT", bound=Callable[..., None])

HOLDS, BROKEN, DOES_NOT_APPLY = "holds", "broken", "does not apply"
_MANY = {HOLDS: "hold", DOES_NOT_APPLY: "do not apply", BROKEN: "broken"}


@attrs.frozen
class Outcome:
    """What became of one law.

    Attributes:
        law: its name.
        says: the law as a sentence.
        status: "holds", "broken" or "does not apply".
        seen: how it is broken, or why it does not apply.
    """

    law: str
    says: str
    status: str
    seen: str = ""


@attrs.frozen
class Verdict:
    """What became of every law about one subject; true if none is broken.

    Attributes:
        subject: what was checked, as its repr has it.
        outcomes: law by law.
    """

    subject: str
    outcomes: tuple[Outcome, ...]

    @property
    def broken(self) -> tuple[Outcome, ...]:
        """The laws that are broken."""
        return tuple(one for one in self.outcomes if one.status == BROKEN)

    def __bool__(self) -> bool:
        """Return whether no law is broken."""
        return not self.broken

    def __str__(self) -> str:
        """Return a line for each law, and how many hold."""
        rows = [(one.law, one.status, one.seen) for one in self.outcomes]
        counts = [
            f"{count} {many if count > 1 else status}"
            for status, many in _MANY.items()
            if (count := sum(one.status == status for one in self.outcomes))
        ]
        lines = table(("law", "", ""), rows)[1:]
        return "\n".join([f"{self.subject}: {', '.join(counts)}", *lines])

    def to_dict(self) -> Config:
        """Return everything as JSON data."""
        laws = [
            {"law": one.law, "says": one.says, "status": one.status, "seen": one.seen}
            for one in self.outcomes
        ]
        return {"subject": self.subject, "holds": bool(self), "laws": laws}


def checks_for(subject: object) -> tuple[Check, ...]:
    """Return every law about a subject, each ready to be called.

    Args:
        subject: a scheme, granularity, range estimator, observer, statistic, rounding, transform,
            correction, serializer or any other strategy, or the class of one that needs no
            argument; a `LayerCase`, `ContainerCase`, `KernelCase`, `TransformCase` or
            `CorrectionCase`.

    Raises:
        InputError: there is no law about it, or it is to be checked on something; says how.
    """
    subject = _instance(subject)
    if isinstance(subject, LayerQuantizer):
        name = type(subject).__name__
        raise InputError(
            f"a {name} is checked on a layer: give LayerCase({subject!r}, make, inputs), where "
            "make() returns a float layer that it matches and inputs are the arguments of a call"
        )
    if isinstance(subject, Container):
        raise InputError(
            f"a {type(subject).__name__} is checked on a module: give ContainerCase({subject!r}, "
            "make, inputs), where make() returns a float module that it matches"
        )
    found = tuple(_laws(subject))
    if not found:
        raise InputError(
            f"there is no law about a {type(subject).__name__}: give a strategy, a Serializer, or "
            "a LayerCase, ContainerCase, KernelCase, TransformCase or CorrectionCase"
        )
    return found


def check(subject: object) -> Verdict:
    """Return what becomes of every law about a subject; print it to see a line for each.

    Args:
        subject: as `checks_for` takes it.

    Raises:
        InputError: as `checks_for` does.
    """
    checks, found = checks_for(subject), list[Outcome]()
    with told_bar("law", len(checks)) as bar, telling(None):  # files are a part of a law
        for one in checks:
            found.append(_outcome(one))
            bar.update()
    return Verdict(_named(_instance(subject)), tuple(found))


def parametrize_with_checks(subjects: Iterable[object]) -> Callable[[TestT], TestT]:
    """Return a decorator that makes a case of pytest of every law about each subject.

    The test takes the argument ``check`` and calls it::

        @parametrize_with_checks([MyScheme(), MyScheme(bits=3)])
        def test_my_scheme_keeps_the_laws(check: Check) -> None:
            check()

    Args:
        subjects: as `checks_for` takes them.

    Raises:
        ConfigurationError: pytest is not installed.
        InputError: as `checks_for` does.
    """
    try:
        import pytest
    except ImportError as error:
        raise ConfigurationError(
            "parametrize_with_checks makes cases of pytest, which is not installed: "
            "pip install pytest, or call check(...), which needs nothing"
        ) from error

    def skipping(one: Check) -> Check:
        def run() -> None:
            try:
                one()
            except DoesNotApply as reason:
                pytest.skip(f"does not apply: {reason}")

        return attrs.evolve(one, run=run)

    every = [one for subject in subjects for one in checks_for(subject)]
    names = _unlike([f"{_named(one.subject)}-{one.name}" for one in every])
    cases = [pytest.param(skipping(one), id=name) for one, name in zip(every, names, strict=True)]
    return cast("Callable[[TestT], TestT]", pytest.mark.parametrize("check", cases))  # one of its


def _laws(subject: object) -> Iterator[Check]:
    inner: Sequence[object] = (subject,)
    if isinstance(subject, Transform):
        inner = (subject, TransformCase(subject))
    elif isinstance(subject, Correction):
        inner = (subject, CorrectionCase(subject))
    elif isinstance(subject, LayerCase):
        inner = (subject.quantizer, subject)
    elif isinstance(subject, ContainerCase):
        inner = (subject.container, subject)
    elif isinstance(subject, TransformCase | CorrectionCase):
        inner = (subject.transform, subject)
    for one in inner:
        for laws in (
            values.LAWS,
            schemes.GRANULARITY_LAWS,
            schemes.LAWS,
            observers.STATISTIC_LAWS,
            observers.ESTIMATOR_LAWS,
            observers.OBSERVER_LAWS,
            roundings.LAWS,
            roundings.BLOCK_LAWS,
            layers.LAWS,
            containers.LAWS,
            serializers.LAWS,
            transforms.LAWS,
            transforms.CORRECTION_LAWS,
            kernels.LAWS,
        ):
            yield from laws.about(one)


def _instance(subject: object) -> object:
    if not isinstance(subject, type):
        return subject
    try:
        made: object = subject()
    except TypeError as error:
        raise InputError(
            f"a {subject.__name__} cannot be made without arguments ({error}): give an instance"
        ) from error
    return made


def _outcome(one: Check) -> Outcome:
    try:
        one()
    except Broken as broken:
        return Outcome(one.name, one.says, BROKEN, _line(str(broken)))
    except DoesNotApply as reason:
        return Outcome(one.name, one.says, DOES_NOT_APPLY, _line(str(reason)))
    except Exception as error:
        return Outcome(one.name, one.says, BROKEN, _line(f"{type(error).__name__}: {error}"))
    return Outcome(one.name, one.says, HOLDS)


def _named(subject: object) -> str:
    """Return the repr of a subject, or its class where it has none of its own."""
    own = type(subject).__repr__ is not object.__repr__
    return repr(subject) if own else f"{type(subject).__name__}()"


def _unlike(names: Iterable[str]) -> Iterator[str]:
    """Yield names, numbered from the second time on that one comes up."""
    seen = Counter[str]()
    for name in names:
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name}-{seen[name]}"


def _line(text: str) -> str:
    return " ".join(text.split())
